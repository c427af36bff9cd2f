"""From a plan to drawn tokens: the proposal's forward, the aligners', and one resampling step.

A step is launched, and its results are collected later: on an asynchronous device the next step can be
planned and launched meanwhile. The tokens that a step draws stay on the device, in a table by slot, from
which the next step reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.bank import PROPOSAL, ModelBank
from ram_core.engine.device import Fork, send_home
from ram_core.engine.graphs import Recorder, StepGraphs, common_steps
from ram_core.engine.layout import ModelUse, Served, Shapes, StepLayout, StepPacker, UseNumbers
from ram_core.engine.messages import StepTelemetry
from ram_core.engine.prompt_ends import PromptEnds
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.sequence import Sequence
from ram_core.models.kv_watch import watched_kv
from ram_core.models.packing import ready_to_send
from ram_core.resampling import AlignerLogits, Draws, StepParams, draw_tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row drew, on the host. `is_bad`: a model's numbers were not finite, the rest means nothing."""

    token_id: int
    log_prob: float
    top_log_probs: tuple[tuple[int, float], ...]
    telemetry: StepTelemetry | None
    is_bad: bool


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way. `table` is on its way to the host, and there once `arrived` says so."""

    rows: tuple[ScheduledRow, ...]
    table: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def collect(self) -> list[Draw]:
        """Wait for the results; one draw for each row that draws, in the order of `rows`."""
        if self.table is None:
            return []
        if self.arrived is not None:
            self.arrived.synchronize()
        drawing = [row for row in self.rows if row.draws]
        return [_to_draw(row, values) for row, values in zip(drawing, self.table.tolist(), strict=True)]


class Runner:
    """Holds the parameter tables; a sequence's row in them is its slot, written once when it starts.

    With `shapes`, steps that only draw are padded to them, so that few different layouts occur.
    """

    def __init__(self, bank: ModelBank, *, num_slots: int, shapes: Shapes | None = None) -> None:
        self._bank = bank
        self._device = bank.proposal.device
        # The last slot is that of padding rows: they draw from the proposal, and nobody looks.
        self._packer = StepPacker(bank.page_size, padding_slot=num_slots, shapes=shapes)
        self._params = StepParams.empty(num_slots + 1, self._device)
        self._last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=self._device)
        # So many of each slot's silent tokens broke: what is drawn after one means nothing.
        self._num_broken = torch.zeros(num_slots + 1, dtype=torch.int32, device=self._device)
        self._eos_ids = torch.tensor(sorted(bank.eos_ids), device=self._device)
        self._fork = Fork(self._device)
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def capture(self, recorder: Recorder, progress: Callable[[str], None]) -> StepGraphs:
        """Record the steps that will be common; the runner must have shapes, and loses them if it cannot."""
        self._graphs = StepGraphs(recorder, self._compute)
        self._graphs.record(common_steps(self._packer, step_kinds(self._bank)), progress)
        if not len(self._graphs):
            self._packer = replace(self._packer, shapes=None)
        return self._graphs

    def forget(self, group: AlignerGroup) -> None:
        """Let go of recordings that a group took part in, which is gone."""
        if self._graphs is not None:
            self._graphs.forget(group.name)

    def start(self, sequence: Sequence) -> None:
        """Write the parameters of a sequence that has just been given its slot.

        Its past there is void, unless it goes on where its own prompt was read.
        """
        asked = (sequence.request.sampling, sequence.request.alignment)
        self._params.put(sequence.slot, StepParams.of([asked], seeds=[sequence.seed], positions=[0]))
        if not sequence.is_continued:
            self._num_broken[sequence.slot].zero_()

    def free_memory(self) -> None:
        """Return what is kept for later to the device, after it had none left."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, rows: Rows[ScheduledRow]) -> LaunchedStep:
        """Begin to compute rows of a plan; nothing here waits for the device."""
        packed, ends = self._packer.pack(rows), PromptEnds.of(rows)
        layout, numbers = packed.layout, ready_to_send(packed.numbers, self._device)
        table = None
        if self._graphs is not None and ends is None:
            table = self._graphs.replay(layout, numbers)
        if table is None:
            table = self._compute(layout, numbers.to(self._device, non_blocking=True), ends)
        if ends is not None:
            ends.forget()
        if not packed.num_real:
            return LaunchedStep(tuple(rows))
        return LaunchedStep(tuple(rows), *send_home(table[: packed.num_real]))

    def _compute(
        self, layout: StepLayout, flat: Int64[Tensor, " number"], ends: PromptEnds | None = None
    ) -> Float64[Tensor, "row column"]:
        """All that a step does on the device, of nothing but its layout and its numbers: its results.

        Where to write to, and the tables that it reads, are the same for every step. One with `ends` does
        more, and is never recorded.
        """
        numbers = layout.read(flat)
        uses = list(zip(layout.uses, numbers.uses, strict=True))
        results = self._fork.run([partial(self._forward, *use) for use in uses])
        for (_, part), (_, is_broken) in zip(uses, results, strict=True):
            if is_broken is not None:
                self._num_broken.index_add_(0, part.owners, is_broken.int())
        if not layout.num_drawing:
            return flat.new_empty((0, 0), dtype=torch.float64)
        proposal_logits, terms = None, []
        for (use, part), (logits, _) in zip(uses, results, strict=True):
            if use.model == PROPOSAL:
                proposal_logits = logits
            elif use.has_terms:
                terms.append(AlignerLogits(part.rows, logits, part.strength))
        if ends is not None:
            ends.keep([logits for logits, _ in results])
            proposal_logits = ends.complete(proposal_logits)
            terms += ends.known_terms()
        assert proposal_logits is not None, "a row that draws is read by the proposal"
        draws = draw_tokens(
            proposal_logits,
            terms,
            replace(self._params.take(numbers.slots), position=numbers.positions),
            layout.features,
            vocab_size=self._bank.vocab_size,
            eos_ids=self._eos_ids,
        )
        self._last_tokens.index_copy_(0, numbers.slots, draws.token)
        is_broken = self._num_broken.index_select(0, numbers.slots) > 0
        return _as_table(replace(draws, is_bad=draws.is_bad | is_broken))

    def _forward(self, use: ModelUse, numbers: UseNumbers) -> tuple[Tensor, Tensor | None]:
        """Run one model; logits are of the rows that draw, in their order, and of padding rows.

        Also which tokens broke, if any are silent.
        """
        batch = numbers.batch
        if use.is_fed:
            known = torch.cat([self._last_tokens, batch.input_ids])
            batch = replace(batch, input_ids=known.index_select(0, numbers.sources))
        slots = numbers.group_slots if use.is_stacked else None
        forward = partial(self._bank.forward, use.model, batch, self._bank.pools[use.pool], slots)
        if not use.batch.has_silent_tokens:
            return forward(), None
        with watched_kv() as watch:
            return forward(), watch.is_broken


