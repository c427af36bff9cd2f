"""What the proposal says after a prompt that it reads before the request comes, kept for a later step."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ram_core.engine.rows import ScheduledRow


@dataclass(frozen=True, slots=True)
class PromptEnds:
    """The rows of a step that draw, of which some keep the proposal's logits, or know them."""

    drawing: tuple[ScheduledRow, ...]

    @classmethod
    def of(cls, rows: Rows[ScheduledRow]) -> PromptEnds | None:
        """None if it is a step like most others, of which every row has its logits for itself."""
        if not any(row.keeps_end or row.knows_end for row in rows):
            return None
        return cls(tuple(row for row in rows if row.draws))

    def complete(self, computed: Float[Tensor, "logit vocab"] | None) -> Float[Tensor, "row vocab"]:
        """Logits of all rows; `computed` are of those that do not know them, in their order."""
        fresh = iter(() if computed is None else computed)
        found = []
        for row in self.drawing:
            logits = row.sequence.end_logits if row.knows_end else next(fresh)
            assert isinstance(logits, Tensor), "whoever read the prompt has kept them"
            if row.keeps_end:
                row.sequence.end_logits = logits.clone()
            found.append(logits)
        return torch.stack(found)

    def forget(self) -> None:
        """The step is under way: what was known is not needed any more."""
        for row in self.drawing:
            if row.knows_end:
                row.sequence.end_logits = None
