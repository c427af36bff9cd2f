"""Pages that were computed before, for whom they may be used, and that they change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ram_core.engine.engine import Engine
from ram_core.engine.messages import Cancel, Event, FailedEvent, Request, StartedEvent, TokenEvent
from ram_core.params import AlignmentParams, SamplingParams
from tests.exactness.test_engine import (
    ALIGNED,
    GREEDY,
    IDENTITY,
    TERSE,
    TWICE,
    anew,
    first_weight,
)

PAGE = 4
PROMPT = tuple(range(30, 59))
ALL_BUT_LAST = (len(PROMPT) - 1) // PAGE * PAGE
SAMPLED = SamplingParams(seed=5, max_tokens=10, ignore_eos=True)


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    return anew(loaded)


def run(engine: Engine, request: Request) -> tuple[int, list[TokenEvent]]:
    """How many tokens of the proposal's were cached, and what was drawn."""
    events = drain(engine, request)
    [started] = [event for event in events if isinstance(event, StartedEvent)]
    assert not any(isinstance(event, FailedEvent) for event in events)
    return started.num_cached_tokens, [event for event in events if isinstance(event, TokenEvent)]


def drain(engine: Engine, *requests: Request) -> list[Event]:
    for request in requests:
        engine.handle(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def ask(
    alignment: AlignmentParams = IDENTITY,
    prompt: tuple[int, ...] = PROMPT,
    sampling: SamplingParams = SAMPLED,
    **fields: object,
) -> Request:
    return Request("r", prompt, sampling, alignment, **fields)


def assert_same(ours: list[TokenEvent], plain: list[TokenEvent]) -> None:
    """Equal tokens; probabilities up to what another shape of a matrix product does to float32."""
    assert [event.token_id for event in ours] == [event.token_id for event in plain]
    for mine, other in zip(ours, plain, strict=True):
        assert mine.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        if other.telemetry is not None and mine.telemetry is not None:
            assert mine.telemetry.kl_p_q == pytest.approx(other.telemetry.kl_p_q, abs=1e-4)


class CountedTokens:
    """Counts the tokens that a model computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, name: str) -> None:
        self.num_tokens = 0
        model = engine.bank.proposal if name == "proposal" else engine.bank.group_of[name].model
        forward = model.forward

        def counted(batch: object, pool: object) -> torch.Tensor:
            self.num_tokens += len(batch.input_ids)  # type: ignore[attr-defined]
            return forward(batch, pool)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "forward", counted)


@pytest.mark.parametrize("alignment", [IDENTITY, ALIGNED, TWICE])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_prompt_seen_before_is_not_read_again_and_draws_the_same(
    engine: Engine, loaded: Engine, alignment: AlignmentParams, sampling: SamplingParams
) -> None:
    num_cached, plain = run(anew(loaded, prefix_cache=False), ask(alignment, sampling=sampling))
    assert num_cached == 0
    num_cached, first = run(engine, ask(alignment, sampling=sampling))
    assert num_cached == 0
    num_cached, again = run(engine, ask(alignment, sampling=sampling))
    assert num_cached == ALL_BUT_LAST
    assert_same(first, plain)
    assert_same(again, plain)
    assert engine.stats.num_cached_tokens == ALL_BUT_LAST
    assert engine.stats.num_prompt_tokens == 2 * len(PROMPT)
    assert engine.stats.num_pages_used == 0


@pytest.mark.parametrize("max_step_tokens", [0, 9])
def test_the_proposal_reads_a_prompt_once_for_all_aligners(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, max_step_tokens: int
) -> None:
    """Lanes begin where each has its own prefix; the one ahead waits for the others."""
    engine = anew(loaded, max_step_tokens=max_step_tokens)
    run(engine, ask(IDENTITY))
    for alignment in (ALIGNED, TERSE, TWICE):
        _, plain = run(anew(loaded, prefix_cache=False), ask(alignment))
        with monkeypatch.context() as patch:
            proposal = CountedTokens(patch, engine, "proposal")
            num_cached, drawn = run(engine, ask(alignment))
        assert num_cached == ALL_BUT_LAST
        assert proposal.num_tokens == len(PROMPT) - ALL_BUT_LAST + SAMPLED.max_tokens - 1
        assert_same(drawn, plain)


def test_an_aligners_pages_are_not_anothers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both aligners write to one pool, at the same tokens."""
    run(engine, ask(ALIGNED))
    terse = CountedTokens(monkeypatch, engine, "terse")
    run(engine, ask(TERSE))
    assert terse.num_tokens == len(PROMPT) + SAMPLED.max_tokens - 1


def test_the_next_turn_of_a_conversation_finds_the_answer_too(engine: Engine) -> None:
    _, drawn = run(engine, ask(ALIGNED))
    longer = (*PROMPT, *[event.token_id for event in drawn], 7, 8, 9)
    num_cached, _ = run(engine, ask(ALIGNED, longer))
    # The last token drawn was never read.
    assert num_cached == (len(PROMPT) + len(drawn) - 1) // PAGE * PAGE


def test_neither_tenants_nor_salts_share(engine: Engine) -> None:
    run(engine, ask(tenant="a"))
    run(engine, ask(tenant="a", cache_salt="s"))
    assert run(engine, ask(tenant="a"))[0] == ALL_BUT_LAST
    assert run(engine, ask(tenant="a", cache_salt="s"))[0] == ALL_BUT_LAST
    for fields in ({}, {"tenant": "b"}, {"cache_salt": "s"}, {"tenant": "as"}, {"cache_salt": "a"}):
        fresh = {"tenant": "", "cache_salt": ""} | fields
        assert run(engine, ask(**fresh))[0] == 0, fields


def test_tenants_of_a_group_share_and_their_salts_do_not(engine: Engine) -> None:
    run(engine, ask(tenant="a", prefix_group="g"))
    assert run(engine, ask(tenant="b", prefix_group="g"))[0] == ALL_BUT_LAST
    for fields in (
        {"tenant": "a"},
        {"tenant": "g"},
        {"tenant": "b", "prefix_group": "h"},
        {"tenant": "b", "prefix_group": "g", "cache_salt": "s"},
    ):
        assert run(engine, ask(**fields))[0] == 0, fields


def test_without_the_cache_nothing_is_found(loaded: Engine) -> None:
    engine = anew(loaded, prefix_cache=False)
    run(engine, ask())
    assert run(engine, ask())[0] == 0
    assert engine.stats.num_cached_tokens == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("alignment", [IDENTITY, TWICE])
def test_a_prompt_is_read_once_for_all_choices(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, prefix_cache: bool, alignment: AlignmentParams
) -> None:
    engine = anew(loaded, prefix_cache=prefix_cache)
    choices = [
        run(anew(loaded, prefix_cache=False), ask(alignment, sampling=replace(SAMPLED, seed=seed)))[1]
        for seed in seeds_of_choices(3)
    ]
    proposal = CountedTokens(monkeypatch, engine, "proposal")
    events = drain(engine, ask(alignment, num_choices=3))
    drawn = [event for event in events if isinstance(event, TokenEvent)]
    for index, plain in enumerate(choices):
        assert_same([event for event in drawn if event.index == index], plain)
    tail = len(PROMPT) - ALL_BUT_LAST
    assert proposal.num_tokens == len(PROMPT) + 2 * tail + 3 * (SAMPLED.max_tokens - 1)
    assert engine.stats.num_pages_used == 0


def seeds_of_choices(count: int) -> list[int]:
    """What the engine makes of seed 5: an odd constant apart, as int64."""
    return [(5 + index * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for index in range(count)]


def test_choices_go_on_when_the_one_they_wait_for_is_cancelled(loaded: Engine) -> None:
    engine = anew(loaded, max_step_tokens=9)
    engine.handle(ask(num_choices=3))
    engine.step()
    engine.handle(Cancel("r", 0))
    engine.handle(Cancel("r", 2))
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    assert {event.index for event in events if isinstance(event, TokenEvent)} == {1}
    assert engine.stats.num_pages_used == 0


def test_what_a_failed_request_computed_is_never_found(loaded: Engine) -> None:
    """Memory is kept finite, so its pages would look sound."""
    engine = anew(loaded, max_step_tokens=9)
    weight = first_weight(engine, "polite")
    before = weight.detach().clone()
    with torch.inference_mode():
        weight.fill_(torch.nan)
    events = drain(engine, ask(ALIGNED))
    assert any(isinstance(event, FailedEvent) for event in events)
    with torch.inference_mode():
        weight.copy_(before)
    num_cached, drawn = run(engine, ask(ALIGNED))
    assert num_cached == 0
    assert_same(drawn, run(anew(loaded), ask(ALIGNED))[1])


def test_the_least_recently_used_prefix_goes_first(loaded: Engine) -> None:
    """Memory for 160 tokens; each request takes 40."""
    pools = loaded.bank.pools.values()
    page_bytes = sum(pool.geometry.bytes_per_token * pool.page_size for pool in pools)
    engine = Engine.load(replace(loaded.config, kv_memory_bytes=41 * page_bytes, max_model_len=60))
    prompts = [tuple(range(first, first + 30)) for first in (10, 60, 110, 160)]
    for prompt in prompts[:3]:
        run(engine, ask(prompt=prompt))
    assert run(engine, ask(prompt=prompts[0]))[0] == 28
    run(engine, ask(prompt=prompts[3]))
    run(engine, ask(prompt=tuple(range(200, 230))))
    assert run(engine, ask(prompt=prompts[0]))[0] == 28
    assert run(engine, ask(prompt=prompts[1]))[0] < 28
