"""The aligners of one server, for requests and for administrators; lives in one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ram_core.aligners.directory import AlignersDirectory, Changes
from ram_core.aligners.manifest import Manifest
from ram_core.aligners.registry import AlignerRegistry, RegistryLimits
from ram_core.aligners.states import AlignerStatus, AskedAligner, Grant, Resolution, State, VersionKey
from ram_core.engine.client import EngineClient
from ram_core.errors import (
    AlignerUnavailable,
    CheckpointError,
    Conflict,
    EngineUnavailable,
    InvalidRequest,
    UnknownModel,
)
from ram_core.params import MAX_CANDIDATES, MAX_STRENGTH, AlignerTerm, Resampling, require_range
from server.aligners.checking import Checker
from server.aligners.executor import Executor, Watcher
from server.aligners.known import KnownVersion, Origin, below, from_directory, from_hub, model_name
from server.aligners.lease import NOTHING, Defaults, Lease, LentAligner
from server.aligners.start import Inventory
from server.metrics import AlignerFigures

POLL_S = 1.0
_POLL_SHARE = 0.05
"""Looking at a large directory may take this part of the time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """A request waits `wait_s` for aligners at most; `max_loads` are verified or loaded at once.

    No aligner may have the `proposal_name`.
    """

    wait_s: float
    max_loads: int
    proposal_name: str


@dataclass(frozen=True, slots=True)
class AlignerView:
    """An aligner, as administrators see it: its state, what its manifests say, what holds instead."""

    status: AlignerStatus
    manifests: Mapping[str, Manifest]
    origins: Mapping[str, Origin]
    defaults: Defaults


