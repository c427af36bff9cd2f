"""Whatever comes, in whatever order: memory, references, shares and answers are what they must be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ram_core.aligners.manifest import Term
from ram_core.aligners.states import Action, AskedAligner, Free, Grant, Promoted, Refuse, State, VersionKey
from ram_core.errors import AlignerUnavailable, InvalidRequest, QueueFull, UnknownModel
from tests.unit.test_aligner_registry import BUDGET, Executor

MOMENT_S = 0.001
NAMES = ("a", "b", "c")
VERSIONS = ("1", "2", "3")
SIZES = st.integers(2, 6)
FATES = [False] * 9 + [True]
KEYS = st.builds(VersionKey, st.sampled_from(NAMES), st.sampled_from(VERSIONS))


class Life(RuleBasedStateMachine):
    """Anything happens in any order, and jobs end whenever and however they like."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = Executor(BUDGET, max_jobs=2, max_waiting=4, retry_failed_s=5.0)
        self.registry = self.executor.registry
        self.running: dict[str, frozenset[VersionKey]] = {}
        self.waiting: dict[str, float] = {}
        self.shares: dict[str, dict[str, float]] = {}
        self.withdrawn: set[str] = set()
        self.num_requests = 0

    @initialize(sizes=st.lists(SIZES, min_size=9, max_size=9))
    def begin(self, sizes: list[int]) -> None:
        for number, size in enumerate(sizes):
            self.executor.add(NAMES[number // 3], VERSIONS[number % 3], size)
        self.executor.add("mix", "1", 0, terms=(Term("a"), Term("b", -1.0)))
        self.note([])

    def do(self, actions: list[Action]) -> None:
        self.executor.now_s += MOMENT_S
        self.check_evictions(actions)
        self.executor.take(actions)
        self.note(actions)

    def note(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Grant):
                keys = frozenset(term.key for term in action.resolution.terms)
                self.running[action.request_id] = keys
                assert all(self.executor.held[key] and key not in self.executor.jobs for key in keys)
            if isinstance(action, Grant | Refuse):
                assert self.waiting.pop(action.request_id) is not None
        told = [action for action in actions if isinstance(action, Promoted)]
        now = {aligner.name: dict(aligner.shares) for aligner in self.registry.status()}
        for name, shares in now.items():
            # Where versions were withdrawn, shares also change as they drop out.
            has_changed = name in self.shares and self.shares[name] != shares
            if has_changed and name not in self.withdrawn:
                assert Promoted(name, shares) in told, "shares change by promotion alone, all at once"
                assert all(self.executor.held[VersionKey(name, version)] for version in shares)
        self.shares = now

    def check_evictions(self, actions: list[Action]) -> None:
        """Nobody who could have stayed was used longer ago than who goes."""
        versions = {version.key: version for version in self.registry._catalogue}
        wanted = {key for demand in self.registry._demands for key in demand.keys}
        freed = [versions[action.key] for action in actions if isinstance(action, Free)]
        for version in freed:
            assert not version.num_references
            assert not version.is_pinned
        stay = [
            version.last_used_s
            for version in versions.values()
            if version.is_loaded
            and not (version.num_references or version.is_pinned or version.is_virtual)
            and version.key not in wanted
        ]
        evicted = [version.last_used_s for version in freed if not version.is_leaving]
        assert max(evicted, default=0.0) <= min(stay, default=math.inf)

    @rule(
        times=st.integers(1, 2),
        names=st.lists(st.sampled_from([*NAMES, "mix"]), min_size=1, max_size=2, unique=True),
        key=st.sampled_from(["", "x", "y", "z"]),
        wait_s=st.sampled_from([1.0, 10.0, 100.0]),
    )
    def ask(self, times: int, names: list[str], key: str, wait_s: float) -> None:
        for _ in range(times):
            self.ask_once(names, key, wait_s)

    def ask_once(self, names: list[str], key: str, wait_s: float) -> None:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        self.waiting[request_id] = self.executor.now_s + wait_s
        try:
            terms = [AskedAligner(name, 1.5) for name in names]
            self.do(self.registry.acquire(request_id, terms, sticky_key=key, max_wait_s=wait_s))
        except (QueueFull, AlignerUnavailable):
            del self.waiting[request_id]
        except UnknownModel:
            del self.waiting[request_id]
            assert self.withdrawn

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[request_id]
        self.do(self.registry.release(request_id))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[request_id]
        self.do(self.registry.release(request_id))

    @precondition(lambda self: self.executor.jobs)
    @rule(picks=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(FATES)), min_size=1, max_size=8))
    def work(self, picks: list[tuple[int, bool]]) -> None:
        for index, fails in picks:
            if self.executor.jobs:
                keys = sorted(self.executor.jobs)
                self.end_job(keys[index % len(keys)], fails=fails)

    def end_job(self, key: VersionKey, *, fails: bool = False) -> None:
        kind = self.executor.jobs.pop(key)
        if kind == "free":
            del self.executor.held[key]
            self.do(self.registry.freed(key))
        elif fails:
            self.executor.held.pop(key, None)
            self.do(self.registry.failed(key, "chance"))
        elif kind == "verify":
            self.do(self.registry.verified(key, self.executor.sizes[key]))
        else:
            self.do(self.registry.loaded(key, self.executor.sizes[key], "cpu"))

    @precondition(lambda self: self.running)
    @rule(num_left=st.integers(0, 2))
    def end_many(self, num_left: int) -> None:
        for request_id in sorted(self.running)[num_left:]:
            del self.running[request_id]
            self.do(self.registry.release(request_id))

    @precondition(lambda self: self.executor.jobs)
    @rule()
    def work_on(self) -> None:
        """All goes well for a while."""
        for _ in range(20):
            if self.executor.jobs:
                self.end_job(min(self.executor.jobs))

    @rule(version=KEYS, weights=st.sampled_from([{}, {}, {"1": 0.3}, {"3": 2.0}]))
    def promote(self, version: VersionKey, weights: dict[str, float]) -> None:
        name = version.name
        self.by_hand(name, lambda: self.registry.promote(name, {version.version: 0.7} | weights))

    @rule(version=KEYS, what=st.sampled_from(["load", "load", "pin", "unpin", "unpin", "roll back"]))
    def operate(self, version: VersionKey, what: str) -> None:
        """What operators do often."""
        name, registry = version.name, self.registry
        if what in ("load", "pin"):
            self.by_hand(name, lambda: registry.load(*version, is_pinned=what == "pin"))
        elif what == "unpin":
            self.by_hand(name, lambda: registry.unpin(name))
        else:
            try:
                self.by_hand(name, lambda: registry.rollback(name))
            except InvalidRequest:
                assert not next(each for each in registry.status() if each.name == name).earlier_shares

    @rule(version=KEYS, what=st.sampled_from(["unload", "unload all", "withdraw", "remove", "add", "lose"]))
    def disturb(self, version: VersionKey, what: str) -> None:
        """What they do seldom, and what befalls them."""
        name, registry = version.name, self.registry
        if what.startswith("unload"):
            self.by_hand(name, lambda: registry.unload(name, None if "all" in what else version.version))
        elif what == "add":
            self.do(registry.add(*version, "/again"))
        elif what == "lose":
            self.lose(is_kept=version.version == "1")
        elif name != NAMES[0]:
            self.withdrawn.add(name)
            self.by_hand(
                name, lambda: registry.remove(name) if what == "remove" else registry.withdraw(*version)
            )

    def lose(self, *, is_kept: bool) -> None:
        """The engine dies; the next one begins with nothing, or with what had been there."""
        jobs, held = self.executor.jobs, self.executor.held
        there = {key: held[key] for key in sorted(held) if is_kept and jobs.get(key) != "load"}
        self.executor.jobs = {key: kind for key, kind in jobs.items() if kind == "verify"}
        held.clear()
        self.running.clear()
        self.do(self.registry.lost())
        assert not any(kind == "load" for kind in self.executor.jobs.values())
        there = {key: size for key, size in there.items() if self.registry.can_adopt(key)}
        held.update(there)
        self.do(self.registry.began(BUDGET, there, {}, "cpu"))

    @invariant()
    def nobody_who_is_to_go_is_overlooked(self) -> None:
        catalogue = self.registry._catalogue
        going = {
            version.key
            for version in catalogue
            if version.is_leaving or version.is_queued or version.is_withdrawn
        }
        assert going <= catalogue.restless

    def by_hand(self, name: str, ask: Callable[[], list[Action]]) -> None:
        """What an operator does; what has been withdrawn may be unknown."""
        try:
            actions = ask()
        except UnknownModel:
            assert name in self.withdrawn
        else:
            self.do(actions)

    @rule(passed_s=st.sampled_from([0.5, 2.0]))
    def wait(self, passed_s: float) -> None:
        self.executor.now_s += passed_s
        self.do(self.registry.tick())

    @invariant()
    def memory_is_within_the_budget(self) -> None:
        assert sum(self.executor.held.values()) <= BUDGET
        assert self.registry.held_bytes == sum(self.executor.held.values())

    @invariant()
    def references_are_those_of_running_requests(self) -> None:
        count = Counter(key for keys in self.running.values() for key in keys)
        for aligner in self.registry.status():
            for version in aligner.versions:
                assert version.num_references == count[version.key]
                if count[version.key]:
                    assert self.executor.held[version.key]
                    assert version.key not in self.executor.jobs
                    assert version.state in (State.RESIDENT, State.DRAINING)

    @invariant()
    def few_jobs_run_and_few_requests_wait(self) -> None:
        assert sum(kind != "free" for kind in self.executor.jobs.values()) <= 2
        assert len(self.waiting) <= 4

    @invariant()
    def nobody_waits_beyond_the_deadline(self) -> None:
        assert all(deadline_s > self.executor.now_s - MOMENT_S for deadline_s in self.waiting.values())

    def teardown(self) -> None:
        """When running requests end and jobs succeed, everybody who still waits is answered."""
        for request_id in sorted(self.running):
            del self.running[request_id]
            self.do(self.registry.release(request_id))
        for _ in range(300):
            if self.executor.jobs:
                self.end_job(next(iter(self.executor.jobs)))
            for request_id in sorted(self.running):
                del self.running[request_id]
                self.do(self.registry.release(request_id))
        assert not self.waiting, "somebody waits without need"
        assert not self.executor.jobs


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
