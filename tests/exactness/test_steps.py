"""How steps are made: overlapping, of few shapes, in parts for want of memory. None of it changes a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ram_core.engine import runner
from ram_core.engine.engine import Engine
from ram_core.engine.kv_memory import KvMemory
from ram_core.engine.messages import Cancel, FailedEvent, Request, TokenEvent
from ram_core.engine.pages import pages_for
from ram_core.engine.runner import LaunchedStep, Runner
from ram_core.engine.sequence import Sequence
from ram_core.errors import EngineOutOfMemory
from ram_core.models.packing import PackedBatch
from ram_core.params import SamplingParams
from tests.exactness.test_engine import ALIGNED, IDENTITY, PROMPTS, TERSE, TWICE, anew

KINDS = [ALIGNED, IDENTITY, TERSE, TWICE]


def mixed_requests() -> list[Request]:
    """Sampled, some with stop tokens that are met, lengths all over."""
    return [
        Request(
            str(index),
            prompt,
            SamplingParams(seed=index, max_tokens=6 + index % 9, stop_token_ids=tuple(range(index * 3))),
            KINDS[index % len(KINDS)],
            num_choices=1 + index % 2,
        )
        for index, prompt in enumerate(PROMPTS * 3)
    ]


def serve(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[tuple[int, str | None]]]:
    for request in requests:
        engine.handle(request)
    told: dict[tuple[str, int], list[tuple[int, str | None]]] = {}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, FailedEvent)
            if isinstance(event, TokenEvent):
                place = told.setdefault((event.request_id, event.index), [])
                place.append((event.token_id, event.finish_reason))
    assert engine.stats.num_pages_used == 0
    return told


@pytest.mark.parametrize("max_step_tokens", [0, 9])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_overlapping_steps_draw_what_steps_one_by_one_draw(
    loaded: Engine, max_step_tokens: int, prefix_cache: bool
) -> None:
    changes = {"max_step_tokens": max_step_tokens, "prefix_cache": prefix_cache}
    plain = serve(anew(loaded, is_overlapping=False, **changes), mixed_requests())
    assert serve(anew(loaded, is_overlapping=True, **changes), mixed_requests()) == plain
    reasons = [tokens[-1][1] for tokens in plain.values()]
    assert {"stop", "length"} == set(reasons)


def test_overlapping_steps_survive_preemption(loaded: Engine) -> None:
    tight = replace(loaded.config, kv_memory_bytes=31 * page_bytes(loaded), max_model_len=60)
    plain = serve(anew(loaded), mixed_requests())
    for is_overlapping in (False, True):
        engine = Engine.load(replace(tight, is_overlapping=is_overlapping))
        assert serve(engine, mixed_requests()) == plain
        assert engine.stats.num_preemptions > 0


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_known(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    launch, collect = Runner.launch, LaunchedStep.collect
    monkeypatch.setattr(Runner, "launch", lambda self, rows: order.append("launch") or launch(self, rows))
    monkeypatch.setattr(LaunchedStep, "collect", lambda self: order.append("collect") or collect(self))
    request = Request("r", (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True))
    serve(anew(loaded, is_overlapping=True), [request])
    assert order == ["launch", "launch", "collect", "launch", "collect", "collect"]
    order.clear()
    serve(anew(loaded, is_overlapping=False), [request])
    assert order == ["launch", "collect"] * 3


def test_a_request_cancelled_with_a_step_under_way_leaves_nothing(loaded: Engine) -> None:
    engine = anew(loaded, is_overlapping=True)
    for request in mixed_requests():
        engine.handle(request)
    for _ in range(4):
        engine.step()
    for request in mixed_requests()[:-1]:
        engine.handle(Cancel(request.request_id))
    alive = mixed_requests()[-1]
    told = [event for event in drain(engine) if isinstance(event, TokenEvent)]
    assert {event.request_id for event in told} == {alive.request_id}
    assert engine.stats.num_pages_used == 0


Use = tuple[str, int]
"""A page of a pool."""


class LateSteps:
    """Steps end when they are collected, and until then they may read and write their pages at any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.engine = engine
        self.num_freed = self.num_rewritten = self.most_under_way = 0
        self._under_way: list[tuple[LaunchedStep, dict[Use, set[Sequence]]]] = []
        launch, collect = Runner.launch, LaunchedStep.collect
        monkeypatch.setattr(Runner, "launch", lambda runner, rows: self._begin(launch(runner, rows)))
        monkeypatch.setattr(LaunchedStep, "collect", lambda step: self._end(step) or collect(step))

    def _begin(self, step: LaunchedStep) -> LaunchedStep:
        used: dict[Use, set[Sequence]] = {}
        written: dict[Use, Sequence] = {}
        size = self.engine.bank.page_size
        for row in step.rows:
            for lane, start in zip(row.lanes, row.lane_starts, strict=True):
                for index, page in enumerate(lane.pages[: pages_for(row.end, size)]):
                    used.setdefault((lane.pool, page), set()).add(row.sequence)
                    if index >= start // size:
                        written[lane.pool, page] = row.sequence
        for _, before in self._under_way:
            self.num_rewritten += sum(
                bool(before.get(use, {owner}) - {owner}) for use, owner in written.items()
            )
        self._under_way.append((step, used))
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        return step

    def _end(self, step: LaunchedStep) -> None:
        oldest, used = self._under_way.pop(0)
        assert oldest is step
        books = self.engine._scheduler.books
        self.num_freed += sum(books[pool].num_holders(page) == 0 for pool, page in used)


