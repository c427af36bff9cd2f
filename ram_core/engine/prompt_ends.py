"""What models say after a prompt that they read before the request comes, kept for a later step."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ram_core.engine.layout import lanes_by_use
from ram_core.engine.rows import ScheduledRow
from ram_core.resampling import AlignerLogits


@dataclass(frozen=True, slots=True)
class PromptEnds:
    """The rows of a step that draw, of which some keep logits, or know them.

    `parts` are the lanes whose logits each model of the step computes, in their order.
    """

    drawing: tuple[ScheduledRow, ...]
    parts: tuple[tuple[tuple[ScheduledRow, int], ...], ...]

    @classmethod
    def of(cls, rows: Rows[ScheduledRow]) -> PromptEnds | None:
        """None if it is a step like most others, of which every row has its logits for itself."""
        if not any(row.keeps_end or row.knows_end for row in rows):
            return None
        parts = [tuple(use for use in busy if use[0].draws) for busy in lanes_by_use(rows).values()]
        return cls(tuple(row for row in rows if row.draws), tuple(parts))

    def keep(self, computed: Rows[Float[Tensor, "logit vocab"]]) -> None:
        """Keep what a later step asks for; `computed` are each model's logits, in the order of `parts`."""
        for part, logits in zip(self.parts, computed, strict=True):
            for (row, lane), line in zip(part, logits, strict=True):
                if row.keeps_end:
                    row.sequence.end_logits[row.lanes[lane].model] = line.clone()

    def complete(self, computed: Float[Tensor, "logit vocab"] | None) -> Float[Tensor, "row vocab"]:
        """The proposal's logits of all rows; `computed` are those of whom they are not known, in order."""
        fresh = iter(() if computed is None else computed)
        lines = [_known(row, 0) if 0 in _known_lanes(row) else next(fresh) for row in self.drawing]
        return torch.stack(lines)

    def known_terms(self) -> list[AlignerLogits]:
        """What aligners have said before of rows that draw now."""
        terms = []
        for index, row in enumerate(self.drawing):
            for lane in _known_lanes(row):
                if lane and not row.keeps_end:
                    logits = _known(row, lane)[None]
                    strength = logits.new_tensor([row.lanes[lane].strength], dtype=torch.float32)
                    terms.append(AlignerLogits(torch.tensor([index], device=logits.device), logits, strength))
        return terms

    def forget(self) -> None:
        """The step is under way: what was known is not needed any more."""
        for row in self.drawing:
            if not row.keeps_end:
                row.sequence.end_logits.clear()


def _known_lanes(row: ScheduledRow) -> list[int]:
    """The lanes of a row that draws whose models have read everything before."""
    return [lane for lane, start in enumerate(row.lane_starts) if start == row.end]


def _known(row: ScheduledRow, lane: int) -> Tensor:
    logits = row.sequence.end_logits[row.lanes[lane].model]
    assert isinstance(logits, Tensor), "whoever read the prompt has kept them"
    return logits
