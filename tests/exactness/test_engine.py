"""The paged, packed, chunked, batched engine against a plain full-sequence forward without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.local import Choice, LocalEngine
from ram_core.engine.messages import Cancel, Event, FailedEvent, Request, StartedEvent, TokenEvent
from ram_core.models.kv import KvPool
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from tests.exactness import laws
from tests.models import save_pair

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
NUM_TOKENS = 12
PROMPTS = [tuple(range(20, 20 + length)) for length in (3, 1, 17, 40, 5, 29)]
IDENTITY = AlignmentParams()
ALIGNED = AlignmentParams((AlignerTerm("polite", 1.5),))
TWICE = AlignmentParams((AlignerTerm("polite", 0.5), AlignerTerm("terse", 0.7)))
TERSE = AlignmentParams((AlignerTerm("terse", 0.7),))
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=[*FAMILIES, "gpt_oss"])
def family_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return make_config(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Engine:
    return Engine.load(config)


@pytest.fixture(scope="module")
def tight(engine: Engine) -> Engine:
    return load_tight(engine)


def make_config(directory: Path, family: str) -> EngineConfig:
    # Padded embeddings, as most checkpoints have them; gemma's scale of attention is not that of its heads.
    odd = {"query_pre_attn_scalar": 20} if family == "gemma3" else {}
    proposal, aligners = save_pair(directory, family, vocab_size=320, **odd)
    sources = tuple(AlignerSource(name, str(path)) for name, path in aligners.items())
    return EngineConfig(str(proposal), sources, device="cpu", page_size=4, max_batch=8)


def anew(engine: Engine, **changes: object) -> Engine:
    """Another engine over the same models, with memory of its own."""
    pools = {
        name: KvPool(pool.geometry, pool.num_pages, pool.page_size, engine.bank.proposal.device)
        for name, pool in engine.bank.pools.items()
    }
    return Engine(replace(engine.config, **changes), replace(engine.bank, pools=pools))


def load_tight(engine: Engine) -> Engine:
    """The same models with so little memory that sequences are preempted."""
    pools = engine.bank.pools.values()
    page_bytes = sum(pool.geometry.bytes_per_token * pool.page_size for pool in pools)
    return Engine.load(replace(engine.config, kv_memory_bytes=25 * page_bytes, max_model_len=60))


def plain_models(config: EngineConfig) -> dict[str, PreTrainedModel]:
    sources = {"proposal": config.proposal} | {a.name: a.source for a in config.aligners}
    return {
        name: AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", dtype=torch.float32)
        for name, source in sources.items()
    }


def plain_greedy(
    models: dict[str, PreTrainedModel], prompt: tuple[int, ...], alignment: AlignmentParams, vocab_size: int
) -> tuple[int, ...]:
    """Arg max of p · Π q_i^β_i over the nucleus, each model run over the whole sequence at every step."""
    ids = list(prompt)
    for _ in range(NUM_TOKENS):

        def last_log_probs(name: str) -> torch.Tensor:
            logits = models[name](input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            return logits[:vocab_size].double().log_softmax(-1)

        score = last_log_probs("proposal")
        if alignment.terms:
            mass, order = score.exp().sort(descending=True)
            nucleus = order[: int((mass.cumsum(0) < alignment.proposal_top_p).sum()) + 1]
            outside = torch.ones(vocab_size, dtype=torch.bool).scatter(0, nucleus, False)
            for term in alignment.terms:
                score = score + term.strength * last_log_probs(term.aligner)
            score = score.masked_fill(outside, -torch.inf)
        ids.append(int(score.argmax()))
    return tuple(ids[len(prompt) :])


def cases(prompts: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], AlignmentParams]]:
    kinds = [IDENTITY, ALIGNED, TWICE]
    return [(prompt, kinds[index % 3]) for index, prompt in enumerate(prompts)]


def run_together(engine: Engine, requests: list[Request], *, every: int = 0) -> dict[str, list[TokenEvent]]:
    """All requests at once, or one more `every` so many steps."""
    told: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    step = 0
    while waiting or engine.has_work:
        while waiting and (not every or step % every == 0):
            engine.handle(waiting.pop(0))
            if every:
                break
        for event in engine.step():
            assert not isinstance(event, FailedEvent)
            if isinstance(event, TokenEvent):
                told[event.request_id].append(event)
        step += 1
    return told


@torch.inference_mode()
def test_every_way_of_batching_gives_the_plain_forwards_greedy_tokens(family_config: EngineConfig) -> None:
    models = plain_models(family_config)
    engine = Engine.load(family_config)
    vocab_size = engine.limits.vocab_size
    expected = [plain_greedy(models, *case, vocab_size) for case in cases(PROMPTS)]
    requests = [
        Request(str(index), prompt, GREEDY, alignment)
        for index, (prompt, alignment) in enumerate(cases(PROMPTS))
    ]
    chunked = anew(engine, max_step_tokens=9)
    overlapping = anew(engine, is_overlapping=True, max_step_tokens=9)
    static = anew(engine, has_static_shapes=True)
    tight = load_tight(engine)
    arrangements = {
        "alone": (engine, {k: v for r in requests for k, v in run_together(engine, [r]).items()}),
        "batched, prompts cached": (engine, run_together(engine, requests)),
        "overlapping": (overlapping, run_together(overlapping, requests, every=2)),
        "static shapes": (static, run_together(static, requests)),
        "chunked": (chunked, run_together(chunked, requests)),
        "interleaved": (chunked, run_together(chunked, requests, every=3)),
        "preempted": (tight, run_together(tight, requests)),
    }
    for name, (used, told) in arrangements.items():
        drawn = [tuple(event.token_id for event in told[request.request_id]) for request in requests]
        assert drawn == expected, name
        assert used.stats.num_pages_used == 0


def sampled(seed: int, **kwargs: object) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True, **kwargs)


@pytest.mark.parametrize("mode", [Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS])
def test_a_seeded_request_draws_the_same_alone_in_a_batch_and_after_preemption(
    engine: Engine, tight: Engine, mode: Resampling
) -> None:
    alignment = replace(ALIGNED, resampling=mode)
    requests = [
        Request(str(index), prompt, sampled(index), alignment) for index, prompt in enumerate(PROMPTS)
    ]
    alone = {r.request_id: run_together(engine, [r])[r.request_id] for r in requests}
    for arranged in (engine, tight, anew(engine, max_step_tokens=9)):
        told = run_together(arranged, requests)
        for request_id, events in alone.items():
            assert [e.token_id for e in events] == [e.token_id for e in told[request_id]]
            kls = torch.tensor([[e.telemetry.kl_p_q for e in each] for each in (events, told[request_id])])
            torch.testing.assert_close(kls[0], kls[1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_seeded_request_draws_with_the_noise_of_its_seed_and_positions(engine: Engine) -> None:
    """The proposal's plain forward, and at each position the uniform that Python's own integers make."""
    model = plain_models(engine.config)["proposal"]
    for seed, prompt in [(7, PROMPTS[0]), (-3, PROMPTS[4])]:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            law = logits[: engine.limits.vocab_size].double().softmax(-1).numpy()
            ids.append(laws.pick(law, laws.noise(seed, len(ids), laws.TOKEN), laws.Margin()))
        events = run_together(engine, [Request("a", prompt, sampled(seed))])["a"]
        assert [event.token_id for event in events] == ids[len(prompt) :]


def test_preemption_really_happens_in_the_tight_engine(tight: Engine) -> None:
    """Guards the tests around it: their tight engine must not just queue."""
    for index, prompt in enumerate(PROMPTS):
        tight.handle(Request(str(index), prompt, GREEDY, ALIGNED))
    running_before = 0
    has_preempted = False
    while tight.has_work:
        ended = sum(isinstance(e, TokenEvent) and e.finish_reason is not None for e in tight.step())
        has_preempted |= tight.stats.num_running < running_before - ended
        running_before = tight.stats.num_running
    assert has_preempted


def test_a_request_starts_once_however_often_it_is_preempted(tight: Engine) -> None:
    for index, prompt in enumerate(PROMPTS):
        tight.handle(Request(str(index), prompt, GREEDY, ALIGNED, num_choices=1 + index % 2))
    started: list[str] = []
    while tight.has_work:
        started += [event.request_id for event in tight.step() if isinstance(event, StartedEvent)]
    assert started == [str(index) for index in range(len(PROMPTS))]


def test_log_probs_and_alternatives_are_those_of_the_sampled_law(engine: Engine) -> None:
    models = plain_models(engine.config)
    prompt = PROMPTS[0]
    params = replace(sampled(3, temperature=0.7, num_top_log_probs=4), max_tokens=1)
    event = run_together(engine, [Request("a", prompt, params, ALIGNED)])["a"][0]
    with torch.inference_mode():
        log_p, log_q = (
            models[name](input_ids=torch.tensor([prompt]))
            .logits[0, -1, : engine.limits.vocab_size]
            .double()
            .log_softmax(-1)
            for name in ("proposal", "polite")
        )
    mass, order = log_p.exp().sort(descending=True)
    nucleus = order[: int((mass.cumsum(0) < 0.95).sum()) + 1]
    law = torch.full_like(log_p, -torch.inf)
    law[nucleus] = ((log_p + 1.5 * log_q) / 0.7)[nucleus]
    law = law.log_softmax(-1)
    assert event.log_prob == pytest.approx(law[event.token_id].item(), abs=1e-4)
    top = law.topk(4)
    assert [token for token, _ in event.top_log_probs] == top.indices.tolist()
    assert [value for _, value in event.top_log_probs] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_each_request_of_a_batch_is_told_as_many_alternatives_as_it_asked_for(engine: Engine) -> None:
    requests = [
        Request(str(number), PROMPTS[0], sampled(1, num_top_log_probs=number), ALIGNED)
        for number in (0, 2, 4)
    ]
    told = run_together(engine, requests)
    for two, four in zip(told["2"], told["4"], strict=True):
        assert len(four.top_log_probs) == 4
        assert two.top_log_probs == four.top_log_probs[:2]
        assert all(value <= 0 for _, value in four.top_log_probs)
    assert all(event.top_log_probs == () for event in told["0"])


def test_choices_of_one_request_differ_and_the_first_is_that_of_a_single_one(engine: Engine) -> None:
    def texts(num_choices: int, seed: int = 5) -> list[list[int]]:
        engine.handle(Request("a", PROMPTS[0], sampled(seed, temperature=2.0), IDENTITY, num_choices))
        drawn: list[list[int]] = [[] for _ in range(num_choices)]
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    drawn[event.index].append(event.token_id)
        return drawn

    three = texts(3)
    assert three[:1] == texts(1)
    assert len({tuple(text) for text in three}) == 3
    # Nor are they the choices of the seeds next to theirs, and the highest seed has others too.
    assert texts(1, seed=6)[0] not in three
    assert len({tuple(text) for text in texts(3, seed=2**63 - 1)}) == 3


def test_a_cancelled_request_leaves_its_pages_before_the_next_step(engine: Engine) -> None:
    engine.handle(Request("gone", PROMPTS[3], replace(GREEDY, max_tokens=100), ALIGNED, 2))
    engine.handle(Request("stays", PROMPTS[0], GREEDY, IDENTITY))
    for _ in range(3):
        engine.step()
    used = engine.stats.num_pages_used
    engine.handle(Cancel("gone"))
    assert engine.stats.num_pages_used < used
    assert engine.stats.num_running == 1
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    assert {event.request_id for event in events} == {"stays"}
    assert engine.stats.num_pages_used == 0


def test_stop_tokens_and_limits_end_a_text(engine: Engine) -> None:
    local = LocalEngine(engine)
    [free] = local.generate([PROMPTS[0]], GREEDY)
    assert free.finish_reason == "length"
    assert len(free.token_ids) == NUM_TOKENS
    stop = free.token_ids[4]
    until_stop = free.token_ids[: free.token_ids.index(stop) + 1]
    [stopped] = local.generate([PROMPTS[0]], replace(GREEDY, stop_token_ids=(stop,)))
    assert stopped == Choice(until_stop, stopped.log_probs, (), "stop")
    just_enough = replace(GREEDY, stop_token_ids=(stop,), max_tokens=len(until_stop))
    assert local.generate([PROMPTS[0]], just_enough)[0].finish_reason == "stop"
    [whole] = local.generate([PROMPTS[0]], replace(GREEDY, max_tokens=0))
    assert len(whole.token_ids) + len(PROMPTS[0]) == engine.limits.max_model_len
    bank = replace(engine.bank, eos_ids=frozenset({stop}), pools=anew(engine).bank.pools)
    ending = LocalEngine(Engine(engine.config, bank))
    [ended] = ending.generate([PROMPTS[0]], replace(GREEDY, ignore_eos=False))
    assert (ended.token_ids, ended.finish_reason) == (until_stop, "stop")
    [ignoring] = ending.generate([PROMPTS[0]], GREEDY)
    assert ignoring.token_ids == free.token_ids


def first_weight(engine: Engine, aligner: str) -> torch.Tensor:
    """One of the weights that only this aligner has, to be written to."""
    group = engine.bank.group_of[aligner]
    weight = next(group.model.model.parameters())
    return weight[group.lane(aligner)[1]] if group.is_stacked else weight


def test_a_request_with_bad_logits_fails_alone(config: EngineConfig) -> None:
    """One aligner's weights are spoilt; rows that use it fail, rows that do not are as before.

    Also those of the other aligner, whose pages were those of failed rows.
    """
    engine = Engine.load(config)
    assert engine.limits.pools["polite"] == engine.limits.pools["terse"]
    kinds = {"good": IDENTITY, "bad": ALIGNED, "good too": TERSE}
    requests = [
        Request(f"{kind}-{index}", prompt, GREEDY, alignment)
        for index, prompt in enumerate(PROMPTS)
        for kind, alignment in kinds.items()
    ]
    good = run_together(engine, [r for r in requests if r.request_id.startswith("good")])
    with torch.inference_mode():
        first_weight(engine, "polite").fill_(torch.nan)
    for request in requests:
        engine.handle(request)
    told: dict[str, list[Event]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            told[event.request_id].append(event)
    for request_id, events in told.items():
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        if request_id.startswith("good"):
            assert [e.token_id for e in tokens] == [e.token_id for e in good[request_id]]
        else:
            assert not tokens
            assert sum(isinstance(event, FailedEvent) for event in events) == 1
    assert engine.stats.num_pages_used == 0