class AlignerService:
    """Carries out what the registry decides, lends aligners to requests, and takes administrators' orders.

    Every order returns as soon as it has been taken; `wait_loaded` and `wait_promoted` wait for its end.
    All of them raise `UnknownModel` for a name or version that nobody has.
    """

    def __init__(
        self,
        engine: EngineClient,
        checker: Checker,
        inventory: Inventory,
        options: ServiceOptions,
        *,
        watcher: Watcher,
    ) -> None:
        """Knows what was found at the start; `begin` goes on from there."""
        self._engine = engine
        self._checker = checker
        self._options = options
        self._watcher = watcher
        self._inventory = inventory
        self._directory = inventory.directory
        self._versions: dict[VersionKey, KnownVersion] = {}
        self._defaults: dict[str, Defaults] = {}
        self._answers: dict[str, asyncio.Future[Grant]] = {}
        self._to_tell: dict[str, Callable[[], None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.registry = AlignerRegistry(RegistryLimits(memory_bytes=0, max_jobs=options.max_loads))
        self._executor = Executor(
            self.registry,
            engine,
            checker,
            self._versions,
            self._answers,
            watcher,
            on_loading=self._tell_loading,
            on_freed=self._forget,
        )
        self.held_back: Mapping[str, str] = {}

    def begin(self) -> None:
        """Make known what was found, hear of the engine, and watch the directory; in the event loop."""
        # There is no engine to load anything until it says what it began with.
        self._executor.do(self.registry.lost())
        for known in self._inventory.versions:
            self._add(known)
        for name in self._inventory.loaded_names:
            self._executor.do(self.registry.load(name))
        self._executor.begin(self._inventory.unsound)
        if self._directory is not None:
            self._tasks.append(asyncio.create_task(self._watch(self._directory)))

    async def end(self) -> None:
        """Stop watching and verifying, and let nobody wait; the engine is for others to end."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineUnavailable("The server is shutting down."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._executor.end()

    # For requests.

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners that answer requests, as they were made known; the same object until they change."""
        return self.registry.names

    async def acquire(
        self,
        request_id: str,
        asked: Iterable[AskedAligner],
        *,
        sticky_key: str,
        on_loading: Callable[[Lease], None] = lambda lease: None,
    ) -> Lease:
        """Versions for a request, waited for if need be; `release` gives them back.

        `on_loading` is called if it waits, as soon as the engine loads an aligner, perhaps another's: with
        the lease that it will get. If it is cancelled or raises, there is nothing to give back.

        Raises:
            UnknownModel, InvalidRequest: a name that nobody answers to, or a senseless sum of aligners.
            AlignerUnavailable: it could not be loaded, or not in time.
            QueueFull: too many requests wait for aligners.
            EngineUnavailable: there is no engine just now.
        """
        asked = tuple(asked)
        if not asked:
            return NOTHING
        if (trouble := self._engine.trouble) is not None:
            raise EngineUnavailable(f"{trouble[:1].upper()}{trouble[1:]}.")
        answer = self._answers[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._ask(request_id, asked, sticky_key)
            if not answer.done():
                lease = self._lease(self.registry.awaited_by(request_id))
                self._to_tell[request_id] = partial(on_loading, lease)
                if self._executor.is_loading:
                    self._tell_loading()
            grant = await answer
        except BaseException:
            self.release(request_id)
            raise
        finally:
            self._to_tell.pop(request_id, None)
            del self._answers[request_id]
        return self._lease(grant.resolution)

    def _tell_loading(self) -> None:
        waiting, self._to_tell = self._to_tell, {}
        for tell in waiting.values():
            tell()

    def release(self, request_id: str) -> None:
        """A request has ended, however it did; once more changes nothing."""
        self._executor.do(self.registry.release(request_id))

    def _ask(self, request_id: str, asked: tuple[AskedAligner, ...], sticky_key: str) -> None:
        try:
            actions = self.registry.acquire(
                request_id, asked, sticky_key=sticky_key, max_wait_s=self._options.wait_s
            )
        except UnknownModel:
            missing = [each.name for each in asked if each.name not in self.names]
            if missing:
                raise UnknownModel(f"The aligner `{missing[0][:200]}` does not exist.") from None
            # A preset's part: whoever may use the preset need not know of it.
            raise AlignerUnavailable(
                f"{', '.join(f'`{each.name}`' for each in asked)}: a part is missing."
            ) from None
        self._executor.do(actions)

    def _lease(self, resolution: Resolution) -> Lease:
        aligners = tuple(
            LentAligner(*key, strength)
            for key, strength in zip(resolution.chosen, resolution.strengths, strict=True)
        )
        terms = tuple(
            AlignerTerm(model_name(term.key, term.part), term.strength) for term in resolution.terms
        )
        if len(aligners) > 1:
            # Which one's mode and gate? Nobody can tell, so the core's hold.
            return Lease(aligners, terms)
        [key] = resolution.chosen
        manifest = self._versions[key].manifest
        own = self._defaults.get(key.name, Defaults())
        return Lease(
            aligners,
            terms,
            own.resampling or manifest.resampling,
            manifest.kl_threshold if own.kl_threshold is None else own.kl_threshold,
            own.num_candidates or manifest.candidates,
        )

    # For administrators.

    @property
    def memory_bytes(self) -> int:
        """Room for all aligners together, as the engine has told."""
        return self.registry.limits.memory_bytes

    @property
    def held_bytes(self) -> int:
        """What of it is taken, or promised."""
        return self.registry.held_bytes

    def status(self) -> tuple[AlignerView, ...]:
        """All aligners, by name."""
        return tuple(self._view(status) for status in self.registry.status())

    def status_of(self, name: str) -> AlignerView:
        """One of them."""
        return self._view(self.registry.status_of(name))

    async def add(self, name: str, path: str) -> VersionKey:
        """Make the version in a directory below `--aligners-dir` known; loads nothing.

        The first version of a name answers its requests, later ones wait to be promoted.

        Raises:
            InvalidRequest: no directory of aligners, a path that leads elsewhere, or nothing to be served.
            Conflict: there is such a version already, from another place, or in memory with other terms.
        """
        if self.root is None:
            message = "There is no directory of aligners: begin with `--aligners-dir`."
            raise InvalidRequest(message, param="path")
        return await self._add_by_hand(below, name, path, self.root, param="path")

    async def add_from_hub(self, name: str, hub_id: str) -> VersionKey:
        """Make the version known that the hub has now, and that is downloaded; raises what `add` does."""
        return await self._add_by_hand(from_hub, name, hub_id, param="hub_id")

    @property
    def root(self) -> Path | None:
        """The directory of aligners, if there is one."""
        return None if self._directory is None else self._directory.root

    async def _add_by_hand(self, look: Callable[..., KnownVersion], *args: object, param: str) -> VersionKey:
        try:
            known = await asyncio.to_thread(look, *args)
        except CheckpointError as error:
            raise InvalidRequest(f"{error}.", param=param) from None
        before = self._versions.get(known.key)
        if before is not None and before.directory.resolve() != known.directory.resolve():
            raise Conflict(f"There is a `{known.key}` already, from {before.directory}.")
        self._add(known)
        return known.key

    def remove(self, name: str) -> None:
        """Forget an aligner: new requests do not find it, running ones finish; its files stay."""
        self._executor.do(self.registry.remove(name))
        self._defaults.pop(name, None)
        self._forget()

    def load(self, name: str, version: str | None = None, *, is_pinned: bool = False) -> None:
        """Bring a version, or those that answer requests, into memory; `is_pinned` keeps them there."""
        self._executor.do(self.registry.load(name, version, is_pinned=is_pinned))

    def unload(self, name: str, version: str | None = None) -> None:
        """Free a version, or all of a name, once nobody uses it."""
        self._executor.do(self.registry.unload(name, version))

    def promote(self, name: str, weights: str | Mapping[str, float]) -> None:
        """Let a version, or several by weight, answer new requests once they are all in memory.

        If one of them cannot be loaded, nothing changes.

        Raises:
            InvalidRequest: a weight that is not positive.
        """
        actions = self.registry.promote(name, weights)
        self._executor.failed_promotions.pop(name, None)
        self._executor.do(actions)

    def rollback(self, name: str) -> None:
        """Take the last promotion back, or the one that still waits.

        If a version that would answer again cannot be loaded, nothing changes, and `wait_promoted` says so.

        Raises:
            Conflict: there is none.
        """
        is_waiting = self.registry.status_of(name).next_shares is not None
        self._executor.do(self.registry.rollback(name))
        if is_waiting:
            # What was taken back is no failure of this; a step back that found no room is.
            self._executor.failed_promotions.pop(name, None)

    def patch(
        self,
        name: str,
        *,
        strength: float | None = None,
        resampling: Resampling | None = None,
        kl_threshold: float | None = None,
        num_candidates: int | None = None,
        is_pinned: bool | None = None,
    ) -> None:
        """Change what holds for requests to come that say nothing else; None changes nothing.

        A `kl_threshold` of infinity is no gate. `is_pinned` is for the versions that answer requests: pinned
        ones are loaded, others may be evicted again.

        Raises:
            InvalidRequest: a strength, a gate or a number of candidates that cannot be.
        """
        self.registry.status_of(name)
        if strength is not None:
            require_range("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        if kl_threshold is not None:
            require_range("kl_threshold", kl_threshold, 0, math.inf)
        if num_candidates is not None:
            require_range("candidates", num_candidates, 1, MAX_CANDIDATES)
        now = self._defaults.get(name, Defaults())
        self._defaults[name] = Defaults(
            now.strength if strength is None else strength,
            resampling or now.resampling,
            now.kl_threshold if kl_threshold is None else kl_threshold,
            num_candidates or now.num_candidates,
        )
        if strength is not None:
            self.registry.tune(name, strength)
        if is_pinned is not None:
            pin = self.registry.load(name, is_pinned=True) if is_pinned else self.registry.unpin(name)
            self._executor.do(pin)

    async def wait_loaded(self, name: str, version: str | None = None) -> None:
        """Until a load that was asked for has ended; wrap it in a timeout.

        Raises:
            AlignerUnavailable: it failed, or nobody wants it any more.
        """
        while True:
            status = self.registry.status_of(name)
            asked = status.shares if version is None else {version}
            wanted = [each for each in status.versions if each.key.version in asked]
            if version is not None and not wanted:
                raise UnknownModel(f"The aligner `{name}` has no version `{version}`.")
            if all(each.state in (State.RESIDENT, State.DRAINING) for each in wanted):
                return
            for each in wanted:
                if each.is_idle:
                    raise AlignerUnavailable(f"`{each.key}` was not loaded: {each.reason or each.state}.")
            await self._executor.change()

    async def wait_promoted(self, name: str) -> None:
        """Until no promotion of an aligner waits any more; wrap it in a timeout.

        Raises:
            AlignerUnavailable: the one that waited has failed, and nothing has changed.
        """
        wanted = status = self.registry.status_of(name)
        while status.next_shares is not None and status.next_shares == wanted.next_shares:
            await self._executor.change()
            status = self.registry.status_of(name)
        if (error := self._executor.failed_promotions.get(name)) is not None:
            raise error
        if wanted.next_shares not in (None, status.shares):
            raise AlignerUnavailable(f"The promotion of `{name}` has given way to another one.")

    async def wait_change(self) -> None:
        """Until something has changed: a state, shares, progress. For those who watch."""
        await self._executor.change()

    # What is known.

    def figures(self) -> AlignerFigures:
        """For metrics."""
        statuses = self.registry.status()
        states = dict.fromkeys(State, 0)
        for status in statuses:
            for version in status.versions:
                states[version.state] += 1

        def names_in(*wanted: State) -> tuple[str, ...]:
            return tuple(
                status.name for status in statuses if any(each.state in wanted for each in status.versions)
            )

        return AlignerFigures(
            {state.value: count for state, count in states.items()},
            names_in(State.RESIDENT, State.DRAINING),
            names_in(State.VERIFYING, State.LOADING),
            self.held_bytes,
            self.memory_bytes,
            self.registry.num_waiting,
            self._executor.num_loads,
            self._executor.num_failures,
        )

    def _view(self, status: AlignerStatus) -> AlignerView:
        known = {each.key.version: self._versions[each.key] for each in status.versions}
        return AlignerView(
            status,
            {version: each.manifest for version, each in known.items()},
            {version: each.origin for version, each in known.items()},
            self._defaults.get(status.name, Defaults()),
        )

    def _add(self, known: KnownVersion) -> None:
        """Make a version known; raises `InvalidRequest` for one that cannot be."""
        if known.key.name == self._options.proposal_name:
            raise InvalidRequest(f"`{known.key.name}` is the proposal's name.", param="name")
        own = self._defaults.get(known.key.name, Defaults())
        strength = known.manifest.strength if own.strength is None else own.strength
        actions = self.registry.add(
            *known.key, str(known.directory), terms=known.manifest.terms, strength=strength
        )
        # Only now: the registry refuses other terms than those in memory.
        self._versions[known.key] = known
        self._executor.do(actions)

    def _forget(self) -> None:
        """Let go of what the registry does not know any more."""
        for key in [key for key in self._versions if not self.registry.knows(key)]:
            del self._versions[key]
            self._checker.forget(key)
            self._watcher.drop_version(*key)

    async def _watch(self, directory: AlignersDirectory) -> None:
        """Look at the directory now and then, for ever."""
        pause_s = POLL_S
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(pause_s)
            began_s = loop.time()
            try:
                changes = await asyncio.to_thread(directory.poll)
            except CheckpointError as error:
                if not self.held_back:
                    logger.warning("%s; the aligners stay as they were.", error)
                self.held_back = {str(directory.root): str(error)}
            except Exception:
                # Whatever it was, the next look may go well.
                logger.exception("The directory of aligners could not be looked at.")
            else:
                self._take(changes, directory)
            pause_s = max(POLL_S, (loop.time() - began_s) / _POLL_SHARE)

    def _take(self, changes: Changes, directory: AlignersDirectory) -> None:
        self.held_back = {str(path): reason for path, reason in changes.held_back.items()}
        for gone in changes.vanished:
            key = VersionKey(*gone.key)
            if self._is_ours(key):
                logger.info("The files of `%s` are gone; it stays while it is in memory.", key)
                self._executor.do(self.registry.withdraw(*key))
        for found in (*changes.appeared, *changes.changed):
            known = from_directory(found, directory.root)
            if known.key in self._versions and not self._is_ours(known.key):
                # What was given by name, or by hand, wins.
                continue
            try:
                self._add(known)
                logger.info("`%s` is in %s.", known.key, known.directory)
            except InvalidRequest as error:
                logger.warning("%s is not taken: %s", known.directory, error)
        self._forget()

    def _is_ours(self, key: VersionKey) -> bool:
        """Whether the directory, and nobody else, made a version known."""
        return key in self._versions and self._versions[key].origin is Origin.DIRECTORY
