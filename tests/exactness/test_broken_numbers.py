"""Numbers that break at an earlier token of a prompt end its request, and nobody else's.

Zeros stand for them in KV memory, so the last token's logits are finite and do not tell. Here the embedding
of one token is spoilt, or the key or the value alone that a layer makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Event, FailedEvent, Request, StartedEvent, TokenEvent
from ram_core.errors import NonFiniteLogits
from ram_core.models import attention
from ram_core.models.paged import PagedModel
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from tests.exactness import test_lora
from tests.exactness.test_engine import (
    ALIGNED,
    GREEDY,
    IDENTITY,
    TERSE,
    TWICE,
    anew,
    first_weight,
)
from tests.models import save_model

SPOILT = 251
"""A token that no answer here holds."""
LONG = tuple(range(20, 60))
BROKEN = (*LONG[:6], SPOILT, *LONG[6:])
SOUND = (IDENTITY, ALIGNED, TERSE, TWICE)
LONGER = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in chunks": {"max_step_tokens": 9},
    "overlapping": {"is_overlapping": True, "max_step_tokens": 9},
    "recorded": {"cuda_graphs": True, "max_step_tokens": 9},
}
"""How prompts are read."""


@pytest.fixture(scope="module")
def apart(config: EngineConfig) -> Engine:
    """Each aligner has a forward of its own."""
    return Engine.load(replace(config, aligner_bank=False))


@contextmanager
def spoilt(rows: Tensor, number: float = torch.nan) -> Iterator[None]:
    """The token's embedding is not what it was."""
    with torch.inference_mode():
        before = rows[SPOILT].clone()
        rows[SPOILT, 3] = number
    try:
        yield
    finally:
        with torch.inference_mode():
            rows[SPOILT] = before


def spoilt_proposal(engine: Engine, number: float = torch.nan) -> AbstractContextManager[None]:
    return spoilt(engine.bank.proposal.model.get_input_embeddings().weight, number)


