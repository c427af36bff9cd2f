"""A sequence: the mutable life of one choice of a request. Only the engine's step touches it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ram_core.engine.messages import FinishReason, Request


@dataclass(slots=True)
class Lane:
    """A sequence's KV in one model: `pages` of pool `pool`, in order."""

    model: str
    pool: str
    strength: float = 1.0
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Sequence:
    """`token_ids` holds the prompt and what was drawn; the first `num_computed` are in all lanes' KV.

    `lanes[0]` is the proposal's; the others are the aligners', one a term. `slot` is the row of the
    parameter tables for as long as the sequence runs, -1 while it waits.
    """

    request: Request
    index: int
    seed: int
    lanes: list[Lane]
    stop_ids: frozenset[int]
    max_tokens: int
    arrived_s: float
    token_ids: list[int]
    num_computed: int = 0
    slot: int = -1
    has_started: bool = False

    @property
    def num_drawn(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed: the rest of the prompt, or the token drawn last."""
        return len(self.token_ids) - self.num_computed

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Whether drawing `token_id`, already appended, ends the text."""
        if token_id in self.stop_ids:
            return "stop"
        return "length" if self.num_drawn >= self.max_tokens else None
