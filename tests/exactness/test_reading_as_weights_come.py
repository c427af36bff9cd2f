"""An aligner reads the prompts that wait for it while its weights come: the same answer, and nobody waits."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ram_core.engine import load_share
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerOutcome,
    AlignerProgress,
    Cancel,
    FailedEvent,
    FreeAligner,
    LoadAligner,
    Prefill,
    Request,
)
from ram_core.engine.pace import Pace
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.runner import LaunchedStep, Runner
from ram_core.errors import AlignerUnavailable
from ram_core.models import filling
from ram_core.models.paged import PagedModel
from ram_core.params import AlignerTerm, AlignmentParams
from tests.exactness.test_engine import IDENTITY
from tests.exactness.test_prefill import SAMPLED, WAYS, text, tokens
from tests.exactness.test_prefix_cache import drain
from tests.models import save_pair

NEW = AlignmentParams((AlignerTerm("new@1", 0.7),))
BOTH = AlignmentParams((AlignerTerm("polite@1"), AlignerTerm("new@1", -0.5)))
PATIENCE_S = 60
ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    proposal, aligners = save_pair(root, aligners=("polite", "new"), vocab_size=320, layers=3)
    return {"proposal": proposal, **aligners}


@pytest.fixture(scope="module")
def broken(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last weight that comes is no number."""
    path = shutil.copytree(sources["new"], tmp_path_factory.mktemp("broken") / "new")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def engine_with(sources: dict[str, Path], *aligners: str, **options: Any) -> Engine:
    begun = tuple(AlignerSource(f"{name}@1", str(sources[name])) for name in aligners)
    config = EngineConfig(
        str(sources["proposal"]), begun, device="cpu", max_batch=8, page_size=4, aligner_slots=3
    )
    engine = Engine.load(replace(config, **options))
    if options.get("cuda_graphs"):
        engine.capture()
    return engine


@pytest.fixture
def engine(sources: dict[str, Path]) -> Engine:
    return engine_with(sources, "polite")


class Flow:
    """Lets loads go on, weight by weight; they are expected as soon as their first weight has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits = threading.Semaphore(0)
        self._is_held = threading.Event()
        monkeypatch.setattr(filling, "_PATIENCE_S", PATIENCE_S)
        monkeypatch.setattr(load_share, "_LEAST_READ", 0.0)
        monkeypatch.setattr(load_share, "_SOON_S", float("inf"))
        monkeypatch.setattr(Pace, "rest", lambda pace: self._rest())

    def _rest(self) -> None:
        assert self._permits.acquire(timeout=PATIENCE_S)

    def let(self, num_weights: int) -> None:
        self._permits.release(num_weights)

    def drip(self) -> None:
        """The rest, but never as fast as it is asked for."""

        def work() -> None:
            while not self._is_held.wait(0.002):
                self.let(1)

        self._is_held.clear()
        threading.Thread(target=work, daemon=True).start()

    def hold(self) -> None:
        """No more, until somebody says so."""
        self._is_held.set()
        while self._permits.acquire(timeout=0.01):
            pass


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flow]:
    flow = Flow(monkeypatch)
    yield flow
    flow.let(1000)
    flow._is_held.set()


def ask(length: int, alignment: AlignmentParams = NEW, name: str = "a", start: int = 20) -> Request:
    return Request(name, tuple(range(start, start + length)), SAMPLED, alignment)


def order(path: Path) -> LoadAligner:
    return LoadAligner("new@1", (("new@1", str(path)),), ENOUGH)


def wait(engine: Engine, is_there: Callable[[list[AlignerOutcome]], object]) -> list[AlignerOutcome]:
    """What is told of aligners until something is there, without a step."""
    told: list[AlignerOutcome] = []
    deadline = time.monotonic() + PATIENCE_S
    while not is_there(told):
        assert time.monotonic() < deadline
        time.sleep(0.001)
        told += [each for each in engine.tend() if not isinstance(each, AlignerProgress)]
    return told


def outcome(engine: Engine) -> AlignerOutcome:
    [told] = wait(engine, lambda told: told)
    return told


def expect(engine: Engine, flow: Flow, path: Path) -> None:
    """A load under way, of which the first weight has come."""
    engine.handle(order(path))
    flow.let(2)
    wait(engine, lambda told: engine._turnover._expected)


def read(engine: Engine, flow: Flow, path: Path, *requests: Request) -> None:
    """Prompts that the proposal has read, and the aligner as it came."""
    for request in requests:
        engine.handle(Prefill(request))
    assert drain(engine) == []
    expect(engine, flow, path)
    flow.drip()
    assert engine.has_work
    assert drain(engine) == []
    assert isinstance(outcome(engine), AlignerLoaded)


def let_go(engine: Engine, flow: Flow) -> None:
    flow.hold()
    engine.handle(FreeAligner("new@1"))
    assert outcome(engine) == AlignerFreed("new@1")


def num_computed(engine: Engine) -> list[list[int]]:
    """Of every prompt that is read ahead the tokens that each model has read."""
    return [[lane.num_computed for lane in each.lanes] for each in engine._scheduler.prefills]


def count_tokens(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """Of each forward but the proposal's, the number of its tokens."""
    counted: list[int] = []
    forward = PagedModel.forward

    def counting(model: PagedModel, batch: Any, pool: Any) -> Any:
        out = forward(model, batch, pool)
        if model is not engine.bank.proposal:
            counted.append(len(batch.input_ids))
        return out

    monkeypatch.setattr(PagedModel, "forward", counting)
    return counted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alignment", [NEW, BOTH], ids=["one", "two"])
