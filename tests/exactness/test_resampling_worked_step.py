"""The worked step of docs/method.md: four tokens, every mode, each number to the last printed digit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ram_core.params import AlignmentParams, Resampling, SamplingParams
from tests.exactness import laws
from tests.exactness.laws import way  # noqa: F401

pytestmark = pytest.mark.usefixtures("way")

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.10, 0.60, 0.25, 0.05])
MASS = np.array([10, 6, 3, 0]) / 19
TOP_P = 0.9

CANDIDATES = {
    1: (0.5263, 0.3158, 0.1579, 0),
    2: (0.3720, 0.4550, 0.1730, 0),
    4: (0.2705, 0.5644, 0.1652, 0),
    8: (0.2228, 0.6235, 0.1537, 0),
    16: (0.2032, 0.6499, 0.1469, 0),
    64: (0.1907, 0.6675, 0.1418, 0),
}
EXACT = {
    Resampling.PRODUCT: (0.1869, 0.6729, 0.1402, 0),
    Resampling.NUCLEUS: (0.1053, 0.6316, 0.2632, 0),
    Resampling.PROPOSAL: tuple(P),
}


def worked(mode: Resampling, seed: int = 0, temperature: float = 1.0, num_candidates: int = 1) -> laws.Row:
    return laws.Row(
        np.log(P),
        ((np.log(Q), 1.0),),
        SamplingParams(temperature=temperature),
        AlignmentParams(resampling=mode, proposal_top_p=TOP_P, num_candidates=num_candidates),
        seed=seed,
    )


def close(expected: object) -> object:
    """Equal in all four printed digits."""
    return pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize("mode", EXACT)
def test_each_mode_has_the_printed_law(mode):
    draws = laws.draw([worked(mode)])
    assert laws.laws(draws)[0] == close(EXACT[mode])
    assert laws.step(worked(mode)).law == close(EXACT[mode])


@pytest.mark.parametrize("num_candidates", CANDIDATES)
def test_the_exact_law_of_candidates_is_as_printed(num_candidates):
    """Both references: the integral for any n, the enumeration of multisets while there are few."""
    printed = close(CANDIDATES[num_candidates])
    assert laws.integrate_candidates(MASS, Q, num_candidates) == printed
    assert laws.enumerate_candidates(MASS, Q, num_candidates) == printed


@pytest.mark.parametrize("num_candidates", [1, 2, 4])
def test_drawn_candidates_follow_their_exact_law_and_not_just_the_limit(num_candidates):
    rows = [worked(Resampling.CANDIDATES, seed, num_candidates=num_candidates) for seed in range(4000)]
    laws.assert_follows(laws.draw(rows).token, laws.enumerate_candidates(MASS, Q, num_candidates))


@pytest.mark.parametrize("mode", EXACT)
def test_drawn_tokens_follow_the_law_of_their_mode(mode):
    draws = laws.draw([worked(mode, seed) for seed in range(4000)])
    law = laws.step(worked(mode)).law
    laws.assert_follows(draws.token, law)
    assert draws.log_prob.tolist() == pytest.approx(np.log(law[draws.token]).tolist(), abs=1e-5)


def test_the_log_probability_of_candidates_is_said_to_be_unavailable():
    draws = laws.draw([worked(Resampling.CANDIDATES), worked(Resampling.PRODUCT)])
    assert draws.log_prob.isnan().tolist() == [True, False]
    assert draws.top_log_prob.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("mode", [Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS])
def test_telemetry_is_as_printed(mode):
    """KL(p‖q) over the whole vocabulary, ρ₂ = 1.6247, ESS = 1/ρ₂, and q's mass on the nucleus."""
    telemetry = laws.draw([worked(mode)]).telemetry
    assert telemetry.kl_p_q.item() == close(0.5202)
    assert telemetry.ess.item() == close(0.6155)
    assert 1 / telemetry.ess.item() == close(1.6247)
    assert telemetry.aligner_mass.item() == pytest.approx(0.95, abs=1e-6)
    assert not telemetry.is_fallback.item()
    law = np.array(EXACT[Resampling.NUCLEUS if mode is Resampling.NUCLEUS else Resampling.PRODUCT])
    shift = float((law[:3] * np.log(law[:3] / P[:3])).sum())
    assert telemetry.kl_pi_p.item() == pytest.approx(shift, abs=5e-4)


@pytest.mark.parametrize("mode", list(Resampling))
def test_a_cold_row_takes_the_most_probable_token_of_its_mode(mode):
    draws = laws.draw([worked(mode, temperature=0.0)])
    assert draws.token.tolist() == [0 if mode is Resampling.PROPOSAL else 1]
    law = EXACT[Resampling.PRODUCT if mode is Resampling.CANDIDATES else mode]
    assert draws.log_prob.exp().item() == close(max(law))


def test_the_printed_bias_of_few_candidates_is_the_first_order_of_the_exact_law():
    """P_n(v) = π_v [1 + (ρ₂ − q_v/Z)/n + O(n⁻²)]."""
    z = float(MASS @ Q)
    rho = float(MASS @ Q**2) / z**2
    limit = MASS * Q / z
    for num_candidates in (64, 256):
        first_order = limit * (1 + (rho - Q / z) / num_candidates)
        exact = laws.integrate_candidates(MASS, Q, num_candidates)
        assert np.abs(exact - first_order).max() < 2 / num_candidates**2


def test_the_noise_of_a_row_decides_its_token():
    """Tokens of one seed: every mode against the twin that draws with the same noise."""
    for mode in Resampling:
        rows = [worked(mode, seed, num_candidates=5) for seed in range(100)]
        expected = [laws.step(row).token for row in rows]
        assert laws.draw(rows).token.tolist() == expected
    assert torch.equal(laws.draw(rows).token, laws.draw(rows).token)
