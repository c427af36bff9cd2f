"""A prompt that the proposal reads while aligners load: the answer is the same, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from ram_core.engine.engine import Engine
from ram_core.engine.messages import (
    Cancel,
    Event,
    FailedEvent,
    FreeAligner,
    Prefill,
    Request,
    StartedEvent,
    TokenEvent,
)
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.runner import LaunchedStep, Runner
from ram_core.engine.turnover import Turnover
from ram_core.errors import AlignerUnavailable, NonFiniteLogits
from ram_core.models.cores import one_thread
from ram_core.params import AlignmentParams, SamplingParams
from tests.exactness.test_broken_numbers import BROKEN, spoilt
from tests.exactness.test_engine import ALIGNED, IDENTITY, TERSE, TWICE, anew
from tests.exactness.test_prefix_cache import CountedTokens, drain

SAMPLED = SamplingParams(seed=7, max_tokens=9, ignore_eos=True, num_top_log_probs=3)
LENGTHS = (1, 3, 4, 5, 8, 17, 40)
"""Of prompts; a page holds 4 tokens."""
WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "overlapping": {"is_overlapping": True},
    "recorded": {"cuda_graphs": True},
    "padded, overlapping": {"has_static_shapes": True, "is_overlapping": True},
    "no cache": {"prefix_cache": False},
    "in chunks": {"max_step_tokens": 9},
}


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(range(20, 20 + length))


def ask(length: int, alignment: AlignmentParams = ALIGNED, name: str = "a", **more: Any) -> Request:
    return Request(name, prompt_of(length), SAMPLED, alignment, **more)


def ahead(request: Request) -> Prefill:
    """What is sent while its aligners are not there."""
    return Prefill(msgspec.structs.replace(request, alignment=IDENTITY))


def tokens(told: Sequence[Event], name: str = "a") -> list[TokenEvent]:
    return [event for event in told if isinstance(event, TokenEvent) and event.request_id == name]


def text(told: Sequence[Event], name: str = "a") -> list[int]:
    """For batches of others, beside which the last bits of an answer's numbers may differ."""
    return [event.token_id for event in tokens(told, name)]


def read_ahead(engine: Engine, request: Request) -> None:
    engine.handle(ahead(request))
    assert engine.has_work
    assert drain(engine) == []
    assert engine.stats.num_running == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alignment", [ALIGNED, TWICE], ids=["one", "two"])
def test_the_answer_is_the_same(loaded: Engine, way: str, alignment: AlignmentParams) -> None:
    """Every token's numbers too, bit for bit, for a prompt read as a whole before the request comes."""
    for length in LENGTHS:
        plain = anew(loaded, **WAYS[way])
        engine = anew(loaded, **WAYS[way])
        for each in (plain, engine):
            if WAYS[way].get("cuda_graphs"):
                each.capture()
        expected = tokens(drain(plain, ask(length, alignment)))
        assert len(expected) == SAMPLED.max_tokens
        read_ahead(engine, ask(length, alignment))
        assert tokens(drain(engine, ask(length, alignment))) == expected
        assert engine.stats.num_pages_used == engine.stats.num_running == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_steps", range(5))
def test_the_request_may_come_while_its_prompt_is_read(loaded: Engine, way: str, num_steps: int) -> None:
    expected = tokens(drain(anew(loaded, **WAYS[way]), ask(40)))
    engine = anew(loaded, **WAYS[way])
    engine.handle(ahead(ask(40)))
    for _ in range(num_steps):
        assert engine.step() == []
    assert tokens(drain(engine, ask(40))) == expected


@pytest.mark.parametrize("way", WAYS)
def test_beside_others_each_answer_is_the_same(loaded: Engine, way: str) -> None:
    asked = [ask(length, kind, str(length)) for length, kind in ((5, ALIGNED), (40, TWICE), (17, TERSE))]
    others = [ask(length, kind, f"other {length}") for length, kind in ((6, IDENTITY), (30, TERSE))]
    expected = drain(anew(loaded, **WAYS[way]), *asked, *others)
    engine = anew(loaded, **WAYS[way])
    told = []
    for early, other in zip(asked, [*others, None], strict=True):
        engine.handle(ahead(early))
        if other is not None:
            engine.handle(other)
        told += engine.step()
    told += drain(engine, *asked)
    for request in (*asked, *others):
        assert text(told, request.request_id) == text(expected, request.request_id)


