"""The registry decides rightly: step by step, and whatever comes in whatever order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import pytest

from ram_core.aligners.manifest import Term
from ram_core.aligners.memory import Room
from ram_core.aligners.registry import AlignerRegistry, RegistryLimits
from ram_core.aligners.shares import choose
from ram_core.aligners.states import (
    Action,
    AskedAligner,
    Free,
    Grant,
    Promoted,
    PromotionFailed,
    Refuse,
    StartLoad,
    StartVerify,
    State,
    Version,
    VersionKey,
    VersionStatus,
)
from ram_core.errors import AlignerUnavailable, InvalidRequest, QueueFull, RamError, UnknownModel

BUDGET = 10


class Executor:
    """A registry, and what it asked for: jobs by version, memory that is really held, answers that came."""

    def __init__(self, memory_bytes: int = BUDGET, **limits: float) -> None:
        self.now_s = 0.0
        self.registry = AlignerRegistry(
            RegistryLimits(memory_bytes=memory_bytes, **limits), clock=lambda: self.now_s
        )
        self.sizes: dict[VersionKey, int] = {}
        self.jobs: dict[VersionKey, str] = {}
        self.held: Counter[VersionKey] = Counter()
        self.log: list[Action] = []
        self.answers: dict[str, Grant | RamError] = {}

    def add(self, name: str, version: str, size: int = 1, **options: object) -> VersionKey:
        key = VersionKey(name, version)
        self.sizes[key] = size
        self.take(self.registry.add(name, version, f"/{name}/{version}", **options))
        return key

    def take(self, actions: Iterable[Action]) -> list[Action]:
        """Begin with whatever was asked for."""
        actions = list(actions)
        self.log += actions
        for action in actions:
            match action:
                case StartVerify(key):
                    assert key not in self.jobs
                    self.jobs[key] = "verify"
                case StartLoad(key, _, num_bytes):
                    assert key not in self.jobs
                    assert num_bytes == self.sizes[key]
                    self.jobs[key] = "load"
                    self.held[key] = num_bytes
                case Free(key):
                    assert key not in self.jobs
                    self.jobs[key] = "free"
                case Grant(request_id):
                    assert request_id not in self.answers
                    self.answers[request_id] = action
                case Refuse(request_id, error):
                    assert request_id not in self.answers
                    self.answers[request_id] = error
        return actions

    def finish(self, key: VersionKey) -> list[Action]:
        """Let the job on a version succeed."""
        kind = self.jobs.pop(key)
        if kind == "verify":
            return self.take(self.registry.verified(key, self.sizes[key]))
        if kind == "load":
            return self.take(self.registry.loaded(key, self.sizes[key], "cpu"))
        del self.held[key]
        return self.take(self.registry.freed(key))

    def fail(self, key: VersionKey, reason: str = "broken") -> list[Action]:
        assert self.jobs.pop(key) != "free"
        self.held.pop(key, None)
        return self.take(self.registry.failed(key, reason))

    def finish_all(self) -> None:
        for _ in range(200):
            if self.jobs:
                self.finish(next(iter(self.jobs)))
        assert not self.jobs, "versions take turns in memory for ever"

    def lose(self) -> None:
        """The engine dies, and comes back with nothing; verifications go on."""
        self.jobs = {key: kind for key, kind in self.jobs.items() if kind == "verify"}
        self.held.clear()
        self.take(self.registry.lost())
        assert not any(kind == "load" for kind in self.jobs.values()), "there is nobody who could load"
        self.take(self.registry.began(self.registry.limits.memory_bytes, {}, {}, "cpu"))

    def acquire(
        self, request_id: str, *terms: str | AskedAligner, key: str = "", wait_s: float = 60
    ) -> Grant | RamError | None:
        """What the request has been answered so far."""
        asked = [AskedAligner(term) if isinstance(term, str) else term for term in terms]
        self.take(self.registry.acquire(request_id, asked, sticky_key=key, max_wait_s=wait_s))
        return self.answers.get(request_id)

    def version_of(self, request_id: str) -> str:
        answer = self.answers[request_id]
        assert isinstance(answer, Grant)
        return answer.resolution.chosen[0].version

    def status(self, key: VersionKey) -> VersionStatus:
        every = (version for aligner in self.registry.status() for version in aligner.versions)
        return next(version for version in every if version.key == key)

    def state(self, key: VersionKey) -> State:
        return self.status(key).state


@pytest.fixture
def executor() -> Executor:
    return Executor()


def polite(executor: Executor) -> tuple[VersionKey, VersionKey]:
    """An aligner whose first version is in memory and answers, and a second one that is known."""
    v1, v2 = executor.add("polite", "v1", 4), executor.add("polite", "v2", 4)
    executor.take(executor.registry.load("polite"))
    executor.finish_all()
    return v1, v2


def test_a_request_waits_through_every_state_and_then_goes_on(executor):
    key = executor.add("polite", "v1", 4)
    assert executor.state(key) is State.ABSENT
    assert executor.acquire("r", "polite") is None
    assert executor.state(key) is State.VERIFYING
    executor.registry.progressed(key, 0.5)
    assert executor.status(key).progress == 0.5
    executor.finish(key)
    assert executor.state(key) is State.LOADING
    assert executor.registry.held_bytes == 4
    executor.finish(key)
    assert executor.version_of("r") == "v1"
    seen = executor.status(key)
    assert (seen.state, seen.num_references, seen.device, seen.num_bytes) == (State.RESIDENT, 1, "cpu", 4)
    executor.take(executor.registry.release("r"))
    assert executor.status(key).num_references == 0


def test_a_promotion_turns_new_requests_at_once_and_the_old_version_ends_with_its_last_request(executor):
    v1, v2 = polite(executor)
    executor.acquire("old", "polite")
    executor.take(executor.registry.promote("polite", "v2"))
    assert executor.registry.status()[0].next_shares == {"v2": 1.0}
    assert isinstance(executor.acquire("between", "polite"), Grant)
    assert executor.version_of("between") == "v1"
    executor.finish_all()
    assert Promoted("polite", {"v2": 1.0}) in executor.log
    executor.acquire("new", "polite")
    assert executor.version_of("new") == "v2"
    assert executor.state(v1) is State.DRAINING
    executor.take(executor.registry.release("old"))
    assert v1 not in executor.jobs
    executor.take(executor.registry.release("between"))
    assert executor.jobs == {v1: "free"}
    executor.finish(v1)
    assert (executor.state(v1), executor.state(v2)) == (State.EVICTED, State.RESIDENT)


def test_a_failed_promotion_changes_nothing(executor):
    _, v2 = polite(executor)
    executor.take(executor.registry.promote("polite", "v2"))
    executor.finish(v2)
    (told,) = executor.fail(v2, "cut off")
    assert isinstance(told, PromotionFailed)
    assert "cut off" in str(told.error)
    assert (executor.state(v2), executor.status(v2).reason) == (State.FAILED, "cut off")
    assert executor.registry.status()[0].shares == {"v1": 1.0}
    assert executor.registry.status()[0].next_shares is None
    executor.acquire("r", "polite")
    assert executor.version_of("r") == "v1"
    assert executor.registry.held_bytes == 4
    executor.take(executor.registry.promote("polite", "v2"))
    assert executor.jobs == {v2: "verify"}, "who asks by hand is not kept waiting"


def test_a_canary_flips_only_when_all_its_versions_are_there(executor):
    _, v2 = polite(executor)
    executor.take(executor.registry.promote("polite", {"v2": 1, "v1": 9}))
    assert executor.registry.status()[0].shares == {"v1": 1.0}
    executor.finish(v2)
    executor.finish(v2)
    assert executor.registry.status()[0].shares == {"v2": 0.1, "v1": 0.9}
    for number in range(200):
        executor.acquire(f"{number}", "polite", key=f"user {number}")
        executor.acquire(f"again {number}", "polite", key=f"user {number}")
        assert executor.version_of(f"{number}") == executor.version_of(f"again {number}")
    seen = Counter(executor.version_of(str(number)) for number in range(200))
    assert 5 <= seen["v2"] <= 38


def test_a_rollback_takes_back_what_waits_or_else_what_was_made(executor):
    v1, v2 = polite(executor)
    with pytest.raises(InvalidRequest, match="no promotion"):
        executor.registry.rollback("polite")
    executor.take(executor.registry.promote("polite", "v2"))
    assert isinstance(executor.take(executor.registry.rollback("polite"))[0], PromotionFailed)
    executor.finish_all()
    assert executor.registry.status()[0].shares == {"v1": 1.0}
    executor.take(executor.registry.promote("polite", "v2"))
    executor.finish_all()
    assert executor.state(v1) is State.EVICTED
    assert executor.registry.status()[0].earlier_shares == ({"v1": 1.0},)
    executor.take(executor.registry.rollback("polite"))
    assert executor.registry.status()[0].shares == {"v2": 1.0}, "not before v1 is there"
    executor.finish_all()
    assert executor.registry.status()[0].shares == {"v1": 1.0}
    assert executor.registry.status()[0].earlier_shares == ()
    assert executor.state(v2) is State.EVICTED


def test_going_back_to_a_version_that_still_drains_revives_it(executor):
    v1, _ = polite(executor)
    executor.acquire("old", "polite")
    executor.take(executor.registry.promote("polite", "v2"))
    executor.finish_all()
    assert executor.state(v1) is State.DRAINING
    executor.take(executor.registry.rollback("polite"))
    assert executor.state(v1) is State.RESIDENT
    assert v1 not in executor.jobs


def test_a_later_promotion_takes_the_place_of_one_that_waits(executor):
    polite(executor)
    v3 = executor.add("polite", "v3", 1)
    executor.take(executor.registry.promote("polite", "v2"))
    told = executor.take(executor.registry.promote("polite", "v3"))
    assert isinstance(told[0], PromotionFailed)
    executor.finish_all()
    assert executor.registry.status()[0].shares == {"v3": 1.0}
    assert executor.state(v3) is State.RESIDENT


def load_all(executor: Executor, *names: str, size: int = 4) -> list[VersionKey]:
    keys = [executor.add(name, "1", size) for name in names]
    for key in keys:
        executor.now_s += 1
        executor.take(executor.registry.load(key.name))
        executor.finish_all()
    return keys


def test_the_least_recently_used_goes_first(executor):
    a, b = load_all(executor, "a", "b")
    executor.now_s += 1
    executor.acquire("r", "a")
    executor.take(executor.registry.release("r"))
    executor.add("c", "1", 5)
    executor.acquire("s", "c")
    executor.finish(VersionKey("c", "1"))
    assert executor.jobs == {b: "free"}
    assert executor.status(VersionKey("c", "1")).waits_for == "memory"
    executor.finish_all()
    assert isinstance(executor.answers["s"], Grant)
    assert (executor.state(a), executor.state(b)) == (State.RESIDENT, State.EVICTED)


def test_what_is_pinned_or_in_use_stays_and_the_waiting_one_is_told(executor):
    a, b = load_all(executor, "a", "b")
    executor.take(executor.registry.load("a", is_pinned=True))
    executor.acquire("r", "b")
    c = executor.add("c", "1", 4)
    executor.acquire("s", "c", wait_s=5)
    executor.finish(c)
    assert executor.jobs == {}
    assert executor.registry.next_deadline_s == executor.now_s + 5
    executor.now_s += 5
    executor.take(executor.registry.tick())
    assert "within the time" in str(executor.answers["s"])
    assert executor.state(c) is State.ABSENT
    executor.add("d", "1", 7)
    executor.acquire("t", "d")
    executor.finish_all()
    assert str(executor.answers["t"]) == "Aligner `d`: there is no room for it in memory."
    executor.take(executor.registry.release("r"))
    executor.take(executor.registry.unpin("a"))
    executor.acquire("u", "d")
    executor.finish_all()
    assert isinstance(executor.answers["u"], Grant)
    assert {executor.state(a), executor.state(b)} == {State.EVICTED}


def test_what_can_never_fit_is_refused_with_the_numbers(executor):
    key = executor.add("huge", "1", BUDGET + 1)
    executor.acquire("r", "huge")
    executor.finish_all()
    assert f"needs {BUDGET + 1} bytes" in executor.status(key).reason
    assert str(executor.answers["r"]) == "Aligner `huge`: it could not be loaded."
    load_all(executor, "a", "b", size=6)
    executor.acquire("s", "a", "b")
    assert str(executor.answers["s"]) == "Aligner `a`, `b`: there is no room for it in memory."


def test_a_load_that_took_more_than_it_said_is_undone(executor):
    load_all(executor, "a")
    key = executor.add("b", "1", 6)
    executor.acquire("r", "b")
    executor.finish(key)
    executor.jobs.pop(key)
    executor.take(executor.registry.loaded(key, 7, "cpu"))
    assert isinstance(executor.answers["r"], AlignerUnavailable)
    executor.finish(key)
    assert (executor.state(key), executor.registry.held_bytes) == (State.FAILED, 4)


def test_a_failure_is_remembered_for_a_while_and_then_tried_again():
    executor = Executor(retry_failed_s=30)
    key = executor.add("polite", "v1")
    executor.acquire("r", "polite")
    executor.fail(key, "no such file")
    assert executor.status(key).reason == "no such file"
    assert "no such file" not in str(executor.answers["r"]), "it may be none of the client's business"
    with pytest.raises(AlignerUnavailable, match="could not be loaded"):
        executor.acquire("s", "polite")
    executor.now_s += 30
    executor.acquire("t", "polite")
    executor.finish_all()
    assert isinstance(executor.answers["t"], Grant)


def test_changed_files_get_a_new_chance_at_once(executor):
    key = executor.add("polite", "v1")
    executor.acquire("r", "polite")
    executor.fail(key)
    executor.add("polite", "v1")
    executor.acquire("s", "polite")
    executor.finish_all()
    assert isinstance(executor.answers["s"], Grant)


def test_only_so_many_jobs_run_and_only_so_many_requests_wait():
    executor = Executor(max_jobs=2, max_waiting=3)
    keys = [executor.add(name, "1") for name in "abcd"]
    for key in keys[:3]:
        executor.acquire(key.name, key.name)
    assert executor.jobs == {keys[0]: "verify", keys[1]: "verify"}
    assert executor.status(keys[2]).waits_for == "turn"
    with pytest.raises(QueueFull):
        executor.acquire("d", "d")
    executor.take(executor.registry.release("c"))
    assert executor.acquire("d", "d") is None
    executor.finish_all()
    assert "c" not in executor.answers
    assert executor.state(keys[2]) is State.ABSENT


def test_two_that_need_what_the_other_has_do_not_wait_for_ever():
    executor = Executor(2, max_jobs=4)
    for name in "abcd":
        executor.add(name, "1")
    executor.acquire("first", "a", "b")
    executor.acquire("second", "c", "d")
    executor.finish_all()
    assert isinstance(executor.answers["first"], Grant)
    assert "second" not in executor.answers
    executor.take(executor.registry.release("first"))
    executor.finish_all()
    assert isinstance(executor.answers["second"], Grant)


def test_removing_refuses_who_waits_and_lets_who_runs_finish(executor):
    v1, v2 = polite(executor)
    executor.acquire("runs", "polite")
    executor.take(executor.registry.promote("polite", "v2"))
    executor.add("other", "1")
    executor.acquire("waits", "polite", "other")
    told = executor.take(executor.registry.remove("polite"))
    assert {type(action) for action in told} == {PromotionFailed, Refuse}
    assert isinstance(executor.answers["waits"], UnknownModel)
    with pytest.raises(UnknownModel):
        executor.acquire("new", "polite")
    with pytest.raises(UnknownModel):
        executor.registry.promote("polite", "v1")
    assert executor.state(v1) is State.DRAINING
    executor.take(executor.registry.release("runs"))
    executor.finish_all()
    assert [aligner.name for aligner in executor.registry.status()] == ["other"]
    assert executor.registry.held_bytes == 0
    assert v2 not in executor.jobs


def test_withdrawn_files_serve_from_memory_until_evicted(executor):
    polite(executor)
    executor.take(executor.registry.withdraw("polite", "v1"))
    executor.acquire("r", "polite")
    assert executor.version_of("r") == "v1"
    executor.take(executor.registry.release("r"))
    executor.take(executor.registry.unload("polite", "v1"))
    executor.finish_all()
    assert [each.key.version for each in executor.registry.status()[0].versions] == ["v2"]
    assert executor.registry.status()[0].shares == {"v2": 1.0}, "the only one that is left"
    executor.acquire("t", "polite")
    executor.finish_all()
    assert executor.version_of("t") == "v2"


def test_unloading_gives_memory_back_and_a_request_brings_it_in_again(executor):
    v1, _ = polite(executor)
    executor.take(executor.registry.unload("polite"))
    assert executor.jobs == {v1: "free"}
    assert executor.acquire("r", "polite") is None
    executor.finish_all()
    assert isinstance(executor.answers["r"], Grant)


def test_when_the_executor_loses_its_memory_what_was_there_comes_back():
    executor = Executor(max_jobs=1)
    a, b = load_all(executor, "a", "b")
    executor.now_s += 1
    executor.acquire("r", "a")
    executor.add("c", "1", 2)
    executor.acquire("w", "c")
    executor.lose()
    executor.finish_all()
    loads = [action.key for action in executor.log if isinstance(action, StartLoad)][2:]
    assert loads == [VersionKey("c", "1"), a, b], "who waits first, then the last used"
    assert isinstance(executor.answers["w"], Grant)
    assert executor.status(a).num_references == 0
    executor.take(executor.registry.release("r"))
    assert executor.status(a).num_references == 0


MINUS = (Term("self"), Term("small", -1.0))


def test_presets_come_to_sums_and_contrasts():
    executor = Executor(100, max_jobs=9)
    for name in ("big", "small", "kind"):
        executor.add(name, "1")
    executor.add("contrast", "1", terms=(Term("big"), Term("small", -1.0)))
    executor.add("both", "1", terms=(Term("contrast", 0.5), Term("kind", 2.0)), strength=3.0)
    executor.acquire("r", "both")
    executor.finish_all()
    grant = executor.answers["r"]
    assert isinstance(grant, Grant)
    assert grant.resolution.chosen == (VersionKey("both", "1"),)
    assert {term.key.name: term.strength for term in grant.resolution.terms} == {
        "big": 1.5,
        "small": -1.5,
        "kind": 6.0,
    }
    executor.acquire("s", AskedAligner("contrast", 2.0), AskedAligner("small", 2.0))
    grant = executor.answers["s"]
    assert isinstance(grant, Grant)
    assert [(term.key.name, term.part, term.strength) for term in grant.resolution.terms] == [
        ("big", ".", 2.0),
        ("small", ".", 0.0),
    ]


def test_an_aligner_of_own_and_other_models_needs_them_all():
    executor = Executor(100, max_jobs=9)
    executor.add("small", "1")
    executor.add("tuned", "1", terms=(Term("self"), Term("./before", -0.5), Term("small", -1.0)))
    executor.acquire("r", "tuned")
    executor.finish_all()
    grant = executor.answers["r"]
    assert isinstance(grant, Grant)
    assert [(term.key.name, term.part, term.strength) for term in grant.resolution.terms] == [
        ("tuned", ".", 1.0),
        ("tuned", "./before", -0.5),
        ("small", ".", -1.0),
    ]


def test_presets_that_lead_nowhere_are_refused(executor):
    executor.add("a", "1", terms=(Term("b"),))
    with pytest.raises(UnknownModel, match="`b`"):
        executor.acquire("r", "a")
    executor.add("b", "1", terms=(Term("a"),))
    with pytest.raises(InvalidRequest, match="made of itself"):
        executor.acquire("r", "a")
    executor.add("leaf", "1")
    for level in range(20):
        inner = f"level-{level - 1}" if level else "leaf"
        for twin in ("", "-twin"):
            executor.add(f"level-{level}{twin}", "1", terms=(Term(inner), Term(f"{inner}-twin")))
        executor.add("leaf-twin", "1")
    with pytest.raises(InvalidRequest, match="terms"):
        executor.acquire("r", "level-19")
    executor.add("loud", "1", terms=(Term("leaf", 90.0),))
    with pytest.raises(InvalidRequest, match="strength"):
        executor.acquire("r", AskedAligner("loud", 2.0))


@pytest.mark.parametrize(
    ("name", "version", "terms"),
    [
        ("../up", "1", MINUS),
        ("polite", "a/b", MINUS),
        ("identity", "1", MINUS),
        ("polite", "1", ()),
        ("polite", "1", (Term("polite"),)),
    ],
)
def test_names_and_terms_that_cannot_be_are_refused(executor, name, version, terms):
    with pytest.raises(InvalidRequest):
        executor.registry.add(name, version, "/", terms=terms)


@pytest.mark.parametrize("weights", [{}, {"v2": 0.0}, {"v2": -1.0}, {"v2": math.nan}, {"v2": math.inf}])
def test_shares_must_be_positive(executor, weights):
    polite(executor)
    with pytest.raises(InvalidRequest):
        executor.registry.promote("polite", weights)
    with pytest.raises(UnknownModel):
        executor.registry.promote("polite", "v9")


@pytest.mark.parametrize("weights", [{"v2": 0.1, "v1": 0.9}, {"a": 1.0, "b": 2.0, "c": 5.0}])
def test_shares_are_the_weights_within_four_standard_deviations(weights):
    num_keys = 20_000
    seen = Counter(choose(weights, salt="polite", key=f"user-{number}") for number in range(num_keys))
    for version, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(seen[version] - num_keys * share) <= 4 * math.sqrt(num_keys * share * (1 - share))


def test_a_larger_weight_moves_keys_to_that_version_only():
    before, after = {"v1": 0.5, "v2": 0.1, "v3": 0.4}, {"v1": 0.5, "v2": 0.3, "v3": 0.4}
    moved = [
        (choose(before, salt="", key=str(key)), choose(after, salt="", key=str(key))) for key in range(3000)
    ]
    assert {new for old, new in moved if old != new} == {"v2"}
    chosen = [choose(after, salt=salt, key=str(key)) for key in range(300) for salt in "ab"]
    assert chosen[::2] != chosen[1::2], "the same users are not the canary of every aligner"


def test_a_choice_is_the_same_in_every_process_and_release():
    keys = ["", "acme", "ünïcode", "lone \ud800 surrogate"]
    weights = {"v1": 1.0, "v2": 1.0}
    assert [choose(weights, salt="polite", key=key) for key in keys] == ["v2", "v1", "v2", "v1"]


def idle(name: str, num_bytes: int, last_used_s: float, **state: object) -> Version:
    version = Version(VersionKey(name, "1"), "/", state=State.RESIDENT, last_used_s=last_used_s)
    version.held_bytes = num_bytes
    for field, value in state.items():
        setattr(version, field, value)
    return version


def test_nobody_goes_unless_that_makes_room():
    versions = [idle("a", 3, 1), idle("b", 3, 2), idle("c", 3, 3, num_references=1)]
    room = Room(versions, 10)
    assert room.reserve(8, ()) == (False, [])
    assert room.reserve(7, ()) == (False, versions[:2])


def test_what_is_being_freed_is_waited_for_and_nobody_else_goes():
    versions = [idle("a", 4, 1, is_freeing=True), idle("b", 4, 2)]
    room = Room(versions, 10)
    assert room.reserve(5, ()) == (False, [])
    assert room.reserve(2, ()) == (False, [versions[1]]), "2 were free and 4 will be, and 5 are promised"


def test_what_is_free_is_given_once_and_protected_ones_stay():
    versions = [idle("a", 4, 1), idle("b", 3, 2)]
    room = Room(versions, 10)
    assert room.reserve(3, ()) == (True, [])
    assert room.reserve(1, {versions[0].key}) == (False, [versions[1]])


def test_an_old_version_stays_for_a_request_that_had_chosen_it_and_still_waits():
    executor = Executor(max_jobs=3)
    v1, v2 = polite(executor)
    other = executor.add("other", "1", 2)
    executor.acquire("r", "polite", "other")
    executor.take(executor.registry.promote("polite", "v2"))
    executor.finish(v2)
    executor.finish(v2)
    assert executor.registry.status()[1].shares == {"v2": 1.0}
    assert executor.state(v1) is State.DRAINING
    assert v1 not in executor.jobs
    executor.finish(other)
    executor.finish(other)
    assert executor.version_of("r") == "v1"
    executor.take(executor.registry.release("r"))
    assert executor.jobs == {v1: "free"}


def test_who_waits_for_files_that_are_withdrawn_is_told(executor):
    executor.add("busy", "1")
    executor.acquire("first", "busy")
    executor.add("polite", "v1")
    executor.acquire("waits", "polite")
    executor.take(executor.registry.withdraw("polite", "v1"))
    assert "has been removed" in str(executor.answers["waits"])
    executor.finish_all()
    assert [aligner.name for aligner in executor.registry.status()] == ["busy"]


def test_a_version_is_used_until_its_last_request_ends(executor):
    a, b = load_all(executor, "a", "b")
    for passed_s, name in ((1, "a"), (2, "b")):
        executor.now_s += passed_s
        executor.acquire(name, name)
    executor.take(executor.registry.release("b"))
    executor.now_s += 1
    executor.take(executor.registry.release("a"))
    executor.add("c", "1", 4)
    executor.acquire("r", "c")
    executor.finish(VersionKey("c", "1"))
    assert executor.jobs == {b: "free"}
    assert executor.state(a) is State.RESIDENT
