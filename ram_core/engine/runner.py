"""From a plan to drawn tokens: the proposal's forward, the aligners', and one resampling step."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ram_core.engine.bank import ModelBank
from ram_core.engine.messages import StepTelemetry
from ram_core.engine.scheduler import Plan, ScheduledRow
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


class Runner:
    """Holds the parameter tables; a sequence's row in them is its slot, written once when it starts."""

    def __init__(self, bank: ModelBank, *, num_slots: int) -> None:
        self._bank = bank
        self._device = bank.proposal.device
        self._params = StepParams.empty(num_slots, self._device)
        self._eos_ids = torch.tensor(sorted(bank.eos_ids), device=self._device)

    def start(self, sequence: Sequence) -> None:
        """Write the parameters of a sequence that has just been given its slot."""
        asked = (sequence.request.sampling, sequence.request.alignment)
        self._params.put(sequence.slot, StepParams.of([asked], seeds=[sequence.seed], positions=[0]))

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Draw]:
        """Compute all rows of a plan; one draw for each row that draws, in the plan's order."""
        proposal_logits = self._forward_proposal(plan.rows)
        drawing = [row for row in plan.rows if row.draws]
        terms = self._forward_aligners(plan.rows, drawing)
        if not drawing:
            return []
        asked = [(row.sequence.request.sampling, row.sequence.request.alignment) for row in drawing]
        slots = torch.tensor([row.sequence.slot for row in drawing], device=self._device)
        positions = torch.tensor([len(row.sequence.token_ids) for row in drawing], device=self._device)
        draws = draw_tokens(
            proposal_logits,
            terms,
            replace(self._params.take(slots), position=positions),
            StepFeatures.of(asked),
            vocab_size=self._bank.vocab_size,
            eos_ids=self._eos_ids,
        )
        return _to_host(draws, drawing)

    def _forward_proposal(self, rows: Rows[ScheduledRow]) -> Tensor:
        bank = self._bank
        return bank.proposal.forward(self._pack(rows, lane=[0] * len(rows)), bank.pools[bank.proposal_pool])

    def _forward_aligners(self, rows: Rows[ScheduledRow], drawing: Rows[ScheduledRow]) -> list[AlignerLogits]:
        """One forward for each aligner that any row uses, over those rows only."""
        users: dict[str, list[tuple[ScheduledRow, int]]] = {}
        for row in rows:
            for lane, kept in enumerate(row.sequence.lanes[1:], start=1):
                users.setdefault(kept.model, []).append((row, lane))
        place = {id(row): index for index, row in enumerate(drawing)}
        terms = []
        for name, uses in users.items():
            batch = self._pack([row for row, _ in uses], lane=[lane for _, lane in uses])
            pool = self._bank.pools[uses[0][0].sequence.lanes[uses[0][1]].pool]
            logits = self._bank.aligners[name].forward(batch, pool)
            drawn = [(place[id(row)], row.sequence.lanes[lane].strength) for row, lane in uses if row.draws]
            if drawn:
                index, strength = zip(*drawn, strict=True)
                terms.append(
                    AlignerLogits(
                        rows=torch.tensor(index, device=self._device),
                        logits=logits,
                        strength=torch.tensor(strength, dtype=torch.float32, device=self._device),
                    )
                )
        return terms

    def _pack(self, rows: Rows[ScheduledRow], lane: Rows[int]) -> PackedBatch:
        packed = [
            Row(
                token_ids=row.sequence.token_ids[row.start : row.start + row.num_tokens],
                start=row.start,
                pages=row.sequence.lanes[used].pages,
                wants_logits=row.draws,
            )
            for row, used in zip(rows, lane, strict=True)
        ]
        return pack(packed, page_size=self._bank.page_size, device=self._device)


def _to_host(draws: Draws, rows: Rows[ScheduledRow]) -> list[Draw]:
    """Bring a step's results back in a single copy; float64 holds token ids exactly."""
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
    table = torch.cat([singles, draws.top_token.double(), draws.top_log_prob.double()], 1)
    num_top = draws.top_token.shape[1]
    out = []
    for row, values in zip(rows, table.cpu().tolist(), strict=True):
        request = row.sequence.request
        token_id, log_prob, is_bad, kl_p_q, kl_pi_p, ess, mass, is_fallback = values[:8]
        wanted = request.sampling.num_top_log_probs
        ids, log_probs = values[8 : 8 + num_top][:wanted], values[8 + num_top :][:wanted]
        out.append(
            Draw(
                token_id=int(token_id),
                log_prob=log_prob,
                top_log_probs=tuple((int(i), value) for i, value in zip(ids, log_probs, strict=True)),
                telemetry=None
                if request.alignment.is_identity
                else StepTelemetry(kl_p_q, kl_pi_p, ess, mass, bool(is_fallback)),
                is_bad=bool(is_bad),
            )
        )
    return out