def test_all_choices_share_what_was_read(loaded: Engine) -> None:
    request = ask(17, num_choices=3)
    expected = tokens(drain(anew(loaded), request))
    engine = anew(loaded)
    read_ahead(engine, request)
    told = tokens(drain(engine, request))
    assert sorted(told, key=lambda event: event.index) == sorted(expected, key=lambda event: event.index)


def test_the_proposal_reads_nothing_twice(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in LENGTHS:
        engine = anew(loaded, prefix_cache=False)
        with monkeypatch.context() as patch:
            counted = CountedTokens(patch, engine, "proposal")
            read_ahead(engine, ask(length))
            assert counted.num_tokens == length
            started, *_ = drain(engine, ask(length))
            # What it draws last, nobody reads.
            assert counted.num_tokens == length + SAMPLED.max_tokens - 1
        # For whom it was read, it was not found in any cache.
        assert isinstance(started, StartedEvent)
        assert started.num_cached_tokens == 0


def test_what_was_found_in_the_cache_is_told(loaded: Engine) -> None:
    engine = anew(loaded)
    drain(engine, ask(17, name="before"))
    read_ahead(engine, ask(17))
    started, *_ = drain(engine, ask(17))
    assert isinstance(started, StartedEvent)
    assert started.num_cached_tokens == 16
    assert engine.stats.num_prompt_tokens == 2 * 17


@pytest.mark.parametrize(
    "other",
    [
        ask(17, IDENTITY),
        Request("a", prompt_of(17)[::-1], SAMPLED, ALIGNED),
        ask(17, cache_salt="another"),
        ask(17, tenant="another"),
    ],
    ids=["identity", "prompt", "salt", "tenant"],
)
def test_a_request_that_is_another_than_was_announced_reads_by_itself(loaded: Engine, other: Request) -> None:
    expected = text(drain(anew(loaded), other))
    engine = anew(loaded)
    read_ahead(engine, ask(17))
    assert text(drain(engine, other)) == expected
    assert engine.stats.num_pages_used == 0


@pytest.mark.parametrize("num_steps", [0, 1, 9])
def test_one_that_is_taken_back_leaves_nothing(loaded: Engine, num_steps: int) -> None:
    engine = anew(loaded, max_step_tokens=9, is_overlapping=True)
    for _ in range(2):
        # Twice for the same request changes nothing.
        engine.handle(ahead(ask(40)))
        engine.handle(ahead(ask(40)))
        for _ in range(num_steps):
            engine.step()
        engine.handle(Cancel("a"))
        assert drain(engine) == []
        assert engine.stats.num_running == engine.stats.num_pages_used == 0


def test_it_gives_way_to_everybody(loaded: Engine) -> None:
    """To whoever has no slot; and it does not begin while anybody waits."""
    engine = anew(loaded, max_batch=2)
    asked = [ask(5, name="a"), ask(6, name="b")]
    expected = {name: text(drain(anew(loaded), *asked), name) for name in "ab"}
    drain(engine, *[ahead(ask(length, name=f"early {length}")) for length in (5, 6)])
    assert engine.stats.num_running == 2
    told = drain(engine, *asked)
    assert expected == {name: text(told, name) for name in "ab"}
    assert engine.stats.num_running == engine.stats.num_preemptions == 0
    for name in "xyz":
        engine.handle(ask(5, name=name))
    engine.handle(ahead(ask(6, name="early")))
    assert all(engine.step() for _ in range(3))
    assert engine.stats.num_running == 2
    assert engine.stats.num_waiting == 1


def test_it_gives_way_to_who_needs_its_pages(loaded: Engine) -> None:
    tight = anew(loaded)
    book = tight._scheduler.books[tight.bank.proposal_pool]
    spare = book.take(book.num_free - 12)
    read_ahead(tight, ask(40))
    # 9 more pages are needed by the time it ends: 3 that are free, and some of those that were read ahead.
    other = Request("b", prompt_of(8), replace(SAMPLED, max_tokens=25), IDENTITY)
    assert len(tokens(drain(tight, other), "b")) == 25
    assert tight.stats.num_running == 0
    assert tight.stats.num_pages_used == len(spare)
    assert len(tokens(drain(tight, ask(40)))) == SAMPLED.max_tokens


def test_without_room_for_its_aligner_a_request_waits_like_any_other(loaded: Engine) -> None:
    expected = text(drain(anew(loaded), ask(17)))
    engine = anew(loaded)
    read_ahead(engine, ask(17))
    book = engine._scheduler.books[engine.bank.pool_of["polite"]]
    taken = book.take(book.num_free - 2)
    engine.handle(ask(17))
    assert engine.step() == []
    assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 1)
    book.give_back(taken)
    assert text(drain(engine)) == expected


