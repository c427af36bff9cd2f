"""Who needs versions in memory, and what is done about it, in order of arrival. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ram_core.aligners.catalogue import Catalogue, Shares
from ram_core.aligners.memory import Room
from ram_core.aligners.states import (
    Action,
    Free,
    Grant,
    Promoted,
    PromotionFailed,
    Refuse,
    ResolvedTerm,
    StartLoad,
    StartVerify,
    State,
    Version,
    VersionKey,
)
from ram_core.errors import AlignerUnavailable, RamError


@dataclass(frozen=True, slots=True)
class Asking:
    """A request that waits."""

    request_id: str
    chosen: tuple[VersionKey, ...]
    terms: tuple[ResolvedTerm, ...]


@dataclass(frozen=True, slots=True)
class Moving:
    """A promotion, or a step back, that waits for its versions."""

    name: str
    shares: Shares
    is_step_back: bool


@dataclass(frozen=True, slots=True)
class Loading:
    """A load that an operator asked for."""

    key: VersionKey


@dataclass(frozen=True, slots=True)
class Demand:
    """Somebody who needs versions in memory, all at the same time; past the deadline no more."""

    what: Asking | Moving | Loading
    keys: frozenset[VersionKey]
    deadline_s: float | None = None

    @property
    def id(self) -> tuple[str, object]:
        """What there is one demand of: a request, a promotion of a name, a load of a version."""
        match self.what:
            case Asking(request_id):
                return "request", request_id
            case Moving(name):
                return "move", name
            case Loading(key):
                return "load", key


class Demands:
    """All demands, and the requests whose demands were met; changes versions, and says what is to be done."""

    def __init__(
        self, catalogue: Catalogue, *, memory_bytes: int, max_jobs: int, clock: Callable[[], float]
    ) -> None:
        self.leases: dict[str, frozenset[VersionKey]] = {}
        self._catalogue = catalogue
        self._memory_bytes = memory_bytes
        self._max_jobs = max_jobs
        self._clock = clock
        self._pending: dict[tuple[str, object], Demand] = {}

    def __iter__(self) -> Iterator[Demand]:
        return iter(self._pending.values())

    def add(self, demand: Demand) -> None:
        """One more, behind all others; one that is there already keeps its place."""
        self._pending[demand.id] = demand

    def move_of(self, name: str) -> Moving | None:
        """The promotion of an aligner that still waits."""
        demand = self._pending.get(("move", name))
        return demand.what if demand is not None and isinstance(demand.what, Moving) else None

    def drop_request(self, request_id: str) -> None:
        """A request does not wait any more, if it did."""
        self._pending.pop(("request", request_id), None)

    def drop_load(self, key: VersionKey) -> None:
        """An operator's load is not wanted any more, if it was."""
        self._pending.pop(("load", key), None)

    def drop_move(self, name: str, reason: str) -> list[Action]:
        """A promotion is off, if there was one that waited."""
        if self._pending.pop(("move", name), None) is None:
            return []
        return [PromotionFailed(name, AlignerUnavailable(reason))]

    def refuse_requests(self, name: str, error: RamError) -> list[Action]:
        """Nobody waits for an aligner any more."""
        refused = [
            demand.what
            for demand in self
            if isinstance(demand.what, Asking)
            and any(key.name == name for key in (*demand.what.chosen, *demand.keys))
        ]
        for asking in refused:
            self.drop_request(asking.request_id)
        return [Refuse(asking.request_id, error) for asking in refused]

    @property
    def num_jobs(self) -> int:
        """Verifications and loads under way."""
        return sum(version.state is State.VERIFYING or version.is_started for version in self._catalogue)

    def settle(self) -> list[Action]:
        """Answer who can be answered, free what nobody needs, and start what is needed."""
        actions = [action for demand in list(self) for action in self._answer(demand)]
        wanted = frozenset(key for demand in self for key in demand.keys)
        for version in list(self._catalogue):
            if version.is_leaving and version.is_loaded:
                version.state = State.DRAINING
                if not version.num_references and version.key not in wanted:
                    actions.append(free(version))
            elif version.is_queued and version.key not in wanted:
                version.rest()
            if version.is_withdrawn and not version.is_in_memory and not version.is_busy:
                self._catalogue.forget(version.key)
        return actions + self._start() if self._pending else actions

    def _answer(self, demand: Demand) -> list[Action]:
        """What a demand comes to now: nothing while it waits."""
        error = self._refusal(demand)
        if error is None and not all(self._catalogue.version(key).is_loaded for key in demand.keys):
            return []
        del self._pending[demand.id]
        if error is not None:
            return self._refuse(demand.what, error)
        now_s = self._clock()
        for key in demand.keys:
            self._catalogue.version(key).last_used_s = now_s
        match demand.what:
            case Asking(request_id, chosen, terms):
                self.leases[request_id] = demand.keys
                for key in demand.keys:
                    self._catalogue.version(key).num_references += 1
                    if key.version in self._catalogue.entry(key.name).shares:
                        self._keep(key)
                return [Grant(request_id, chosen, terms)]
            case Moving(name, shares, is_step_back):
                return [self._flip(name, shares, is_step_back=is_step_back)]
            case Loading(key):
                self._keep(key)
                return []

    def _refusal(self, demand: Demand) -> RamError | None:
        """Why a demand cannot be met any more."""
        for key in demand.keys:
            version = self._catalogue.find(key)
            if version is None or (version.is_withdrawn and not (version.is_loaded or version.is_started)):
                return AlignerUnavailable(f"The aligner `{key}` has been removed.")
            if version.state is State.FAILED or (version.is_freeing and version.reason):
                return AlignerUnavailable(f"The aligner `{key}` could not be loaded: {version.reason}.")
        pinned = [version for version in self._catalogue if version.is_pinned and version.held_bytes]
        kept = sum(version.held_bytes for version in pinned if version.key not in demand.keys)
        need = sum(self._catalogue.version(key).need_bytes for key in demand.keys)
        if need and need + kept > self._memory_bytes:
            return AlignerUnavailable(
                f"{', '.join(map(str, sorted(demand.keys)))}: {need} bytes are needed at once, and {kept} of "
                f"the {self._memory_bytes} for aligners are pinned."
            )
        if demand.deadline_s is not None and self._clock() >= demand.deadline_s:
            return AlignerUnavailable(
                f"{', '.join(map(str, sorted(demand.keys)))}: not in memory within the time to wait."
            )
        return None

    def _refuse(self, what: Asking | Moving | Loading, error: RamError) -> list[Action]:
        match what:
            case Asking(request_id):
                return [Refuse(request_id, error)]
            case Moving(name):
                return [PromotionFailed(name, error)]
            case Loading(key):
                # Nobody waits for an answer: the version itself tells what became of it.
                version = self._catalogue.find(key)
                if version is not None and not (version.is_busy or version.is_loaded):
                    reason = version.reason or str(error)
                    version.is_pinned = False
                    version.fail(reason, self._clock())
                return []

    def _flip(self, name: str, shares: Shares, *, is_step_back: bool) -> Promoted:
        """Let other versions answer new requests, from one moment to the next."""
        entry = self._catalogue.entry(name)
        for left in entry.move_to(shares, is_step_back=is_step_back):
            leave(entry.versions[left])
        for version in shares:
            self._keep(VersionKey(name, version))
        return Promoted(name, shares)

    def _keep(self, key: VersionKey) -> None:
        version = self._catalogue.version(key)
        version.is_leaving = False
        if version.is_loaded:
            version.state = State.RESIDENT

    def _start(self) -> list[Action]:
        """Verify and load what is needed, the oldest demand's first, in as much memory as there is."""
        actions: list[Action] = []
        room = Room(self._catalogue, self._memory_bytes)
        num_jobs = self.num_jobs
        protected: set[VersionKey] = set()
        for demand in self:
            protected |= demand.keys
            for key in sorted(demand.keys):
                version = self._catalogue.version(key)
                if num_jobs >= self._max_jobs:
                    return actions
                if version.is_busy or version.is_loaded:
                    continue
                if version.is_queued:
                    is_free, victims = room.reserve(version.need_bytes, protected)
                    actions += [free(victim) for victim in victims]
                    if not is_free:
                        continue
                    version.is_started, version.held_bytes = True, version.need_bytes
                    actions.append(StartLoad(key, version.source, version.need_bytes))
                else:
                    version.state, version.progress = State.VERIFYING, 0.0
                    actions.append(StartVerify(key, version.source))
                num_jobs += 1
        return actions


def leave(version: Version) -> None:
    """Let a version go as soon as nobody needs it, if it is in memory or about to be, and not pinned."""
    if not (version.is_pinned or version.is_virtual):
        version.is_leaving = version.is_loaded or version.is_started


def free(version: Version) -> Free:
    """Tell the executor to give a version's memory back; from here on nobody can begin on it."""
    assert version.is_loaded
    assert not version.num_references
    version.state, version.is_freeing = State.DRAINING, True
    return Free(version.key)
