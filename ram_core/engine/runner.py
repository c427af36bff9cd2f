"""From a plan to drawn tokens: the proposal's forward, the aligners', and one resampling step.

A step is launched, and its results are collected later: on an asynchronous device the next step can be
planned and launched meanwhile. The tokens that a step draws stay on the device, in a table by slot, from
which the next step reads them.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ram_core.engine.bank import ModelBank
from ram_core.engine.messages import StepTelemetry
from ram_core.engine.scheduler import ScheduledRow
from ram_core.engine.sequence import Sequence
from ram_core.models.packing import PackedBatch, Row, pack
from ram_core.resampling import AlignerLogits, Draws, StepFeatures, StepParams, draw_tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row drew, on the host. `is_bad`: a model gave non-finite logits, the rest means nothing."""

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

    With `has_static_shapes`, steps that only draw are padded, so that few different shapes occur.
    """

    def __init__(self, bank: ModelBank, *, num_slots: int, has_static_shapes: bool = False) -> None:
        self._bank = bank
        self._device = bank.proposal.device
        self._has_static_shapes = has_static_shapes
        # The last slot is that of padding rows: they draw from the proposal, and nobody looks.
        self._padding_slot = num_slots
        self._params = StepParams.empty(num_slots + 1, self._device)
        self._last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=self._device)
        self._eos_ids = torch.tensor(sorted(bank.eos_ids), device=self._device)

    def start(self, sequence: Sequence) -> None:
        """Write the parameters of a sequence that has just been given its slot."""
        asked = (sequence.request.sampling, sequence.request.alignment)
        self._params.put(sequence.slot, StepParams.of([asked], seeds=[sequence.seed], positions=[0]))

    def free_memory(self) -> None:
        """Return what is kept for later to the device, after it had none left."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, rows: Rows[ScheduledRow]) -> LaunchedStep:
        """Begin to compute rows of a plan; nothing here waits for the device."""
        is_static = self._has_static_shapes and all(row.draws and row.num_tokens == 1 for row in rows)
        proposal_logits = self._forward([(row, 0) for row in rows], is_static)
        drawing = [row for row in rows if row.draws]
        num_drawing = _bucket(len(drawing)) if is_static else len(drawing)
        terms = self._forward_aligners(rows, drawing, num_drawing, is_static)
        if proposal_logits is None or not drawing:
            return LaunchedStep(tuple(rows))
        num_padding = num_drawing - len(drawing)
        slots = [row.sequence.slot for row in drawing] + [self._padding_slot] * num_padding
        positions = [row.end for row in drawing] + [0] * num_padding
        index = torch.tensor([slots, positions]).to(self._device, non_blocking=True)
        asked = [(row.sequence.request.sampling, row.sequence.request.alignment) for row in drawing]
        draws = draw_tokens(
            proposal_logits,
            terms,
            replace(self._params.take(index[0]), position=index[1]),
            StepFeatures.of(asked),
            vocab_size=self._bank.vocab_size,
            eos_ids=self._eos_ids,
        )
        self._last_tokens.index_copy_(0, index[0], draws.token)
        return self._send_home(tuple(rows), _as_table(draws)[: len(drawing)])

    def _send_home(self, rows: tuple[ScheduledRow, ...], table: Tensor) -> LaunchedStep:
        if self._device.type != "cuda":
            return LaunchedStep(rows, table.cpu())
        home = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        home.copy_(table, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return LaunchedStep(rows, home, arrived)

    def _forward(self, uses: Rows[tuple[ScheduledRow, int]], is_static: bool) -> Tensor | None:
        """Run one model over the lanes of it that rows have, where they have anything to read.

        Logits are of the rows that draw, in their order, and of padding rows.
        """
        busy = [(row, lane) for row, lane in uses if row.lane_starts[lane] < row.end]
        if not busy:
            return None
        row, lane = busy[0]
        kept = row.sequence.lanes[lane]
        return self._bank.model(kept.model).forward(self._pack(busy, is_static), self._bank.pools[kept.pool])

    def _forward_aligners(
        self, rows: Rows[ScheduledRow], drawing: Rows[ScheduledRow], num_drawing: int, is_static: bool
    ) -> list[AlignerLogits]:
        """One forward for each aligner that any row uses, over those rows only."""
        users: dict[str, list[tuple[ScheduledRow, int]]] = {}
        for row in rows:
            for lane, kept in enumerate(row.sequence.lanes[1:], start=1):
                users.setdefault(kept.model, []).append((row, lane))
        place = {id(row): index for index, row in enumerate(drawing)}
        terms = []
        for uses in users.values():
            logits = self._forward(uses, is_static)
            drawn = [(place[id(row)], row.sequence.lanes[lane].strength) for row, lane in uses if row.draws]
            if logits is not None and drawn:
                # Padding rows belong to none of the batch's rows.
                drawn += [(num_drawing, 0.0)] * (len(logits) - len(drawn))
                index, strength = zip(*drawn, strict=True)
                terms.append(
                    AlignerLogits(
                        rows=torch.tensor(index).to(self._device, non_blocking=True),
                        logits=logits,
                        strength=torch.tensor(strength).to(self._device, non_blocking=True),
                    )
                )
        return terms

    def _pack(self, uses: Rows[tuple[ScheduledRow, int]], is_static: bool) -> PackedBatch:
        packed, fed_tokens, fed_slots = [], [], []
        num_tokens = 0
        for row, lane in uses:
            start, known = row.lane_starts[lane], row.sequence.token_ids
            token_ids = known[start : row.end]
            num_tokens += row.end - start
            if len(known) < row.end:
                # Drawn by the step under way: the device knows it, the host does not yet.
                token_ids.append(0)
                fed_tokens.append(num_tokens - 1)
                fed_slots.append(row.sequence.slot)
            packed.append(Row(token_ids, start, row.sequence.lanes[lane].pages, row.draws))
        pages = max(len(row.pages) for row in packed)
        batch = pack(
            packed,
            page_size=self._bank.page_size,
            device=self._device,
            num_rows=_bucket(len(packed)) if is_static else 0,
            num_pages=_bucket(pages) if is_static else 0,
        )
        if fed_tokens:
            index = torch.tensor([fed_tokens, fed_slots]).to(self._device, non_blocking=True)
            batch.input_ids.index_copy_(0, index[0], self._last_tokens[index[1]])
        return batch


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward failed for want of memory; on CPU torch has no error of its own for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _bucket(size: int) -> int:
    """The next power of two, or above 8 the next multiple of 8: few shapes, little padding."""
    return 1 << (size - 1).bit_length() if size <= 8 else -(-size // 8) * 8


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