def test_the_answer_is_the_same(
    sources: dict[str, Path], flow: Flow, way: str, alignment: AlignmentParams
) -> None:
    """Every token's numbers too, bit for bit."""
    engine = engine_with(sources, "polite", **WAYS[way])
    plain = engine_with(sources, "polite", "new", **WAYS[way])
    for length in (1, 4, 5, 17, 40):
        # None begins as another one: what a cache has is not read.
        request = ask(length, alignment, start=10 + length)
        expected = tokens(drain(plain, request))
        assert len(expected) == SAMPLED.max_tokens
        read(engine, flow, sources["new"], request)
        assert num_computed(engine) == [[length, length]]
        assert tokens(drain(engine, request)) == expected
        let_go(engine, flow)
    assert engine.stats.num_running == engine.stats.num_pages_used == 0


@pytest.mark.parametrize("length", [1, 17])
def test_nothing_is_read_twice_and_the_first_token_is_only_drawn(
    engine: Engine, sources: dict[str, Path], flow: Flow, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    counted = count_tokens(monkeypatch, engine)
    read(engine, flow, sources["new"], ask(length))
    assert counted == [length]
    engine.handle(ask(length))
    assert len(tokens(engine.step())) == 1
    assert counted == [length]
    drain(engine)
    assert counted == [length] + [1] * (SAMPLED.max_tokens - 1)


def test_prompts_may_come_when_the_aligner_is_nearly_there(
    sources: dict[str, Path], engine: Engine, flow: Flow
) -> None:
    """They are read by both from their start; and so is one that comes in the midst of its own."""
    engine.handle(Prefill(ask(40, name="before")))
    expect(engine, flow, sources["new"])
    engine.handle(Prefill(ask(17, name="then")))
    flow.drip()
    drain(engine)
    assert num_computed(engine) == [[40, 40], [17, 17]]
    assert isinstance(outcome(engine), AlignerLoaded)
    plain = engine_with(sources, "new")
    for request in (ask(40, name="before"), ask(17, name="then")):
        name = request.request_id
        assert text(drain(engine, request), name) == text(drain(plain, request), name)


def test_a_forward_waits_for_its_weights_and_not_for_ever(
    engine: Engine, sources: dict[str, Path], flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.handle(Prefill(ask(17)))
    drain(engine)
    used = engine.stats.num_pages_used
    monkeypatch.setattr(filling, "_PATIENCE_S", 0.05)
    expect(engine, flow, sources["new"])
    began = time.monotonic()
    assert engine.step() == []
    assert time.monotonic() - began >= 0.05
    assert num_computed(engine) == [[17]]
    assert engine.stats.num_pages_used == used
    assert not engine.has_work, "it is not tried again"
    flow.drip()
    assert isinstance(outcome(engine), AlignerLoaded)
    assert not engine.has_work
    assert tokens(drain(engine, ask(17))) == tokens(drain(engine_with(sources, "new"), ask(17)))


def test_it_is_another_models_forward_that_is_given_up(
    engine: Engine, sources: dict[str, Path], flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the proposal would have read in that step, it reads in the next one."""
    expect(engine, flow, sources["new"])
    engine.handle(Prefill(ask(17)))
    monkeypatch.setattr(filling, "_PATIENCE_S", 0.01)
    assert engine.step() == []
    assert num_computed(engine) == [[0]]
    assert drain(engine) == []
    assert num_computed(engine) == [[17]]
    flow.drip()
    assert isinstance(outcome(engine), AlignerLoaded)
    assert tokens(drain(engine, ask(17))) == tokens(drain(engine_with(sources, "new"), ask(17)))


@pytest.mark.parametrize("kind", ["no number", "cut off"])
@pytest.mark.parametrize("begun", [("polite",), ()], ids=["beside another", "alone"])
def test_a_load_that_fails_takes_everything_along(
    sources: dict[str, Path], broken: Path, flow: Flow, kind: str, begun: tuple[str, ...], tmp_path: Path
) -> None:
    engine = engine_with(sources, *begun)
    if not begun:
        # An aligner that is gone has left its module to the next one.
        flow.drip()
        engine.handle(order(sources["new"]))
        assert isinstance(outcome(engine), AlignerLoaded)
        let_go(engine, flow)
    engine.handle(Prefill(ask(17)))
    drain(engine)
    used, groups = engine.stats.num_pages_used, dict(engine.bank.group_by_name)
    path = broken
    if kind == "cut off":
        path = shutil.copytree(sources["new"], tmp_path / "new")
    expect(engine, flow, path)
    if kind == "cut off":
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(9000)
    flow.drip()
    assert drain(engine) == []
    assert isinstance(outcome(engine), AlignerFailed)
    assert num_computed(engine) == [[17]]
    assert engine.stats.num_pages_used == used
    assert engine.bank.group_by_name == groups
    engine.handle(order(sources["new"]))
    assert isinstance(outcome(engine), AlignerLoaded)
    assert tokens(drain(engine, ask(17))) == tokens(drain(engine_with(sources, "new"), ask(17)))
    assert engine.stats.num_pages_used == 0


def test_a_step_that_has_not_heard_of_a_failure_does_not_run_on_what_there_is(
    engine: Engine, sources: dict[str, Path], broken: Path, flow: Flow
) -> None:
    engine.handle(Prefill(ask(17)))
    drain(engine)
    expect(engine, flow, broken)
    flow.drip()
    [group] = engine.bank.groups
    deadline = time.monotonic() + PATIENCE_S
    while len(group.free_slots) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert engine.step() == []
    assert num_computed(engine) == [[17]]
    assert isinstance(outcome(engine), AlignerFailed)


def test_an_aligner_that_is_not_wanted_any_more_leaves_nothing(
    engine: Engine, sources: dict[str, Path], flow: Flow
) -> None:
    engine.handle(Prefill(ask(17)))
    drain(engine)
    used = engine.stats.num_pages_used
    expect(engine, flow, sources["new"])
    flow.drip()
    drain(engine)
    assert num_computed(engine) == [[17, 17]]
    engine.handle(FreeAligner("new@1"))
    assert outcome(engine) == AlignerFreed("new@1")
    assert num_computed(engine) == [[17]]
    assert engine.stats.num_pages_used == used
    assert [group.names for group in engine.bank.groups] == [("polite@1",)]
    engine.handle(Cancel("a"))
    drain(engine)
    assert engine.stats.num_pages_used == 0


def test_one_that_goes_before_the_request_comes_fails_only_that(
    engine: Engine, sources: dict[str, Path], flow: Flow
) -> None:
    read(engine, flow, sources["new"], ask(17))
    engine.handle(FreeAligner("new@1"))
    assert drain(engine) == []
    assert outcome(engine) == AlignerFreed("new@1")
    assert num_computed(engine) == [[17]]
    [failed] = drain(engine, ask(17))
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, AlignerUnavailable)
    assert engine.stats.num_running == engine.stats.num_pages_used == 0


def test_nobody_else_waits_for_weights(
    engine: Engine, sources: dict[str, Path], flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[set[bool]] = []
    launch = Runner.launch

    def watched(runner: Runner, rows: Sequence[ScheduledRow]) -> LaunchedStep:
        launched.append({row.sequence.is_expecting for row in rows})
        return launch(runner, rows)

    monkeypatch.setattr(Runner, "launch", watched)
    engine.handle(Prefill(ask(17)))
    drain(engine)
    expect(engine, flow, sources["new"])
    other = ask(5, IDENTITY, "other")
    engine.handle(other)
    for _ in range(SAMPLED.max_tokens):
        assert engine.step()
    assert launched == [{False}] * (1 + SAMPLED.max_tokens)
    flow.drip()
    drain(engine)
    assert launched[-1] == {True}
    assert num_computed(engine) == [[17, 17]]


def test_without_room_it_waits_for_the_request(engine: Engine, sources: dict[str, Path], flow: Flow) -> None:
    engine.handle(Prefill(ask(17)))
    drain(engine)
    book = engine._scheduler.books[engine.bank.pool_of["polite@1"]]
    taken = book.take(book.num_free - 4)
    expect(engine, flow, sources["new"])
    assert num_computed(engine) == [[17]]
    assert not engine.has_work
    book.give_back(taken)
    flow.drip()
    assert isinstance(outcome(engine), AlignerLoaded)
    assert len(tokens(drain(engine, ask(17)))) == SAMPLED.max_tokens


def test_it_gives_way_to_who_needs_its_pages(engine: Engine, sources: dict[str, Path], flow: Flow) -> None:
    read(engine, flow, sources["new"], ask(40))
    book = engine._scheduler.books[engine.bank.pool_of["polite@1"]]
    taken = book.take(book.num_free)
    other = ask(5, AlignmentParams((AlignerTerm("polite@1"),)), "other")
    assert len(tokens(drain(engine, other), "other")) == SAMPLED.max_tokens
    assert num_computed(engine) == []
    book.give_back(taken)
    assert engine.stats.num_pages_used == 0
    assert tokens(drain(engine, ask(40))) == tokens(drain(engine_with(sources, "new"), ask(40)))


@pytest.mark.parametrize("alignment", [IDENTITY, AlignmentParams((AlignerTerm("polite@1"),))])
def test_a_request_may_come_for_other_aligners_than_were_announced(
    engine: Engine, sources: dict[str, Path], flow: Flow, alignment: AlignmentParams
) -> None:
    read(engine, flow, sources["new"], ask(17))
    expected = text(drain(engine_with(sources, "polite"), ask(17, alignment)))
    assert text(drain(engine, ask(17, alignment))) == expected
    assert engine.stats.num_running == engine.stats.num_pages_used == 0


def test_of_several_models_none_is_expected(engine: Engine, sources: dict[str, Path], flow: Flow) -> None:
    """One that fails would take another along that is read with already."""
    flow.drip()
    place = str(sources["new"])
    engine.handle(Prefill(ask(17, AlignmentParams((AlignerTerm("two@1"), AlignerTerm("two@1/part"))))))
    drain(engine)
    engine.handle(LoadAligner("two@1", (("two@1", place), ("two@1/part", place)), ENOUGH))
    assert isinstance(outcome(engine), AlignerLoaded)
    assert num_computed(engine) == [[17]]
