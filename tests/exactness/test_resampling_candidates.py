"""The algorithm as printed: draw n, weigh, draw one. Its exact law, by two roads, against what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ram_core.params import AlignmentParams, Resampling, SamplingParams
from ram_core.resampling.modes import draw_from, score_candidates
from ram_core.resampling.noise import Purpose, uniform_noise
from ram_core.resampling.nucleus import log_mask
from ram_core.resampling.params import StepParams
from tests.exactness import laws

P = np.array([0.35, 0.25, 0.2, 0.12, 0.08])
Q = np.array([0.05, 0.3, 0.15, 0.4, 0.1])
IN_NUCLEUS = np.array([True, True, True, True, False])


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def draw_many(
    num_candidates: int, num_rows: int, temperature: float = 1.0, strength: float = 1.0
) -> np.ndarray:
    """Tokens of P and Q by candidates, without the rest of the step; some other row wants three more."""

    def rows(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).float().expand(num_rows, -1)

    asked = (SamplingParams(temperature=temperature), AlignmentParams(num_candidates=num_candidates))
    params = StepParams.of([asked] * num_rows, seeds=range(num_rows), positions=[0] * num_rows)
    scores = score_candidates(
        rows(np.log(P)),
        rows(strength * np.log(Q)),
        log_mask(torch.from_numpy(IN_NUCLEUS).expand(num_rows, -1)),
        params,
        num_candidates + 3,
    )
    mass = (scores / temperature).softmax(-1)
    return draw_from(mass, uniform_noise(params.seed, params.position, Purpose.TOKEN))[:, 0].numpy()


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 6])
def test_enumeration_and_integral_are_one_law(num_candidates):
    rng = np.random.default_rng(num_candidates)
    for _ in range(5):
        mass, weight = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
        enumerated = laws.enumerate_candidates(mass, weight, num_candidates)
        assert enumerated.sum() == pytest.approx(1, abs=1e-12)
        assert laws.integrate_candidates(mass, weight, num_candidates) == pytest.approx(enumerated, abs=1e-12)


def test_many_candidates_tend_to_the_product():
    mass = normalised(P * IN_NUCLEUS)
    product = normalised(mass * Q)
    off = [np.abs(laws.integrate_candidates(mass, Q, n) - product).max() for n in (16, 256, 4096)]
    assert off[0] > 0.01
    assert off[2] < 2e-4
    assert off == sorted(off, reverse=True)
    laws.assert_follows(draw_many(256, 3000), laws.integrate_candidates(mass, Q, 256))


@pytest.mark.parametrize(
    ("num_candidates", "temperature", "strength"),
    [(1, 0.7, 1.0), (2, 1.0, 1.0), (3, 0.7, 2.0), (5, 1.5, -1.0), (16, 1.0, 1.0), (16, 0.5, 1.0)],
)
def test_drawn_tokens_follow_the_exact_law(num_candidates, temperature, strength):
    """Draws come from p^(1/T) on the nucleus, weights are q^(β/T), duplicates keep their count."""
    mass = normalised(P ** (1 / temperature) * IN_NUCLEUS)
    law = laws.integrate_candidates(mass, Q ** (strength / temperature), num_candidates)
    laws.assert_follows(draw_many(num_candidates, 30_000, temperature, strength), law)


def test_bias_and_truncation_act_on_the_candidates_that_were_drawn():
    """The whole step, 3000 seeds, against the mean over all multisets of what the client's knobs leave."""
    sampling = SamplingParams(temperature=0.8, top_k=2, min_p=0.2)
    bias = np.array([0.5, 0, -0.7, 0.2, 0])
    alignment = AlignmentParams(resampling=Resampling.CANDIDATES, num_candidates=3, proposal_top_p=0.9)
    rows = [
        laws.Row(np.log(P), ((np.log(Q), 1.5),), sampling, alignment, bias=bias, seed=seed)
        for seed in range(3000)
    ]

    def finish(weighted: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            scores = np.log(weighted) + bias / 0.8
        kept = laws.keep(scores, top_k=2, min_p=0.2)
        return normalised(np.where(kept, np.exp(scores), 0))

    mass = normalised(P ** (1 / 0.8) * IN_NUCLEUS)
    law = laws.enumerate_candidates(mass, Q ** (1.5 / 0.8), 3, finish)
    laws.assert_follows(laws.draw(rows).token, law)


def test_one_candidate_is_plain_nucleus_sampling_whatever_the_aligner_says():
    alignment = AlignmentParams(resampling=Resampling.CANDIDATES, num_candidates=1, proposal_top_p=0.9)
    tokens = [
        laws.draw(
            [laws.Row(np.log(P), ((aligner, 1.0),), alignment=alignment, seed=seed) for seed in range(500)]
        ).token
        for aligner in (np.log(Q), -9 * np.log(Q))
    ]
    assert torch.equal(*tokens)
    laws.assert_follows(tokens[0], normalised(P * IN_NUCLEUS))


# The draw itself


def test_a_draw_picks_the_token_whose_share_of_the_line_holds_the_noise():
    mass = torch.tensor([[0.25, 0.25, 0.5]])
    noise = torch.tensor([[0.0, 0.25 - 2**-53, 0.25, 0.5 - 2**-53, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert draw_from(mass, noise).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_a_token_without_mass_is_never_drawn_not_even_at_the_ends():
    mass = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    noise = torch.tensor([[0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert draw_from(mass, noise).tolist() == [[1, 1, 3, 3]]
    assert draw_from(torch.tensor([[0.0, 0.0, 1.0]]), noise).tolist() == [[2] * 4]


@pytest.mark.parametrize("total", [0.9999, 1 - 2**-24, 1 + 2**-23, 1.0001])
def test_masses_that_do_not_quite_sum_to_one_keep_their_proportions(total):
    mass = torch.tensor([[0.25, 0.75]]) * total
    noise = torch.tensor([[0.0, 0.25 - 1e-7, 0.25 + 1e-7, 1 - 2**-53]], dtype=torch.float64)
    assert draw_from(mass, noise).tolist() == [[0, 0, 1, 1]]


def test_a_draw_from_a_large_vocabulary_is_exact_in_its_tail():
    """A hundred thousand tokens of equal mass: float32 sums would miss by many tokens."""
    mass = torch.full((1, 2**17), 2.0**-17)
    wanted = torch.tensor([[0, 1, 2**16 + 1, 2**17 - 2, 2**17 - 1]])
    assert torch.equal(draw_from(mass, (wanted.double() + 0.5) / 2**17), wanted)
    assert torch.equal(draw_from(mass, wanted.double() / 2**17), wanted)
