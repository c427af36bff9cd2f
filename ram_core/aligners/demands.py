"""Who needs versions in memory, and what is done about it, in order of arrival. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    Resolution,
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
    resolution: Resolution


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
class Refusal:
    """Why a demand cannot be met: in words for whoever asks, and for operators, who may know everything."""

    words: str
    detail: str

    def for_request(self, resolution: Resolution) -> AlignerUnavailable:
        """What a request hears: only of what it named itself, as it may not know of a preset's parts."""
        named = ", ".join(f"`{key.name}`" for key in resolution.chosen)
        return AlignerUnavailable(f"Aligner {named}: {self.words}.")


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
    """All demands, and the requests whose demands were met; changes versions, and says what is to be done.

    While not `is_open`, nothing is begun: there is no executor. `is_short` says that somebody waits until
    others leave memory.
    """

    def __init__(
        self, catalogue: Catalogue, *, memory_bytes: int, max_jobs: int, clock: Callable[[], float]
    ) -> None:
        self.leases: dict[str, frozenset[VersionKey]] = {}
        self.memory_bytes = memory_bytes
        self.is_open = True
        self.is_short = False
        self._catalogue = catalogue
        self._max_jobs = max_jobs
        self._clock = clock
        self._pending: dict[tuple[str, object], Demand] = {}

    def __iter__(self) -> Iterator[Demand]:
        return iter(self._pending.values())

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum(isinstance(demand.what, Asking) for demand in self)

    def grant(self, request_id: str, resolution: Resolution, keys: frozenset[VersionKey]) -> Grant:
        """Let a request begin on versions that are all in memory."""
        now_s = self._clock()
        self.leases[request_id] = keys
        for key in keys:
            version = self._catalogue.version(key)
            version.num_references += 1
            version.last_used_s = now_s
            if key.version in self._catalogue.entry(key.name).shares:
                self._keep(version)
        return Grant(request_id, resolution)

    def leave(self, version: Version) -> None:
        """Let a version go as soon as nobody needs it, if it is, or will be, in memory and is not pinned."""
        if not (version.is_pinned or version.is_virtual):
            version.is_leaving = version.is_loaded or version.is_started
            self._catalogue.restless.add(version.key)

    def add(self, demand: Demand) -> None:
        """One more, behind all others; one that is there already keeps its place."""
        self._pending[demand.id] = demand

    def move_of(self, name: str) -> Moving | None:
        """The promotion of an aligner that still waits."""
        demand = self._pending.get(("move", name))
        return demand.what if demand is not None and isinstance(demand.what, Moving) else None

    def resolution_of(self, request_id: str) -> Resolution:
        """What a request will get that waits."""
        demand = self._pending["request", request_id]
        assert isinstance(demand.what, Asking)
        return demand.what.resolution

    def drop_request(self, request_id: str) -> bool:
        """A request does not wait any more; whether it did."""
        return self._pending.pop(("request", request_id), None) is not None

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
            and any(key.name == name for key in (*demand.what.resolution.chosen, *demand.keys))
        ]
        for asking in refused:
            self.drop_request(asking.request_id)
        return [Refuse(asking.request_id, error) for asking in refused]

    @property
    def num_jobs(self) -> int:
        """Verifications and loads under way."""
        return sum(version.is_started or version.state is State.VERIFYING for version in self._catalogue)

    def settle(self) -> list[Action]:
        """Answer who can be answered, free what nobody needs, and start what is needed."""
        actions: list[Action] = []
        self.is_short = False
        if self._pending:
            pinned = [version for version in self._catalogue if version.is_pinned and version.held_bytes]
            actions = [action for demand in list(self) for action in self._answer(demand, pinned)]
        if self._catalogue.restless:
            wanted = frozenset(key for demand in self for key in demand.keys)
            for key in sorted(self._catalogue.restless):
                actions += self._calm(self._catalogue.version(key), is_wanted=key in wanted)
        return actions + self._start() if self._pending and self.is_open else actions

    def _calm(self, version: Version, *, is_wanted: bool) -> list[Action]:
        """Free, put to rest or forget a version, if that is what it waits for, and can be."""
        actions: list[Action] = []
        if version.is_leaving and version.is_loaded:
            version.state = State.DRAINING
            if not version.num_references and not is_wanted:
                actions.append(free(version))
        elif version.is_queued and not is_wanted:
            version.rest()
        if version.is_withdrawn and not version.is_in_memory and not version.is_busy:
            self._catalogue.forget(version.key)
        elif not (version.is_leaving or version.is_queued or version.is_withdrawn):
            self._catalogue.restless.discard(version.key)
        return actions

    def _answer(self, demand: Demand, pinned: Iterable[Version]) -> list[Action]:
        """What a demand comes to now: nothing while it waits."""
        versions = [self._catalogue.find(key) for key in demand.keys]
        if not all(version is not None and version.is_loaded for version in versions):
            refusal = self._refusal(demand, pinned)
            if refusal is None:
                return []
            del self._pending[demand.id]
            return self._refuse(demand.what, refusal)
        del self._pending[demand.id]
        match demand.what:
            case Asking(request_id, resolution):
                return [self.grant(request_id, resolution, demand.keys)]
            case Moving(name, shares, is_step_back):
                return [self._flip(name, shares, is_step_back=is_step_back)]
            case Loading(key):
                version = self._catalogue.version(key)
                version.last_used_s = self._clock()
                self._keep(version)
                return []

    def _refusal(self, demand: Demand, pinned: Iterable[Version]) -> Refusal | None:
        """Why a demand cannot be met any more."""
        for key in demand.keys:
            version = self._catalogue.find(key)
            if version is None or (version.is_withdrawn and not (version.is_loaded or version.is_started)):
                return Refusal("it has been removed", f"The aligner `{key}` has been removed.")
            if version.state is State.FAILED or (version.is_freeing and version.reason):
                return failure_of(version)
        kept = sum(version.held_bytes for version in pinned if version.key not in demand.keys)
        need = sum(self._catalogue.version(key).need_bytes for key in demand.keys)
        names = ", ".join(map(str, sorted(demand.keys)))
        if need and need + kept > self.memory_bytes:
            return Refusal(
                "there is no room for it in memory",
                f"{names}: {need} bytes are needed at once, and {kept} of the {self.memory_bytes} for "
                "aligners are pinned.",
            )
        if demand.deadline_s is not None and self._clock() >= demand.deadline_s:
            text = "not in memory within the time to wait"
            return Refusal(text, f"{names}: {text}.")
        return None

    def _refuse(self, what: Asking | Moving | Loading, refusal: Refusal) -> list[Action]:
        error = AlignerUnavailable(refusal.detail)
        match what:
            case Asking(request_id, resolution):
                return [Refuse(request_id, refusal.for_request(resolution))]
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
        for left in self._catalogue.move(name, shares, is_step_back=is_step_back):
            self.leave(left)
        for each in shares:
            version = self._catalogue.version(VersionKey(name, each))
            version.last_used_s = self._clock()
            self._keep(version)
        return Promoted(name, shares)

    @staticmethod
    def _keep(version: Version) -> None:
        version.is_leaving = False
        if version.is_loaded:
            version.state = State.RESIDENT

    def _start(self) -> list[Action]:
        """Verify and load what is needed, the oldest demand's first, in as much memory as there is."""
        missing = {key for demand in self for key in demand.keys if self._catalogue.version(key).is_startable}
        if not missing:
            return []
        actions: list[Action] = []
        room = Room(self._catalogue, self.memory_bytes)
        num_jobs = self.num_jobs
        protected: set[VersionKey] = set()
        for demand in self:
            protected |= demand.keys
            for key in sorted(demand.keys):
                version = self._catalogue.version(key)
                if num_jobs >= self._max_jobs:
                    return actions
                if not version.is_startable:
                    continue
                if version.is_queued:
                    is_free, victims = room.reserve(version.need_bytes, protected)
                    actions += [free(victim) for victim in victims]
                    if not is_free:
                        self.is_short = True
                        continue
                    version.is_started, version.held_bytes = True, version.need_bytes
                    actions.append(StartLoad(key, version.source, version.need_bytes))
                else:
                    version.state, version.progress = State.VERIFYING, 0.0
                    actions.append(StartVerify(key, version.source))
                num_jobs += 1
        return actions


def failure_of(version: Version) -> Refusal:
    """Why nobody can have a version that has failed."""
    return Refusal(
        "it could not be loaded", f"The aligner `{version.key}` could not be loaded: {version.reason}."
    )


def free(version: Version) -> Free:
    """Tell the executor to give a version's memory back; from here on nobody can begin on it."""
    assert version.is_loaded
    assert not version.num_references
    version.state, version.is_freeing = State.DRAINING, True
    return Free(version.key)