def test_a_choice_that_is_cancelled_leaves_the_others_what_was_read(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = anew(loaded, prefix_cache=False)
    counted = CountedTokens(monkeypatch, engine, "proposal")
    request = ask(3, num_choices=2)
    read_ahead(engine, request)
    engine.handle(request)
    engine.handle(Cancel("a", 1))
    assert len(text(drain(engine))) == SAMPLED.max_tokens
    assert counted.num_tokens == 3 + SAMPLED.max_tokens - 1


def test_it_takes_one_core_of_the_load(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where nobody else is computed for in the step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    launch = Runner.launch

    def watched(runner: Runner, rows: Sequence[ScheduledRow]) -> LaunchedStep:
        seen.append(torch.get_num_threads())
        return launch(runner, rows)

    monkeypatch.setattr(Runner, "launch", watched)
    engine = anew(loaded)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Turnover, "is_loading", True)
            read_ahead(engine, ask(5))
            drain(engine, ask(5))
        assert seen == [1] + [2] * SAMPLED.max_tokens
        read_ahead(engine, ask(5))
        assert seen[-1] == 2, "there is no load"
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_numbers_that_break_are_the_requests_to_hear_of(loaded: Engine) -> None:
    request = Request("a", BROKEN, SAMPLED, ALIGNED)
    for steps in (0, 1, 9):
        engine = anew(loaded, is_overlapping=True)
        with spoilt(engine.bank.proposal.model.get_input_embeddings().weight):
            engine.handle(ahead(request))
            for _ in range(steps):
                assert engine.step() == []
            assert engine.stats.num_running == (steps == 1), "a place is given up once it is known"
            *_, failed = drain(engine, request)
        assert isinstance(failed, FailedEvent)
        assert isinstance(failed.error, NonFiniteLogits)
        assert engine.stats.num_running == engine.stats.num_pages_used == 0


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_without_memory_it_is_given_up(
    loaded: Engine, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(drain(anew(loaded), ask(num_tokens)))
    engine = anew(loaded)
    launch = Runner.launch

    def starved(runner: Runner, rows: Sequence[ScheduledRow]) -> LaunchedStep:
        if any(row.sequence.is_prefill for row in rows):
            raise torch.OutOfMemoryError("no memory")
        return launch(runner, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", starved)
        engine.handle(ahead(ask(num_tokens)))
        assert drain(engine) == []
    assert engine.stats.num_running == engine.stats.num_pages_used == 0
    assert tokens(drain(engine, ask(num_tokens))) == expected


def test_an_aligner_that_went_meanwhile_leaves_nothing(config: Any) -> None:
    engine = Engine.load(config)
    read_ahead(engine, ask(17))
    engine.handle(FreeAligner("polite"))
    [failed] = drain(engine, ask(17))
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, AlignerUnavailable)
    assert engine.stats.num_running == engine.stats.num_pages_used == 0
