"""Carries out what the registry decides: verifies, has the engine load and free, answers requests."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from ram_core.aligners.registry import AlignerRegistry
from ram_core.aligners.sizes import WeightCount
from ram_core.aligners.states import (
    Action,
    Free,
    Grant,
    Promoted,
    PromotionFailed,
    Refuse,
    StartLoad,
    StartVerify,
    VersionKey,
)
from ram_core.engine.client import EngineClient
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerNews,
    AlignerProgress,
    EngineBegan,
    EngineLost,
    LoadAligner,
)
from ram_core.errors import CheckpointError, RamError
from ram_core.models.source import one_line
from server.aligners.checking import Checker
from server.aligners.known import KnownVersion, key_of

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who wants to hear which versions there are."""

    def add_version(self, aligner: str, version: str) -> None:
        """A version answers from memory."""

    def drop_version(self, aligner: str, version: str) -> None:
        """A version is not known any more."""


class Executor:
    """The registry's hands; lives in one event loop.

    Outcomes of what an engine's earlier life was told to do are dropped: `_loading` and `_freeing` have what
    this life was told.
    """

    def __init__(
        self,
        registry: AlignerRegistry,
        engine: EngineClient,
        checker: Checker,
        versions: Mapping[VersionKey, KnownVersion],
        answers: Mapping[str, asyncio.Future[Grant]],
        watcher: Watcher,
        *,
        on_loading: Callable[[], None],
        on_freed: Callable[[], None],
    ) -> None:
        self.failed_promotions: dict[str, RamError] = {}
        self._registry = registry
        self._engine = engine
        self._checker = checker
        self._versions = versions
        self._answers = answers
        self._watcher = watcher
        self._on_loading = on_loading
        self._on_freed = on_freed
        self._loading: set[VersionKey] = set()
        self._freeing: set[VersionKey] = set()
        self._spoiled: dict[VersionKey, str] = {}
        self._unsound: Mapping[VersionKey, str] = {}
        self._bytes_per_weight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._changed: asyncio.Future[None] | None = None
        self.num_loads = self.num_failures = 0

    def begin(self, unsound: Mapping[VersionKey, str]) -> None:
        """Hear of the engine. `unsound` are of the versions that it begins with, but must not be served."""
        self._loop = asyncio.get_running_loop()
        self._unsound = unsound

        def pass_on(news: AlignerNews) -> None:
            try:
                self._loop.call_soon_threadsafe(self._hear, news)
            except RuntimeError:
                # The loop was closed before: nobody is left to be told.
                return

        self._engine.watch_aligners(pass_on)

    async def end(self) -> None:
        """Verify nothing more."""
        self._checker.close()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_loading(self) -> bool:
        """Whether the engine loads an aligner."""
        return bool(self._loading)

    async def change(self) -> None:
        """Until something has changed."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def do(self, actions: Iterable[Action]) -> None:
        """Carry out actions, in order, and whatever follows from those that fail at once."""
        left = deque(actions)
        while left:
            match left.popleft():
                case Grant(request_id) as grant:
                    if not (answer := self._answers[request_id]).done():
                        answer.set_result(grant)
                    continue
                case Refuse(request_id, error):
                    if not (answer := self._answers[request_id]).done():
                        answer.set_exception(error)
                    continue
                case StartVerify(key):
                    self._start(self._verify(key, self._versions[key]))
                case StartLoad(key, _, num_bytes):
                    self._loading.add(key)
                    # It may take what nobody has, too: room is where a shared module has a place.
                    spare = max(0, self._registry.limits.memory_bytes - self._registry.held_bytes)
                    parts = self._versions[key].parts
                    self._engine.load_aligner(LoadAligner(str(key), parts, num_bytes + spare))
                    self._on_loading()
                case Free(key):
                    self._free(key)
                case Promoted(name, shares):
                    self.failed_promotions.pop(name, None)
                    logger.info("`%s` is answered by %s.", name, _shown(shares))
                case PromotionFailed(name, error):
                    self.failed_promotions[name] = error
                    logger.warning("A promotion of `%s` is off: %s", name, error)
            self._tell_change()
        self._set_timer()

    # Time.

    def _set_timer(self) -> None:
        """Have the registry look at the clock when the next request has waited too long."""
        if not self._registry.num_waiting:
            return
        due_s = self._registry.next_deadline_s
        if due_s is None or (self._timer is not None and self._timer.when() <= due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.do(self._registry.tick())

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)

    # Verification.

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _verify(self, key: VersionKey, known: KnownVersion) -> None:
        try:
            sound = await asyncio.to_thread(self._checker.check, known)
            if self._versions.get(key) is not known:
                raise CheckpointError("its files changed while they were verified")
        except Exception as error:
            self._fail(key, error)
            return
        self._registry_says(self._registry.verified(key, self._need_bytes(key, sound.weights)))

    def _need_bytes(self, key: VersionKey, weights: WeightCount) -> int:
        """What a version takes: an adapter's base only if no other adapter in memory has brought it."""
        there = {
            base
            for other in self._versions
            if self._registry.is_loaded(other)
            for base in self._bases_of(other)
        }
        bases = sum(num for base, num in weights.bases.items() if base not in there)
        return (weights.own + bases) * self._bytes_per_weight

    def _bases_of(self, key: VersionKey) -> Iterable[str]:
        sound = self._checker.sound_of(key)
        return sound.weights.bases if sound is not None else ()

    def _progress(self, key: VersionKey, fraction: float) -> None:
        if self._registry.knows(key):
            self._registry.progressed(key, fraction)
            self._tell_change()

    def _fail(self, key: VersionKey, error: Exception) -> None:
        reason = str(error) if isinstance(error, RamError) else f"an error inside: {one_line(error)}"
        if not isinstance(error, RamError):
            logger.error("`%s` could not be brought into memory.", key, exc_info=error)
        self._failed(key, reason)

    def _failed(self, key: VersionKey, reason: str) -> None:
        self.num_failures += 1
        logger.warning("`%s` is not served: %s.", key, reason)
        self._registry_says(self._registry.failed(key, reason))

    def _registry_says(self, actions: Iterable[Action]) -> None:
        """What follows from an outcome, which is a change even if nothing does."""
        self.do(actions)
        self._tell_change()

    # The engine.

    def _free(self, key: VersionKey) -> None:
        self._freeing.add(key)
        self._engine.free_aligner(str(key))

    def _hear(self, news: AlignerNews) -> None:
        match news:
            case EngineBegan():
                self._begin_with(news)
            case EngineLost():
                self._loading.clear()
                self._freeing.clear()
                self._spoiled.clear()
                self._registry_says(self._registry.lost())
            case AlignerProgress(aligner, fraction) if key_of(aligner) in self._loading:
                self._progress(key_of(aligner), fraction)
            case AlignerLoaded(aligner, num_bytes, device) if key_of(aligner) in self._loading:
                self._start(self._accept(key_of(aligner), num_bytes, device))
            case AlignerFailed(aligner, reason) if key_of(aligner) in self._loading:
                self._loading.discard(key_of(aligner))
                self._failed(key_of(aligner), reason)
            case AlignerFreed(aligner) if key_of(aligner) in self._freeing:
                self._freed(key_of(aligner))

    def _begin_with(self, news: EngineBegan) -> None:
        self._bytes_per_weight = news.bytes_per_weight
        there: Counter[VersionKey] = Counter()
        for aligner, num_bytes in news.aligners:
            there[key_of(aligner)] += num_bytes
        failed = {key_of(aligner): reason for aligner, reason in news.failed} | dict(self._unsound)
        for key in [key for key in there if not self._can_adopt(key)]:
            # Removed while the engine was away, or not known to be fit to be served.
            del there[key]
            self._engine.free_aligner(str(key))
        for key in there:
            self._watcher.add_version(*key)
        for key, reason in failed.items():
            logger.warning("`%s` is not served: %s.", key, reason)
        self._unsound = {}
        self._registry_says(self._registry.began(news.memory_bytes, there, failed, news.device))

    def _can_adopt(self, key: VersionKey) -> bool:
        """Whether what an engine began with may be served: it read the files by itself."""
        if key in self._unsound or not self._registry.can_adopt(key):
            return False
        return not self._checker.is_doubtful(self._versions[key])

    async def _accept(self, key: VersionKey, num_bytes: int, device: str) -> None:
        """The engine has it; but was it what had been verified?"""
        try:
            await asyncio.to_thread(self._checker.require_unchanged, self._versions[key])
        except CheckpointError as error:
            if key in self._loading:
                self._loading.discard(key)
                self._spoiled[key] = str(error)
                self._free(key)
            return
        if key in self._loading:
            self._loading.discard(key)
            self.num_loads += 1
            self._watcher.add_version(*key)
            self._registry_says(self._registry.loaded(key, num_bytes, device))

    def _freed(self, key: VersionKey) -> None:
        self._freeing.discard(key)
        if (reason := self._spoiled.pop(key, None)) is not None:
            self._failed(key, reason)
        else:
            self._registry_says(self._registry.freed(key))
        self._on_freed()


def _shown(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{version} ({share:.0%})" for version, share in shares.items())
