"""What a sequence contributes to a step. Plain Python: never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from ram_core.engine.sequence import Lane, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Brings all `lanes` of a sequence to `end`; the last of its tokens draws a token if `draws`.

    Lane i reads from `lane_starts[i]`, which is `end` if it has nothing to do; `start` is the least of them.
    """

    sequence: Sequence
    stay: int
    lanes: tuple[Lane, ...]
    lane_starts: tuple[int, ...]
    end: int
    draws: bool

    @property
    def start(self) -> int:
        return min(self.lane_starts)

    @property
    def num_tokens(self) -> int:
        """What the row takes of the step's budget: the tokens of its slowest lane."""
        return self.end - self.start

    @property
    def keeps_end(self) -> bool:
        """Whether what its models say at the end is kept, and what the row draws is void."""
        return self.draws and self.sequence.is_prefill

    @property
    def knows_end(self) -> bool:
        """Whether what the proposal, at least, says at the end was kept before: it reads nothing."""
        return self.draws and self.lane_starts[0] == self.end

    @property
    def is_plain(self) -> bool:
        """Whether it draws after a single token, and all that it needs is computed in its own step."""
        return self.draws and self.num_tokens == 1 and not (self.keeps_end or self.knows_end)

    @property
    def is_current(self) -> bool:
        """Whether the sequence is still in the stay that the row was planned for."""
        return self.sequence.stay == self.stay