@pytest.mark.parametrize("is_broken", [False, True])
def test_no_page_of_a_step_is_free_or_rewritten_before_the_step_is_done(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """Sequences end, are cancelled and preempted while steps read them; the control frees pages at once."""
    plain = serve(anew(loaded), mixed_requests())
    tight = replace(loaded.config, kv_memory_bytes=31 * page_bytes(loaded), max_model_len=60)
    engine = Engine.load(replace(tight, is_overlapping=True))
    if is_broken:
        monkeypatch.setattr(KvMemory, "begin_step", lambda self: None)
        monkeypatch.setattr(KvMemory, "end_step", lambda self: None)
    steps = LateSteps(monkeypatch, engine)
    gone = Request("gone", PROMPTS[3], SamplingParams(max_tokens=20, ignore_eos=True), ALIGNED)
    engine.handle(gone)
    for _ in range(3):
        engine.step()
    engine.handle(Cancel("gone"))
    assert serve(engine, mixed_requests()) == plain
    assert engine.stats.num_preemptions > 0
    assert steps.most_under_way == 2
    assert (steps.num_freed > 0, steps.num_rewritten > 0) == (is_broken, is_broken)


def page_bytes(engine: Engine) -> int:
    """Of one page in all pools."""
    return sum(pool.geometry.bytes_per_token * pool.page_size for pool in engine.bank.pools.values())


def drain(engine: Engine) -> list[object]:
    events: list[object] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.parametrize("is_overlapping", [False, True])
def test_steps_that_only_draw_have_few_shapes_and_draw_the_same(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, is_overlapping: bool
) -> None:
    plain = serve(anew(loaded), mixed_requests())
    # Without the cache all lanes of a sequence are equally far, so the proposal's batch tells of all models.
    engine = anew(loaded, has_static_shapes=True, prefix_cache=False, is_overlapping=is_overlapping)
    shapes: set[tuple[int, ...]] = set()
    sampled: set[tuple[int, ...]] = set()
    proposal = engine.bank.proposal
    monkeypatch.setattr(proposal, "forward", watched(proposal.forward, shapes))
    draw_tokens = runner.draw_tokens

    def watch(logits: torch.Tensor, *args: object, **kwargs: object) -> object:
        sampled.add(tuple(logits.shape))
        return draw_tokens(logits, *args, **kwargs)

    monkeypatch.setattr(runner, "draw_tokens", watch)
    assert serve(engine, mixed_requests()) == plain
    rows, pages = {shape[0] for shape in shapes}, {shape[1] for shape in shapes}
    assert rows <= {1, 2, 4, 8}
    assert pages <= {1, 2, 4, 8, 16}
    assert len(rows) > 2
    assert {shape[0] for shape in sampled} <= {1, 2, 3, 4, 5, 6, 7, 8}


def watched(
    forward: Callable[..., torch.Tensor], shapes: set[tuple[int, ...]]
) -> Callable[..., torch.Tensor]:
    """Notes the shape of each batch that only draws."""

    def watch(batch: PackedBatch, pool: object) -> torch.Tensor:
        if batch.num_decode == len(batch.query_lens) == len(batch.logit_tokens):
            shapes.add(tuple(batch.page_table.shape))
        return forward(batch, pool)

    return watch


class Memory:
    """A model whose forwards find no memory above so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, error: Exception) -> None:
        self.max_tokens = 10**9
        self.num_failures = 0
        model = engine.bank.proposal
        forward = model.forward

        def bounded(batch: PackedBatch, pool: object) -> torch.Tensor:
            if len(batch.input_ids) > self.max_tokens:
                self.num_failures += 1
                raise error
            return forward(batch, pool)

        monkeypatch.setattr(model, "forward", bounded)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize("is_overlapping", [False, True])
def test_a_step_without_memory_is_made_in_parts_and_nobody_notices(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception, is_overlapping: bool
) -> None:
    plain = serve(anew(loaded), mixed_requests())
    engine = anew(loaded, is_overlapping=is_overlapping, max_step_tokens=64)
    memory = Memory(monkeypatch, engine, error)
    memory.max_tokens = 20
    assert serve(engine, mixed_requests()) == plain
    assert 0 < memory.num_failures < 12, "the budget of a step should have shrunk"
    assert engine.stats.num_out_of_memory == 0


def test_only_who_does_not_fit_alone_fails(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing above 8 tokens fits, and a step of this engine may not be shorter than 9."""
    engine = anew(loaded, max_step_tokens=64)
    Memory(monkeypatch, engine, OUT_OF_MEMORY[0]).max_tokens = 8
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    for name, length in (("short", 6), ("long", 40), ("short too", 3)):
        engine.handle(Request(name, tuple(range(10, 10 + length)), sampling))
    events = drain(engine)
    [failed] = [event for event in events if isinstance(event, FailedEvent)]
    assert failed.request_id == "long"
    assert isinstance(failed.error, EngineOutOfMemory)
    ended = {e.request_id for e in events if isinstance(e, TokenEvent) and e.finish_reason}
    assert ended == {"short", "short too"}
    assert engine.stats.num_out_of_memory == 1
    assert engine.stats.num_pages_used == 0


def test_another_error_in_a_forward_is_not_taken_for_a_lack_of_memory(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = anew(loaded)
    Memory(monkeypatch, engine, RuntimeError("illegal memory access")).max_tokens = 0
    engine.handle(Request("r", (1, 2), SamplingParams(max_tokens=2)))
    with pytest.raises(RuntimeError, match="illegal"):
        engine.step()
