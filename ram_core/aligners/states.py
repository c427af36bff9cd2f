"""What the registry knows of a version, and what it says: to its executor, and to people. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ram_core.aligners.manifest import OWN_TERMS, Term
from ram_core.errors import RamError


class State(StrEnum):
    """Where a version is on its way. A preset has no weights of its own, and is always resident."""

    ABSENT = "absent"
    VERIFYING = "verifying"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"
    EVICTED = "evicted"
    FAILED = "failed"


class VersionKey(NamedTuple):
    """A version of an aligner, by names."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(slots=True)
class Version:
    """One version, as the registry changes it.

    `need_bytes` is what it needs, known once verified; `held_bytes` what it holds or has been promised.
    `is_started` tells a load under way from one that waits for its turn or for memory. `is_leaving`: to be
    freed as soon as nobody needs it. `is_freeing`: the executor has been told to. `is_withdrawn`: to be
    forgotten when it is not in memory any more.
    """

    key: VersionKey
    source: str
    terms: tuple[Term, ...] = OWN_TERMS
    strength: float = 1.0
    state: State = State.ABSENT
    reason: str = ""
    progress: float = 0.0
    device: str = ""
    need_bytes: int = 0
    held_bytes: int = 0
    num_references: int = 0
    last_used_s: float = 0.0
    failed_at_s: float = 0.0
    was_resident: bool = False
    is_pinned: bool = False
    is_started: bool = False
    is_leaving: bool = False
    is_freeing: bool = False
    is_withdrawn: bool = False

    @property
    def is_virtual(self) -> bool:
        """Whether it is a preset, with nothing to load."""
        return not any(term.is_own for term in self.terms)

    @property
    def is_loaded(self) -> bool:
        """Whether a request can begin on it now."""
        return self.state in (State.RESIDENT, State.DRAINING) and not self.is_freeing

    @property
    def is_in_memory(self) -> bool:
        """Whether there are weights of it that a request can begin on."""
        return self.is_loaded and not self.is_virtual

    @property
    def is_busy(self) -> bool:
        """Whether the executor is at work on it: verifying, loading or freeing."""
        return self.state is State.VERIFYING or self.is_started or self.is_freeing

    @property
    def is_queued(self) -> bool:
        """Whether it is verified, and waits for its turn or for memory."""
        return self.state is State.LOADING and not self.is_started

    @property
    def is_startable(self) -> bool:
        """Whether it can be verified or loaded now: it is neither in memory nor being worked on."""
        return not (self.is_busy or self.is_loaded)

    def rest(self) -> None:
        """Be nowhere: not in memory, and nothing under way."""
        self.state = State.EVICTED if self.was_resident else State.ABSENT
        self.reason, self.progress, self.device, self.held_bytes = "", 0.0, "", 0
        self.is_started = self.is_leaving = self.is_freeing = False

    def fail(self, reason: str, now_s: float) -> None:
        """Be nowhere, for a reason."""
        self.rest()
        self.state, self.reason, self.failed_at_s = State.FAILED, reason, now_s


@dataclass(frozen=True, slots=True)
class AskedAligner:
    """An aligner as a request names it. Without a strength it has its version's; `scale` multiplies it."""

    name: str
    strength: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ResolvedTerm:
    """One factor of a request's importance weight: a model of a version, and its exponent.

    `part` is "." for the version's own model, else a directory below it.
    """

    key: VersionKey
    part: str
    strength: float


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a request's aligners come to.

    `chosen` has the version of each aligner that it named, `strengths` how strongly each pulls, and `terms`
    the models and exponents: one for each model.
    """

    chosen: tuple[VersionKey, ...]
    strengths: tuple[float, ...]
    terms: tuple[ResolvedTerm, ...]


@dataclass(frozen=True, slots=True)
class StartVerify:
    """Look whether a version's files are sound; tell `verified` or `failed`."""

    key: VersionKey
    source: str


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Load a version into at most `num_bytes`; tell `loaded` or `failed`, and `progressed` meanwhile."""

    key: VersionKey
    source: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Free:
    """Give a version's memory back, as no request uses it; tell `freed`."""

    key: VersionKey


@dataclass(frozen=True, slots=True)
class Grant:
    """A request may begin; it keeps its versions until released."""

    request_id: str
    resolution: Resolution


@dataclass(frozen=True, slots=True)
class Refuse:
    """A request that waited cannot begin."""

    request_id: str
    error: RamError


@dataclass(frozen=True, slots=True)
class Promoted:
    """New requests for an aligner go to these versions from now on."""

    name: str
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PromotionFailed:
    """A promotion is off, and nothing has changed."""

    name: str
    error: RamError


Action = StartVerify | StartLoad | Free | Grant | Refuse | Promoted | PromotionFailed


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """What can be seen of a version; `waits_for` is "turn", "memory" or ""."""

    key: VersionKey
    source: str
    state: State
    reason: str
    waits_for: str
    progress: float
    num_bytes: int
    device: str
    num_references: int
    last_used_s: float
    is_pinned: bool
    is_preset: bool

    @property
    def is_idle(self) -> bool:
        """Whether it is not in memory, and nothing is under way to bring it there."""
        is_out = self.state in (State.ABSENT, State.EVICTED, State.FAILED)
        return is_out and not self.waits_for


@dataclass(frozen=True, slots=True)
class AlignerStatus:
    """What can be seen of an aligner: who answers, who is about to, who did before, and all versions."""

    name: str
    shares: Mapping[str, float]
    next_shares: Mapping[str, float] | None
    earlier_shares: tuple[Mapping[str, float], ...]
    versions: tuple[VersionStatus, ...]
