"""Perplexity and support of wanted answers, against each model's own forward and π written out in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ram_core.evaluation import held_out
from ram_core.evaluation.answering import Bench, Setting, alone
from ram_core.evaluation.held_out import HeldOut, score_held_out
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.training.examples import Example
from ram_core.training.records import Record
from tests.models import save_pair

NOISE = np.random.default_rng(5)
EXAMPLES = [
    Example(tuple(NOISE.integers(6, 300, prompt)), tuple(NOISE.integers(6, 300, answer)))
    for prompt, answer in ((1, 1), (4, 7), (30, 2), (3, 20), (17, 17))
]


def aligned(*terms: tuple[str, float], **knobs: object) -> AlignmentParams:
    return AlignmentParams(tuple(AlignerTerm(*term) for term in terms), **knobs)  # type: ignore[arg-type]


GATE = 2.0
WARM = SamplingParams(temperature=0.8)
SETTINGS = {
    "proposal": alone(SamplingParams()),
    "product": Setting("", aligned(("polite", 0.7)), WARM),
    "nucleus": Setting("", aligned(("terse", 1.5), resampling=Resampling.NUCLEUS)),
    "two aligners": Setting("", aligned(("polite", 0.5), ("terse", 0.25), proposal_top_p=0.8), WARM),
    "contrast": Setting("", aligned(("polite", 1.0), ("terse", -0.5))),
    "gated": Setting("", aligned(("polite", 1.0), kl_threshold=GATE, proposal_top_p=0.5)),
    "cut twice": Setting("", aligned(("polite", 1.0)), SamplingParams(temperature=1.4, top_p=0.7, top_k=60)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return save_pair(tmp_path_factory.mktemp("pair"), std=0.12)


@pytest.fixture(scope="module")
def bench(saved: tuple[Path, dict[str, Path]]) -> Bench:
    proposal, aligners = saved
    records = [Record(({"role": "user", "content": "the dog"},))]
    return Bench(str(proposal), {name: str(path) for name, path in aligners.items()}, records, device="cpu")


@pytest.fixture(scope="module")
def models(saved: tuple[Path, dict[str, Path]]) -> Mapping[str, PreTrainedModel]:
    places = {"proposal": saved[0], **saved[1]}
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in places.items()}


@pytest.fixture(scope="module")
def found(bench: Bench) -> dict[str, HeldOut]:
    return dict(zip(SETTINGS, score_held_out(bench, EXAMPLES, list(SETTINGS.values())), strict=True))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    top = scores.max()
    with np.errstate(divide="ignore"):
        return scores - top - np.log(np.exp(scores - top).sum())


def cut(log_p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens are left, by sorting."""
    order = np.argsort(-log_p, kind="stable")
    order = order[: top_k or len(order)]
    mass = np.exp(log_softmax(log_p[order]))
    num_kept = int((np.cumsum(mass) < top_p).sum()) + 1 if top_p < 1 else len(order)
    keep = np.zeros(len(log_p), bool)
    keep[order[:num_kept]] = True
    return keep


def log_law(
    log_p: np.ndarray, log_q: Mapping[str, np.ndarray], setting: Setting, is_whole: bool
) -> np.ndarray:
    """log π at one position, by docs/method.md word for word."""
    sampling, alignment = setting.sampling, setting.alignment
    scores = log_p
    if alignment.terms:
        weight = sum(term.strength * log_q[term.aligner] for term in alignment.terms)
        nucleus = cut(log_p, 0, 1.0 if is_whole else alignment.proposal_top_p)
        scores = weight if alignment.resampling is Resampling.NUCLEUS else log_p + weight
        scores = np.where(nucleus, scores, -np.inf)
        total = sum(abs(term.strength) for term in alignment.terms)
        mixed = log_softmax(sum(t.strength / total * log_q[t.aligner] for t in alignment.terms))
        if (np.exp(log_p) * (log_p - mixed)).sum() > alignment.kl_threshold:
            scores = log_p
    scores = log_softmax(scores / sampling.temperature)
    if not is_whole:
        scores = np.where(cut(scores, sampling.top_k, sampling.top_p), scores, -np.inf)
    return log_softmax(scores)


def brute_force(models: Mapping[str, PreTrainedModel], setting: Setting) -> tuple[float, float, int]:
    """Perplexity, supported share and number of tokens, a token at a time."""
    log_probs, supported = [], []
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        with torch.inference_mode():
            tables = {name: model(input_ids=ids).logits[0].double().numpy() for name, model in models.items()}
        for place, token in enumerate(example.answer, len(example.prompt) - 1):
            log_q = {name: log_softmax(table[place]) for name, table in tables.items()}
            log_probs.append(log_law(log_q["proposal"], log_q, setting, is_whole=True)[token])
            supported.append(log_law(log_q["proposal"], log_q, setting, is_whole=False)[token] > -np.inf)
    return math.exp(-np.mean(log_probs)), float(np.mean(supported)), len(log_probs)


@pytest.mark.parametrize("name", SETTINGS)
def test_held_out_is_what_brute_force_finds(
    name: str, found: dict[str, HeldOut], models: Mapping[str, PreTrainedModel]
) -> None:
    perplexity, supported, num_tokens = brute_force(models, SETTINGS[name])
    assert found[name].num_tokens == num_tokens == 47
    assert found[name].perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found[name].supported == pytest.approx(supported)
    assert 0 < supported < 1


def test_small_batches_find_the_same(
    bench: Bench, found: dict[str, HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "_MAX_TOKENS", 30)
    monkeypatch.setattr(held_out, "_MAX_STEP_NUMBERS", 900)
    [again] = score_held_out(bench, EXAMPLES, [SETTINGS["product"]])
    assert again.perplexity == pytest.approx(found["product"].perplexity, rel=1e-5)
    assert again.supported == found["product"].supported


def test_candidates_have_no_perplexity_and_the_products_support(bench: Bench) -> None:
    drawn = Setting("", aligned(("polite", 0.7), resampling=Resampling.CANDIDATES), WARM)
    [by_draws, product] = score_held_out(bench, EXAMPLES, [drawn, SETTINGS["product"]])
    assert by_draws.perplexity is None
    assert by_draws.supported == product.supported


def test_what_does_not_fit_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="300 tokens, the context 256"):
        score_held_out(bench, [Example((7,) * 299, (8,))], [SETTINGS["product"]])
    with pytest.raises(ValueError, match="no examples"):
        score_held_out(bench, [], [SETTINGS["product"]])