def spoil_one(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Of the token's key and value, and of all else, break this one alone, in every model's first layer."""
    call, attend = PagedModel._call, attention._attend
    ids: list[Tensor] = []

    def remember(model: PagedModel, input_ids: Tensor, *args: Any) -> Tensor:
        ids[:] = [input_ids]
        return call(model, input_ids, *args)

    def spoil(query: Tensor, key: Tensor, value: Tensor, layer: int, *args: Any) -> Tensor:
        made = {"key": key.clone(), "value": value.clone()}
        if layer == 0:
            made[which][-1, ids[0] == SPOILT, -1] = torch.inf
        return attend(query, made["key"], made["value"], layer, *args)

    monkeypatch.setattr(PagedModel, "_call", remember)
    monkeypatch.setattr(attention, "_attend", spoil)


def ask(name: str, prompt: tuple[int, ...] = BROKEN, alignment: AlignmentParams = IDENTITY) -> Request:
    return Request(name, prompt, GREEDY, alignment)


def serve(engine: Engine, requests: list[Request]) -> dict[str, list[Event]]:
    for request in requests:
        engine.handle(request)
    told: dict[str, list[Event]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            told[event.request_id].append(event)
    assert engine.stats.num_pages_used == 0
    return told


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def has_failed(events: list[Event]) -> bool:
    errors = [event.error for event in events if isinstance(event, FailedEvent)]
    return [type(error) for error in errors] == [NonFiniteLogits]


def assert_fail_alone(
    engine: Engine, spoil: AbstractContextManager[None], *broken: Request, sound: tuple[AlignmentParams, ...]
) -> None:
    """While numbers are spoilt, some requests fail and tell no token; others draw what they draw without."""
    others = [ask(f"sound {index}", LONG[: 9 + 7 * index], kind) for index, kind in enumerate(sound)]
    expected = serve(engine, others)
    num_failed = engine.stats.num_failed
    with spoil:
        told = serve(engine, [*others[:1], *broken, *others[1:]])
    for request in others:
        assert SPOILT not in tokens_of(expected[request.request_id])
        assert tokens_of(told[request.request_id]) == tokens_of(expected[request.request_id])
    for request in broken:
        assert has_failed(told[request.request_id])
        assert not tokens_of(told[request.request_id])
    assert engine.stats.num_failed == num_failed + len(broken)


def made(engine: Engine, way: str) -> Engine:
    """Another engine that reads prompts in that way, and each of them anew."""
    other = anew(engine, prefix_cache=False, **WAYS[way])
    if other.config.cuda_graphs:
        other.capture()
    return other


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_breaks_in_the_proposal_ends_its_request_alone(loaded: Engine, way: str) -> None:
    engine = made(loaded, way)
    broken = [ask(f"broken {index}", BROKEN, kind) for index, kind in enumerate((IDENTITY, TWICE))]
    assert_fail_alone(engine, spoilt_proposal(engine), *broken, sound=SOUND)


@pytest.mark.parametrize("number", [torch.inf, -torch.inf])
def test_infinities_are_told_as_well(loaded: Engine, number: float) -> None:
    engine = made(loaded, "in chunks")
    assert_fail_alone(engine, spoilt_proposal(engine, number), ask("broken"), sound=SOUND)


@pytest.mark.parametrize("at", [0, 8, 9, len(LONG) - 1, len(LONG)])
@pytest.mark.parametrize("way", ["at once", "in chunks"])
def test_wherever_in_the_prompt_it_breaks(loaded: Engine, way: str, at: int) -> None:
    """First, last and first of a chunk, last but one, and last."""
    engine = made(loaded, way)
    broken = ask("broken", (*LONG[:at], SPOILT, *LONG[at:]))
    assert_fail_alone(engine, spoilt_proposal(engine), broken, sound=SOUND[:2])


@pytest.mark.parametrize("alignment", [IDENTITY, ALIGNED])
def test_a_prompt_that_is_read_token_by_token_fails_too(loaded: Engine, alignment: AlignmentParams) -> None:
    """Beside one that is being written, whose rows have one token each as well."""
    engine = anew(loaded, prefix_cache=False, max_chunk_tokens=1)
    writer = Request("writer", LONG, LONGER, alignment)
    expected = tokens_of(serve(engine, [writer])["writer"])
    assert SPOILT not in expected
    with spoilt_proposal(engine):
        engine.handle(writer)
        written: list[Event] = []
        while not tokens_of(written):
            written += engine.step()
        engine.handle(ask("broken", BROKEN, alignment))
        events = drain(engine)
    assert tokens_of([*written, *(each for each in events if each.request_id == "writer")]) == expected
    failed = next(index for index, each in enumerate(events) if isinstance(each, FailedEvent))
    assert has_failed([each for each in events if each.request_id == "broken"])
    assert len(tokens_of(events[:failed])) >= len(BROKEN) - 1, "a step of the other's for each token"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_bank", [True, False])
def test_a_token_that_breaks_in_an_aligner_ends_requests_of_that_aligner(
    loaded: Engine, apart: Engine, way: str, in_bank: bool
) -> None:
    engine = made(loaded if in_bank else apart, way)
    assert engine.bank.group_of["polite"].is_stacked == in_bank
    broken = [ask(f"broken {index}", BROKEN, kind) for index, kind in enumerate((ALIGNED, TWICE))]
    spoil = spoilt(first_weight(engine, "polite"))
    assert_fail_alone(engine, spoil, *broken, sound=SOUND)
    with spoilt(first_weight(engine, "polite")):
        told = serve(engine, [ask("plain"), ask("other", BROKEN, TERSE)])
    assert not any(has_failed(events) for events in told.values())


@test_lora.pytestmark
@pytest.mark.parametrize("way", ["at once", "in chunks"])
def test_a_token_that_breaks_in_the_base_of_adapters_ends_requests_of_theirs(
    tmp_path: Path, way: str
) -> None:
    base = save_model(tmp_path / "base", "llama", std=0.08)
    adapter = test_lora.save_adapter(base, "narrow", **test_lora.ADAPTERS["narrow"])
    engine = made(Engine.load(test_lora.make_config(base, {"narrow": adapter})), way)
    narrow = AlignmentParams((AlignerTerm("narrow", 0.8),))
    rows = engine.bank.group_of["narrow"].model.model.get_input_embeddings().weight
    broken = ask("broken", BROKEN, narrow)
    assert_fail_alone(engine, spoilt(rows), broken, sound=(IDENTITY, narrow))


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("way", WAYS)
def test_a_key_or_a_value_that_breaks_alone_is_told_though_the_token_itself_stays_whole(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, which: str, way: str
) -> None:
    engine = made(loaded, way)
    expected = serve(engine, [ask("sound", LONG, TWICE)])
    spoil_one(monkeypatch, which)
    told = serve(engine, [ask("sound", LONG, TWICE), ask("broken"), ask("broken too", BROKEN, ALIGNED)])
    assert tokens_of(told["sound"]) == tokens_of(expected["sound"])
    assert has_failed(told["broken"])
    assert has_failed(told["broken too"])


def test_what_is_told_of_a_token_that_draws_does_not_depend_on_who_reads_beside_it(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits tell, and they alone: a value that breaks there by itself counts as zeros, everywhere."""
    last = ask("last", (*LONG, SPOILT))
    spoil_one(monkeypatch, "value")
    expected = serve(made(loaded, "at once"), [last])["last"]
    assert len(tokens_of(expected)) == GREEDY.max_tokens
    for way in WAYS:
        told = serve(made(loaded, way), [ask("first", LONG), last, ask("behind", LONG)])
        assert tokens_of(told["last"]) == tokens_of(expected)


def test_what_breaks_when_it_is_computed_again_after_preemption_is_told(loaded: Engine) -> None:
    engine = anew(loaded, prefix_cache=False, max_step_tokens=9)
    engine.handle(ask("again"))
    events: list[Event] = []
    while not tokens_of(events):
        events += engine.step()
    with spoilt_proposal(engine):
        engine._scheduler.put_back(engine._scheduler.running[0])
        events += drain(engine)
    assert tokens_of(events)
    assert has_failed(events)


def test_what_broke_before_a_preemption_and_not_after_it_is_forgotten(loaded: Engine) -> None:
    engine = anew(loaded, prefix_cache=False, max_step_tokens=9)
    expected = tokens_of(serve(engine, [ask("again")])["again"])
    with spoilt_proposal(engine):
        engine.handle(ask("again"))
        assert not tokens_of(engine.step() + engine.step())
    engine._scheduler.put_back(engine._scheduler.running[0])
    assert tokens_of(drain(engine)) == expected


def test_the_next_in_the_same_slot_is_not_blamed(loaded: Engine) -> None:
    engine = anew(loaded, max_batch=1, max_step_tokens=9)
    expected = tokens_of(serve(engine, [ask("next", LONG)])["next"])
    with spoilt_proposal(engine):
        told = serve(engine, [ask("broken"), ask("next", LONG)])
    assert has_failed(told["broken"])
    assert tokens_of(told["next"]) == expected


def test_no_page_of_a_broken_prompt_is_found_again(loaded: Engine) -> None:
    engine = anew(loaded, prefix_cache=True)
    with spoilt_proposal(engine):
        told = serve(engine, [Request("broken", BROKEN, GREEDY, num_choices=2)])["broken"]
    assert sum(isinstance(event, FailedEvent) for event in told) == 2
    events = serve(engine, [ask("healed")])["healed"]
    assert [event.num_cached_tokens for event in events if isinstance(event, StartedEvent)] == [0]
    assert tokens_of(events) == tokens_of(serve(anew(loaded), [ask("fresh")])["fresh"])
