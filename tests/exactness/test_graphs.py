"""Recorded steps against steps that run as they come: the same tokens, whatever the batches do.

There are two recorders that need no device. One runs each step anew on memory like a graph's. The other
traces it: what it replays has no Python left, every integer in it is baked in, as it is in a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ram_core.engine import runner
from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.graphs import MAX_GRAPHS, EagerRecorder, Recording, StepGraphs, graph_shapes
from ram_core.engine.layout import ModelUse, PackedStep, StepLayout, bucket, buckets
from ram_core.engine.messages import Cancel, FailedEvent, Request, TokenEvent
from ram_core.models import attention, fused_layers, packed_linear
from ram_core.models.packing import TRASH_PAGE
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import StepFeatures
from ram_core.resampling.step import draw_with_tensors
from tests.exactness.test_engine import ALIGNED, IDENTITY, PROMPTS, TERSE, TWICE, anew, make_config

NEGATIVE = AlignerTerm("polite", -0.5)
PLAIN = SamplingParams()
CUT = SamplingParams(top_p=0.6, top_k=40, num_top_log_probs=3)
Told = dict[tuple[str, int], list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    config = make_config(tmp_path_factory.mktemp("llama"), "llama")
    # What a trace can be made of: on CPU a bank looks at the mix of aligners.
    return replace(config, max_batch=4, max_model_len=128, aligner_bank=False)


def requests(*kinds: AlignmentParams, sampling: SamplingParams = PLAIN, num: int = 8) -> list[Request]:
    """Of many lengths, so that batches shrink and grow; two of each prompt, the second a hit in the cache."""
    return [
        Request(
            str(index),
            PROMPTS[index // 2 % len(PROMPTS)],
            replace(sampling, seed=index, max_tokens=4 + 5 * (index % 4), ignore_eos=True),
            kinds[index % len(kinds)],
        )
        for index in range(num)
    ]


def serve(engine: Engine, asked: list[Request], *, cancelled: str = "", every: int = 2) -> Told:
    """One request more `every` so many steps, one cancelled on its way; all that was told of tokens."""
    waiting = list(asked)
    told: Told = {}
    step = 0
    while waiting or engine.has_work:
        if waiting and step % every == 0:
            engine.handle(waiting.pop(0))
        if cancelled and len(told.get((cancelled, 0), [])) >= 2:
            engine.handle(Cancel(cancelled))
        for event in engine.step():
            assert not isinstance(event, FailedEvent)
            if isinstance(event, TokenEvent):
                place = told.setdefault((event.request_id, event.index), [])
                place.append((event.token_id, event.finish_reason, event.top_log_probs, event.telemetry))
        step += 1
    assert engine.stats.num_pages_used == 0
    told.pop((cancelled, 0), None)
    return told


class Traced:
    """A step as a list of operations on memory of its own; traced when it is first wanted."""

    def __init__(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> None:
        self._step, self._blank = step, numbers
        self._numbers = numbers.clone()
        self._run: Callable[[Tensor], Tensor] | None = None

    def replay(self, numbers: Tensor) -> Tensor:
        if self._run is None:
            self._run = make_fx(self._step)(self._blank)
        self._numbers.copy_(numbers)
        return self._run(self._numbers)


class TracingRecorder:
    def record(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> Recording:
        return Traced(step, numbers)


@pytest.fixture
def in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read and drawn as on a device, in tensor operations, of which a trace can be made."""
    monkeypatch.setattr(runner, "draw_tokens", draw_with_tensors)
    monkeypatch.setattr(attention, "can_attend", lambda query: False)
    monkeypatch.setattr(fused_layers, "_can_run", lambda *tensors: False)
    monkeypatch.setattr(packed_linear, "multiply", multiply_in_tensors)


