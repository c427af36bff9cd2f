"""What became of one request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Failure:
    """Why a request does not count as answered; `kind` and `code` are what failures are counted by."""

    kind: str
    code: str = ""
    message: str = ""

    @property
    def label(self) -> str:
        return f"{self.kind} {self.code}".strip()


@dataclass(frozen=True)
class Record:
    """One request's life; times are in seconds since the run began, chunks are those that hold content."""

    index: int
    model: str
    num_asked_tokens: int
    sent_s: float
    ended_s: float
    planned_s: float | None = None
    chunk_times_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    failure: Failure | None = None

    @property
    def is_ok(self) -> bool:
        return self.failure is None

    @property
    def num_output_tokens(self) -> int:
        """As the server's usage says; where it says nothing, a chunk counts as a token."""
        return len(self.chunk_times_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        """Until the first chunk with content; every answered request has one."""
        return self.chunk_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between chunks with content."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """The time of an output token after the first; None where there is no other."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def lag_s(self) -> float | None:
        """How much later than planned the request left; None in a closed loop."""
        return None if self.planned_s is None else self.sent_s - self.planned_s