def step_kinds(bank: ModelBank) -> list[list[Served]]:
    """The sets of models that most steps use: the proposal, alone or with a group of aligners."""
    proposal = Served(PROPOSAL, bank.proposal_pool)
    aligned = [Served(group.name, bank.pool_of[group.names[0]], group.is_stacked) for group in bank.groups]
    return [[proposal], *[[proposal, served] for served in aligned]]


def _as_table(draws: Draws) -> Tensor:
    """A step's results as one tensor for one copy, a line a row; float64 holds token ids exactly."""
    telemetry = draws.telemetry
    columns = [
        draws.token,
        draws.log_prob,
        draws.is_bad,
        telemetry.kl_p_q,
        telemetry.kl_pi_p,
        telemetry.ess,
        telemetry.aligner_mass,
        telemetry.is_fallback,
    ]
    singles = torch.stack([column.double() for column in columns], 1)
    return torch.cat([singles, draws.top_token.double(), draws.top_log_prob.double()], 1)


def _to_draw(row: ScheduledRow, values: list[float]) -> Draw:
    request = row.sequence.request
    token_id, log_prob, is_bad, kl_p_q, kl_pi_p, ess, mass, is_fallback = values[:8]
    num_top = (len(values) - 8) // 2
    wanted = request.sampling.num_top_log_probs
    ids, log_probs = values[8 : 8 + num_top][:wanted], values[8 + num_top :][:wanted]
    return Draw(
        token_id=int(token_id),
        log_prob=log_prob,
        top_log_probs=tuple((int(i), value) for i, value in zip(ids, log_probs, strict=True)),
        telemetry=None
        if request.alignment.is_identity
        else StepTelemetry(kl_p_q, kl_pi_p, ess, mass, bool(is_fallback)),
        is_bad=bool(is_bad),
    )