def multiply_in_tensors(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    return x @ panels.transpose(1, 2).flatten(0, 1).T + bias


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[StepLayout, bool]:
    """Every padded layout that occurs, and whether it was replayed."""
    seen: dict[StepLayout, bool] = {}
    replay = StepGraphs.replay

    def watch(self: StepGraphs, layout: StepLayout, numbers: Tensor) -> Tensor | None:
        table = replay(self, layout, numbers)
        if layout.uses[0].is_fed and layout.num_drawing == layout.uses[0].batch.num_tokens:
            seen[layout] = table is not None
        else:
            assert table is None
        return table

    monkeypatch.setattr(StepGraphs, "replay", watch)
    return seen


def tokens(told: Told) -> dict[tuple[str, int], list[int]]:
    return {name: [about[0] for about in drawn] for name, drawn in told.items()}


@pytest.mark.parametrize("is_overlapping", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_replayed_steps_draw_what_steps_draw_as_they_come(
    loaded: Engine, seen: dict[StepLayout, bool], is_overlapping: bool, prefix_cache: bool
) -> None:
    """Batches grow, shrink and mix; one request is cancelled, prompts are found in the cache.

    What is told is the same to the last bit as from padded steps that nobody recorded.
    """
    changes = {"is_overlapping": is_overlapping, "prefix_cache": prefix_cache}
    asked = requests(*[ALIGNED, ALIGNED, IDENTITY] * 4, TERSE, TWICE, num=14)
    plain = serve(anew(loaded, **changes), asked, cancelled="5")
    padded = serve(anew(loaded, cuda_graphs=True, **changes), asked, cancelled="5")
    seen.clear()
    engine = anew(loaded, cuda_graphs=True, **changes)
    engine.capture()
    told = serve(engine, asked, cancelled="5")
    assert told == padded
    assert tokens(told) == tokens(plain)
    replayed = {layout for layout, is_replayed in seen.items() if is_replayed}
    assert {layout.num_drawing for layout in replayed} == {1, 2, 4}
    assert {len(layout.uses) for layout in replayed} == {1, 2}
    assert {len(layout.uses) for layout in seen.keys() - replayed} == {3}, "mixes run as they come"
    assert len({layout.uses[0].batch.num_pages for layout in replayed}) == 2


def test_one_recording_serves_any_mix_of_aligners_that_share_a_module(
    config: EngineConfig, seen: dict[StepLayout, bool]
) -> None:
    banked = Engine.load(replace(config, aligner_bank=True))
    asked = requests(ALIGNED, TERSE)
    padded = serve(anew(banked, cuda_graphs=True), asked)
    seen.clear()
    engine = anew(banked, cuda_graphs=True)
    engine.capture()
    assert serve(engine, asked) == padded
    assert all(seen.values())
    assert {len(layout.uses) for layout in seen} == {2}


@pytest.mark.usefixtures("in_tensors")
@pytest.mark.parametrize(
    ("sampling", "is_overlapping"), [(PLAIN, True), (CUT, False)], ids=["overlapping", "cut"]
)
def test_traced_steps_draw_what_steps_draw_as_they_come(
    loaded: Engine, seen: dict[StepLayout, bool], sampling: SamplingParams, is_overlapping: bool
) -> None:
    asked = requests(IDENTITY, ALIGNED, sampling=sampling, num=4)
    padded = serve(anew(loaded, cuda_graphs=True, is_overlapping=is_overlapping), asked, cancelled="2")
    seen.clear()
    engine = anew(loaded, cuda_graphs=True, is_overlapping=is_overlapping)
    engine.capture(recorder=TracingRecorder())
    assert serve(engine, asked, cancelled="2") == padded
    assert all(seen.values())
    assert {layout.num_drawing for layout in seen} >= {1, 2}
    assert {layout.features.has_top_p for layout in seen} == {sampling is CUT}


class ForgetfulGraphs(StepGraphs):
    """Takes layouts for equal that differ in nothing but what it forgets; the first to be recorded stays."""

    forget: Callable[[StepLayout], StepLayout]

    def _record(self, packed: PackedStep) -> None:
        super()._record(packed)
        recording = self._recordings.pop(packed.layout)
        self._recordings.setdefault(self.forget(packed.layout), recording)

    def replay(self, layout: StepLayout, numbers: Tensor) -> Tensor | None:
        return super().replay(self.forget(layout), numbers)


def changed_uses(layout: StepLayout, change: Callable[[ModelUse], ModelUse]) -> StepLayout:
    return replace(layout, uses=tuple(change(use) for use in layout.uses))


def without_rows(use: ModelUse) -> ModelUse:
    return replace(use, batch=replace(use.batch, query_lens=(), num_decode=0, num_logits=0))


FORGET: dict[str, Callable[[StepLayout], StepLayout]] = {
    "features": lambda layout: replace(layout, features=StepFeatures()),
    "rows": lambda layout: replace(changed_uses(layout, without_rows), num_drawing=0),
    "pages": lambda layout: changed_uses(
        layout, lambda use: replace(use, batch=replace(use.batch, num_pages=0))
    ),
    "models": lambda layout: changed_uses(layout, lambda use: replace(use, model="")),
}


@pytest.mark.usefixtures("in_tensors")
@pytest.mark.parametrize("what", FORGET)
def test_a_key_that_forgets_anything_draws_something_else_or_fails(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(ForgetfulGraphs, "forget", staticmethod(FORGET[what]), raising=False)
    asked = requests(TERSE, sampling=CUT, num=2)
    padded = serve(anew(loaded, cuda_graphs=True), asked)
    monkeypatch.setattr(runner, "StepGraphs", ForgetfulGraphs)
    engine = anew(loaded, cuda_graphs=True)
    engine.capture(recorder=TracingRecorder())
    try:
        is_right = serve(engine, asked) == padded
    except RuntimeError:
        is_right = False
    assert not is_right


@pytest.mark.parametrize(
    "alignment",
    [TWICE, replace(ALIGNED, resampling=Resampling.CANDIDATES), replace(ALIGNED, terms=(NEGATIVE,))],
    ids=["two aligners", "candidates", "a negative strength"],
)
def test_what_is_rarely_asked_runs_as_it_comes(
    loaded: Engine, seen: dict[StepLayout, bool], alignment: AlignmentParams
) -> None:
    engine = anew(loaded, cuda_graphs=True)
    engine.capture()
    asked = requests(alignment, num=2)
    assert tokens(serve(engine, asked)) == tokens(serve(anew(loaded), asked))
    assert seen
    assert not any(seen.values())


def test_nobody_sees_what_a_recording_does(loaded: Engine) -> None:
    """Steps are recorded on padding: it writes to the trash page and to the slot of nobody."""
    engine = anew(loaded, cuda_graphs=True)
    engine.capture()
    for pool in engine.bank.pools.values():
        for memory in (*pool.keys, *pool.values):
            assert memory[TRASH_PAGE].any()
            assert not memory[TRASH_PAGE + 1 :].any()
    assert not engine._runner._last_tokens[:-1].any()


class Exhausted(EagerRecorder):
    """Has memory for so many recordings."""

    def __init__(self, num_recordings: int) -> None:
        self.left = num_recordings

    def record(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> Recording:
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.left -= 1
        return super().record(step, numbers)


def test_without_memory_for_more_recordings_the_rest_of_the_steps_run_as_they_come(
    loaded: Engine, seen: dict[StepLayout, bool], caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests(IDENTITY)
    plain = tokens(serve(anew(loaded), asked))
    engine = anew(loaded, cuda_graphs=True)
    told: list[str] = []
    with caplog.at_level(logging.WARNING):
        assert engine.capture(told.append, Exhausted(2))[0] == "2"
    assert "No more than 2 steps were captured: CUDA out of memory." in caplog.text
    assert [words.partition("/")[0] for words in told] == ["capturing 1", "capturing 2", "capturing 3"]
    assert tokens(serve(engine, asked)) == plain
    assert set(seen.values()) == {False, True}


def test_a_device_that_can_record_nothing_serves_as_it_would_without_recordings(
    loaded: Engine, seen: dict[StepLayout, bool]
) -> None:
    asked = requests(ALIGNED, IDENTITY)
    plain = serve(anew(loaded), asked)
    engine = anew(loaded, cuda_graphs=True)
    assert engine.capture(recorder=Exhausted(0)) == ("0", "CUDA out of memory.")
    assert serve(engine, asked) == plain
    assert not seen


def test_an_engine_tells_how_many_steps_it_captured_before_it_serves(config: EngineConfig) -> None:
    told: list[str] = []
    Engine.load(replace(config, cuda_graphs=True, aligners=(), max_batch=2), told.append)
    assert [words for words in told if words.startswith("capturing")] == [
        f"capturing {index}/8" for index in range(1, 9)
    ]
    [row] = [words for words in told if "captured steps" in words]
    assert row.split()[2] == "8"


@pytest.mark.parametrize("max_batch", [1, 5, 32, 64, 256])
@pytest.mark.parametrize("num_kinds", [1, 2, 9])
def test_shapes_hold_every_step_and_are_few(max_batch: int, num_kinds: int) -> None:
    shapes = graph_shapes(max_batch, 512, num_kinds)
    assert shapes.num_rows(max_batch) >= max_batch
    assert shapes.num_pages(512) == 512
    assert shapes.num_pages(1) <= 512
    num_layouts = len(shapes.rows) * len(shapes.pages) * num_kinds * 2
    assert num_layouts <= MAX_GRAPHS or len(shapes.pages) == 1


def test_sizes_are_few_and_waste_little() -> None:
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert buckets(256)[-4:] == (160, 192, 224, 256)
    for size in range(1, 2000):
        assert size <= bucket(size)
        assert bucket(size) - size < max(8, size / 4)
