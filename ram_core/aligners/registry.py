"""The registry: which versions are in memory, who waits for which, and what is to be done about it.

It decides and does nothing: every method returns actions for an executor, in order, and is told outcomes.
What is wanted are demands, in order of arrival: requests, promotions, and loads that an operator asked for. A
version is verified and loaded while a demand needs it, at most `max_jobs` at once. Where memory is short, the
least recently used version goes that nobody uses, that is not pinned, and that neither this demand nor an
earlier one needs; so the oldest demand always gets on. One that fits at once need not wait for a larger one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ram_core.aligners.catalogue import Catalogue, Entry, Shares, normalised
from ram_core.aligners.demands import Asking, Demand, Demands, Loading, Moving, failure_of, free
from ram_core.aligners.manifest import OWN_TERMS, Term
from ram_core.aligners.states import (
    Action,
    AlignerStatus,
    AskedAligner,
    Resolution,
    State,
    Version,
    VersionKey,
    VersionStatus,
)
from ram_core.errors import Conflict, QueueFull, UnknownModel

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """`memory_bytes` for weights; `max_jobs` verified or loaded at once; `max_waiting` requests that wait.

    A request for a version that failed less than `retry_failed_s` ago is refused at once.
    """

    memory_bytes: int
    max_jobs: int = 1
    max_waiting: int = 256
    retry_failed_s: float = 30.0


class AlignerRegistry:
    """All aligners, by name and version. For one thread; `clock` gives seconds that only grow."""

    def __init__(self, limits: RegistryLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._catalogue = Catalogue()
        self._demands = Demands(
            self._catalogue, memory_bytes=limits.memory_bytes, max_jobs=limits.max_jobs, clock=clock
        )

    # What is known.

    def add(
        self,
        name: str,
        version: str,
        source: str,
        *,
        terms: tuple[Term, ...] = OWN_TERMS,
        strength: float = 1.0,
    ) -> list[Action]:
        """Make a version known, or known anew after its files have changed; loads nothing.

        The first version of a name answers its requests at once; later ones wait for a promotion. A preset
        is a version all of whose terms name other aligners.

        Raises:
            InvalidRequest: a name, version, term or strength that cannot be, or other terms than in memory.
        """
        self._catalogue.add(VersionKey(name, version), source, terms, strength)
        return self._demands.settle()

    def withdraw(self, name: str, version: str) -> list[Action]:
        """Its files are gone: it is forgotten, but not before it leaves memory by itself."""
        found = self._catalogue.entry(name).known(version)
        self._withdraw(found)
        return self._demands.settle()

    def remove(self, name: str) -> list[Action]:
        """Forget an aligner: new requests do not find it, running ones finish, waiting ones are refused."""
        entry = self._catalogue.entry(name)
        reason = f"There is no aligner `{name}` any more."
        actions = self._demands.drop_move(name, reason)
        actions += self._demands.refuse_requests(name, UnknownModel(reason))
        self._catalogue.silence(name)
        for version in entry.versions.values():
            self._withdraw(version)
            self._let_go(version)
        return actions + self._demands.settle()

    # What operators ask for.

    def load(self, name: str, version: str | None = None, *, is_pinned: bool = False) -> list[Action]:
        """Bring a version, or those that answer new requests, into memory; `is_pinned` keeps them there."""
        for found in self._asked(name, version):
            found.is_pinned = found.is_pinned or is_pinned
            self._want(found)
        return self._demands.settle()

    def unload(self, name: str, version: str | None = None) -> list[Action]:
        """Free a version, or all of a name, once nobody uses it.

        A request that comes before then keeps it, one that comes after loads it again.
        """
        entry = self._catalogue.entry(name)
        for found in [entry.known(version)] if version else list(entry.versions.values()):
            self._let_go(found)
        return self._demands.settle()

    def unpin(self, name: str, version: str | None = None) -> list[Action]:
        """Let a version, or all of a name, be evicted again."""
        entry = self._catalogue.entry(name)
        for found in [entry.known(version)] if version else list(entry.versions.values()):
            found.is_pinned = False
        return self._demands.settle()

    def tune(self, name: str, strength: float) -> None:
        """Give an aligner another strength, for requests to come that say none; raises `UnknownModel`."""
        for version in self._catalogue.entry(name).versions.values():
            version.strength = strength

    def promote(self, name: str, weights: str | Mapping[str, float]) -> list[Action]:
        """Let a version, or several by weight, answer all new requests, as soon as they are all in memory.

        It takes the place of a promotion that still waits. If one of them cannot be loaded, nothing changes.

        Raises:
            UnknownModel, InvalidRequest: no such aligner or version, or a weight that is not positive.
        """
        shares = normalised({weights: 1.0} if isinstance(weights, str) else weights)
        return self._move(self._catalogue.entry(name), shares, is_step_back=False)

    def rollback(self, name: str) -> list[Action]:
        """Take the last promotion back: the one that still waits, or else the one that was made last.

        Raises:
            UnknownModel, Conflict: no such aligner, or nothing to take back.
        """
        entry = self._catalogue.entry(name)
        if taken_back := self._demands.drop_move(name, f"The promotion of `{name}` was taken back."):
            return taken_back + self._demands.settle()
        if not entry.earlier:
            raise Conflict(f"`{name}` has no promotion that could be taken back.")
        return self._move(entry, entry.earlier[-1], is_step_back=True)

    # What requests ask for.

    def acquire(
        self,
        request_id: str,
        aligners: Iterable[AskedAligner],
        *,
        sticky_key: str,
        max_wait_s: float,
    ) -> list[Action]:
        """Choose versions for a request, and `Grant` or `Refuse` it, now or after later events.

        Requests of one `sticky_key` (a user, a tenant) get the same versions while shares stay the same.

        Raises:
            UnknownModel, InvalidRequest: a name that nobody answers to, or a senseless sum of presets.
            AlignerUnavailable: a version has failed a moment ago.
            QueueFull: too many requests wait already.
        """
        assert request_id not in self._demands.leases
        resolution = self._catalogue.resolve(aligners, sticky_key)
        keys = frozenset(term.key for term in resolution.terms)
        if all(self._catalogue.version(key).is_loaded for key in keys):
            # The common case: nobody else is concerned.
            return [self._demands.grant(request_id, resolution, keys)]
        self._require_hope(keys, resolution)
        num_waiting = self._demands.num_waiting
        if num_waiting >= self.limits.max_waiting:
            raise QueueFull(
                f"{num_waiting} requests wait for aligners already.", retry_after_s=_RETRY_AFTER_S
            )
        self._demands.add(Demand(Asking(request_id, resolution), keys, self._clock() + max_wait_s))
        return self._demands.settle()

    def awaited_by(self, request_id: str) -> Resolution:
        """What a request will get that waits."""
        return self._demands.resolution_of(request_id)

    def release(self, request_id: str) -> list[Action]:
        """A request has ended, or does not want to wait any longer."""
        is_news = self._demands.drop_request(request_id)
        for key in self._demands.leases.pop(request_id, ()):
            version = self._catalogue.version(key)
            version.num_references -= 1
            version.last_used_s = self._clock()
            # Only then anybody else is concerned.
            is_news |= not version.num_references and (version.is_leaving or self._demands.is_short)
        return self._demands.settle() if is_news else []

    def tick(self) -> list[Action]:
        """Time has passed: refuse whoever waited too long."""
        return self._demands.settle()

    # What the executor tells.

    def progressed(self, key: VersionKey, fraction: float) -> None:
        """How far the verification or the load is, from 0 to 1."""
        self._catalogue.version(key).progress = fraction

    def verified(self, key: VersionKey, need_bytes: int) -> list[Action]:
        """A version is sound, and will need so much memory at most."""
        version = self._catalogue.version(key)
        assert version.state is State.VERIFYING
        version.state, version.progress, version.need_bytes = State.LOADING, 0.0, need_bytes
        self._catalogue.restless.add(key)
        if need_bytes > self.limits.memory_bytes:
            reason = f"it needs {need_bytes} bytes, and all aligners together have {self.limits.memory_bytes}"
            version.fail(reason, self._clock())
        return self._demands.settle()

    def loaded(self, key: VersionKey, num_bytes: int, device: str) -> list[Action]:
        """A version is in memory. One that took more than it was promised, and too much, is freed again."""
        version = self._catalogue.version(key)
        assert version.is_started
        excess = num_bytes - version.held_bytes
        version.state, version.is_started, version.was_resident = State.RESIDENT, False, True
        version.progress, version.device, version.last_used_s = 1.0, device, self._clock()
        version.held_bytes = version.need_bytes = num_bytes
        if excess > 0 and self.held_bytes > self.limits.memory_bytes:
            version.reason = f"it took {num_bytes} bytes, {excess} more than it had said"
            return [free(version), *self._demands.settle()]
        return self._demands.settle()

    def failed(self, key: VersionKey, reason: str) -> list[Action]:
        """A version could not be verified or loaded, and holds no memory; whoever waits for it is refused."""
        version = self._catalogue.version(key)
        assert version.state is State.VERIFYING or version.is_started
        version.fail(reason, self._clock())
        return self._demands.settle()

    def freed(self, key: VersionKey) -> list[Action]:
        """A version's memory has been given back."""
        version = self._catalogue.version(key)
        assert version.is_freeing
        if version.reason:
            version.fail(version.reason, self._clock())
        else:
            version.rest()
        return self._demands.settle()

    def lost(self) -> list[Action]:
        """The executor's memory is gone, its loads with it; verifications go on.

        Running requests have ended, waiting ones go on waiting. What was there is wanted again, the last used
        first. Until `began`, nothing is loaded or verified, and outcomes of loads must not be told any more.
        """
        self._demands.is_open = False
        self._demands.leases.clear()
        versions = [version for version in self._catalogue if not version.is_virtual]
        for version in sorted(versions, key=lambda each: -each.last_used_s):
            was_there = (version.is_loaded and not version.is_leaving) or version.is_pinned
            version.num_references = 0
            if version.is_started:
                version.is_started, version.held_bytes, version.is_leaving = False, 0, False
                self._catalogue.restless.add(version.key)
            elif version.is_loaded or version.is_freeing:
                version.rest()
            if was_there and not version.is_withdrawn:
                self._want(version)
        return self._demands.settle()

    def began(
        self,
        memory_bytes: int,
        there: Mapping[VersionKey, int],
        failed: Mapping[VersionKey, str],
        device: str,
    ) -> list[Action]:
        """There is an executor, or again one, with so much memory for aligners, and some in it already.

        `there` says how many bytes they take, all known; those that nobody wants are freed. `failed` has
        those that it should have begun with, and could not.
        """
        self.limits = dataclasses.replace(self.limits, memory_bytes=memory_bytes)
        self._demands.memory_bytes = memory_bytes
        self._demands.is_open = True
        wanted = {key for demand in self._demands for key in demand.keys}
        for key, num_bytes in there.items():
            version = self._catalogue.version(key)
            version.rest()
            version.state, version.was_resident, version.progress = State.RESIDENT, True, 1.0
            version.held_bytes = version.need_bytes = num_bytes
            version.device, version.last_used_s = device, self._clock()
            if key not in wanted:
                self._demands.leave(version)
        for key, reason in failed.items():
            found = self._catalogue.find(key)
            if found is not None and found.is_startable:
                found.fail(reason, self._clock())
        return self._demands.settle()

    def knows(self, key: VersionKey) -> bool:
        """Whether there is such a version, be it only that it has not left memory yet."""
        return self._catalogue.find(key) is not None

    def is_loaded(self, key: VersionKey) -> bool:
        """Whether a version is known, and a request can begin on it now."""
        version = self._catalogue.find(key)
        return version is not None and version.is_loaded

    def can_adopt(self, key: VersionKey) -> bool:
        """Whether an executor may begin with this version: it is known, and not just being verified."""
        version = self._catalogue.find(key)
        return version is not None and version.is_startable and not version.is_virtual

    # What can be seen.

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners that answer requests, as they were made known; the same object until they change."""
        return self._catalogue.names

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return self._demands.num_waiting

    @property
    def held_bytes(self) -> int:
        """Memory that versions hold, or have been promised."""
        return sum(version.held_bytes for version in self._catalogue)

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do, at the latest, by the clock."""
        deadlines = [each.deadline_s for each in self._demands if each.deadline_s is not None]
        return min(deadlines, default=None)

    def status(self) -> tuple[AlignerStatus, ...]:
        """All aligners, by name."""
        entries = self._catalogue.entries
        wanted = {key for demand in self._demands for key in demand.keys}
        return tuple(self._status_of(entries[name], wanted) for name in sorted(entries))

    def status_of(self, name: str) -> AlignerStatus:
        """One of them; raises `UnknownModel`."""
        entry = self._catalogue.entry(name)
        return self._status_of(entry, {key for demand in self._demands for key in demand.keys})

    def _status_of(self, entry: Entry, wanted: Collection[VersionKey]) -> AlignerStatus:
        moving = self._demands.move_of(entry.name)
        return AlignerStatus(
            name=entry.name,
            shares=entry.shares,
            next_shares=moving.shares if moving else None,
            earlier_shares=tuple(entry.earlier),
            versions=tuple(
                self._status_of_version(version, is_wanted=version.key in wanted)
                for _, version in sorted(entry.versions.items())
            ),
        )

    def _status_of_version(self, version: Version, *, is_wanted: bool) -> VersionStatus:
        waits_for = ""
        if is_wanted and not (version.is_busy or version.is_loaded):
            has_turn = self._demands.num_jobs < self.limits.max_jobs
            waits_for = "memory" if version.is_queued and has_turn else "turn"
        return VersionStatus(
            key=version.key,
            source=version.source,
            state=version.state,
            reason=version.reason,
            waits_for=waits_for,
            progress=version.progress,
            num_bytes=version.held_bytes or version.need_bytes,
            device=version.device,
            num_references=version.num_references,
            last_used_s=version.last_used_s,
            is_pinned=version.is_pinned,
            is_preset=version.is_virtual,
        )

    # How it is done.

    def _asked(self, name: str, version: str | None) -> list[Version]:
        """The version that an operator means, or those that answer new requests."""
        entry = self._catalogue.entry(name)
        return [entry.known(each) for each in ([version] if version else entry.shares)]

    def _want(self, version: Version) -> None:
        """Bring a version into memory, for nobody in particular; whatever made it fail gets a new chance."""
        if version.state is State.FAILED:
            version.rest()
        self._demands.add(Demand(Loading(version.key), frozenset({version.key})))

    def _let_go(self, version: Version) -> None:
        version.is_pinned = False
        self._demands.drop_load(version.key)
        self._demands.leave(version)

    def _withdraw(self, version: Version) -> None:
        version.is_withdrawn = True
        self._catalogue.restless.add(version.key)

    def _move(self, entry: Entry, shares: Shares, *, is_step_back: bool) -> list[Action]:
        versions = [entry.known(version) for version in shares]
        actions = self._demands.drop_move(entry.name, f"Another promotion of `{entry.name}` came after it.")
        for version in versions:
            if version.state is State.FAILED:
                version.rest()
        keys = frozenset(version.key for version in versions)
        self._demands.add(Demand(Moving(entry.name, shares, is_step_back), keys))
        return actions + self._demands.settle()

    def _require_hope(self, keys: Iterable[VersionKey], resolution: Resolution) -> None:
        """Refuse a request for what has just failed; later it may get another chance."""
        for key in keys:
            version = self._catalogue.version(key)
            if version.state is State.FAILED:
                if self._clock() - version.failed_at_s < self.limits.retry_failed_s:
                    raise failure_of(version).for_request(resolution)
                version.rest()
