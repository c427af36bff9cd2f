"""Every mode under random settings against its slow twin: law, token, telemetry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ram_core.params import AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import StepFeatures
from ram_core.resampling.nucleus import keep_top_k, keep_top_p
from tests.exactness import laws
from tests.exactness.laws import Row, random_rows, way  # noqa: F401

pytestmark = pytest.mark.usefixtures("way")


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 40])
def test_random_rows_equal_their_slow_twins(vocab_size):
    """Laws to 2e-5 and telemetry to 1e-5; tokens exactly, drawn with the same noise.

    Rows in which float64 and float32 may differ over what to keep, or over a draw on the edge between two
    tokens, are told by their margin and left out: less than one in fifty.
    """
    rows = random_rows(vocab_size)
    draws, num_compared = laws.draw(rows), 0
    seen = laws.laws(draws)
    for i, row in enumerate(rows):
        expected = laws.step(row)
        if expected.margin < 2e-5:
            continue
        num_compared += 1
        assert draws.token[i] == expected.token, row
        if expected.law is None:
            assert draws.log_prob[i].isnan()
        else:
            assert np.abs(seen[i] - expected.law).max() < 2e-5, row
            assert draws.log_prob[i].exp() == pytest.approx(expected.law[expected.token], abs=2e-5)
        for name in ("kl_p_q", "kl_pi_p", "ess", "aligner_mass", "is_fallback"):
            value = getattr(draws.telemetry, name)[i].item()
            assert value == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-5), (name, row)
    assert num_compared > 0.98 * len(rows)
    assert not draws.is_bad.any()


# Identities


def rows_with(num_rows: int = 60, vocab_size: int = 12, **alignment: object) -> list[Row]:
    rng = np.random.default_rng(11)
    return [
        Row(
            rng.normal(size=vocab_size) * 2,
            ((rng.normal(size=vocab_size) * 2, 1.0),),
            alignment=AlignmentParams(**alignment),
            seed=seed,
        )
        for seed in range(num_rows)
    ]


def law_of(rows: list[Row]) -> np.ndarray:
    return laws.laws(laws.draw(rows))


def nucleus_sampling(row: Row) -> np.ndarray:
    """Plain nucleus sampling from the proposal."""
    kept = laws.keep(row.logits, top_p=row.alignment.proposal_top_p)
    return np.exp(laws.log_softmax(np.where(kept, row.logits, -np.inf)))


def sharpen(row: Row, temperature: float) -> Row:
    return replace(row, sampling=SamplingParams(temperature=temperature))


def with_terms(row: Row, *terms: tuple[np.ndarray, float]) -> Row:
    return replace(row, terms=terms)


def test_a_constant_aligner_leaves_plain_nucleus_sampling():
    rows = [with_terms(row, (np.full(12, 3.0), 1.0)) for row in rows_with(proposal_top_p=0.8)]
    expected = np.stack([nucleus_sampling(row) for row in rows])
    assert np.abs(law_of(rows) - expected).max() < 1e-6
    assert laws.draw(rows).telemetry.ess == pytest.approx(1.0)


def test_a_constant_aligner_makes_mode_nucleus_uniform():
    rows = rows_with(resampling=Resampling.NUCLEUS, proposal_top_p=0.8)
    rows = [with_terms(row, (np.full(12, 3.0), 1.0)) for row in rows]
    expected = np.stack([(nucleus_sampling(row) > 0) / (nucleus_sampling(row) > 0).sum() for row in rows])
    assert np.abs(law_of(rows) - expected).max() < 1e-6


def test_an_aligner_equal_to_the_proposal_halves_the_temperature():
    rows = rows_with(proposal_top_p=1.0)
    aligned = [with_terms(sharpen(row, 0.8), (row.logits, 1.0)) for row in rows]
    plain = [with_terms(sharpen(row, 0.4)) for row in rows]
    assert np.abs(law_of(aligned) - law_of(plain)).max() < 1e-6
    assert laws.draw(aligned).telemetry.kl_p_q.abs().max() < 1e-6


def test_strength_zero_is_the_proposal_even_where_the_aligner_has_no_mass():
    logits = np.full(12, -np.inf)
    logits[3] = 0.0
    rows = [with_terms(row, (logits, 0.0)) for row in rows_with(proposal_top_p=0.8)]
    expected = np.stack([nucleus_sampling(row) for row in rows])
    assert np.abs(law_of(rows) - expected).max() < 1e-6
    assert not laws.draw(rows).telemetry.is_fallback.any()


@pytest.mark.parametrize("mode", [Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS])
@pytest.mark.parametrize(
    "knob", [{"proposal_top_k": 1}, {"proposal_top_p": 1e-6}, {"proposal_temperature": 1e-45}]
)
def test_a_nucleus_of_one_token_leaves_no_choice(mode, knob):
    rows = rows_with(resampling=mode, **{"proposal_top_p": 0.9} | knob)
    assert laws.draw(rows).token.tolist() == [int(row.logits.argmax()) for row in rows]


def test_a_gate_at_infinity_never_falls_back_and_one_below_zero_always_does():
    empty = np.full(12, -np.inf)
    empty[0] = 0.0
    for strength_of_hole in (0.0, 1.0):
        rows = [
            with_terms(row, *row.terms, (empty, strength_of_hole)) for row in rows_with(proposal_top_p=1.0)
        ]
        assert not laws.draw(rows).telemetry.is_fallback.any()
    rows = [with_terms(row, (row.logits, 1.0)) for row in rows_with(kl_threshold=-1.0)]
    assert laws.draw(rows).telemetry.is_fallback.all()


def test_a_fallback_draws_from_the_proposal_over_the_whole_vocabulary():
    rows = rows_with(kl_threshold=-1.0, proposal_top_p=0.3)
    expected = np.stack([np.exp(laws.log_softmax(row.logits)) for row in rows])
    assert np.abs(law_of(rows) - expected).max() < 1e-6
    assert laws.draw(rows).telemetry.kl_pi_p.abs().max() < 1e-6


def test_a_fallback_still_heeds_the_clients_own_knobs():
    client = SamplingParams(temperature=0.5, top_k=5, top_p=0.8)
    rows = [replace(row, sampling=client) for row in rows_with(kl_threshold=-1.0)]
    plain = [replace(row, terms=()) for row in rows]
    assert np.array_equal(law_of(rows), law_of(plain))


def test_the_gate_opens_exactly_at_the_divergence_and_for_its_own_row_only():
    rows = rows_with()
    kl = laws.draw(rows).telemetry.kl_p_q
    gated = [
        replace(row, alignment=AlignmentParams(kl_threshold=kl[i].item() * (1 if i % 2 else 1 - 1e-6)))
        for i, row in enumerate(rows)
    ]
    assert laws.draw(gated).telemetry.is_fallback.tolist() == [i % 2 == 0 for i in range(len(rows))]


def test_strengths_add():
    rows = rows_with()
    twice = [with_terms(row, *[(row.terms[0][0], 0.75)] * 2) for row in rows]
    once = [with_terms(row, (row.terms[0][0], 1.5)) for row in rows]
    assert np.abs(law_of(twice) - law_of(once)).max() < 1e-6
    for name in ("kl_p_q", "kl_pi_p", "ess", "aligner_mass"):
        both = [getattr(laws.draw(some).telemetry, name) for some in (twice, once)]
        assert torch.allclose(*both, atol=1e-6)


def test_a_mixture_is_told_as_one_normalised_aligner():
    rows = rows_with(proposal_top_p=0.8)
    rows = [with_terms(row, (row.terms[0][0], 1.5), (row.terms[0][0][::-1].copy(), 0.5)) for row in rows]
    draws, steps = laws.draw(rows), [laws.step(row) for row in rows]
    for name in ("kl_p_q", "kl_pi_p", "ess", "aligner_mass"):
        told = getattr(draws.telemetry, name).tolist()
        assert told == pytest.approx([getattr(step, name) for step in steps], abs=1e-5), name


def test_opposite_strengths_cancel():
    rows = rows_with(proposal_top_p=0.8)
    cancelled = [with_terms(row, (row.terms[0][0], 1.0), (row.terms[0][0], -1.0)) for row in rows]
    expected = np.stack([nucleus_sampling(row) for row in rows])
    assert np.abs(law_of(cancelled) - expected).max() < 1e-6


def test_a_cold_row_takes_the_arg_max_of_the_product():
    rows = [sharpen(row, 0.0) for row in rows_with(resampling=Resampling.CANDIDATES, proposal_top_p=0.9)]
    products = np.stack([laws.step(row).law for row in rows])
    draws = laws.draw(rows)
    assert draws.token.tolist() == products.argmax(-1).tolist()
    assert np.abs(laws.laws(draws) - products).max() < 1e-6


@pytest.mark.parametrize("temperature", [1e-30, 9e-6, 1e-5, 2e-5, 1e-3])
@pytest.mark.parametrize("mode", list(Resampling))
def test_temperatures_close_to_zero_are_stable_and_tend_to_the_arg_max(temperature, mode):
    rows = rows_with(resampling=mode, num_candidates=256, proposal_top_p=0.9)
    draws = laws.draw([sharpen(row, temperature) for row in rows])
    cold = laws.draw([sharpen(row, 0.0) for row in rows])
    # Of few candidates drawn cold, the most probable one wins: the proposal's, not the product's.
    if mode is not Resampling.CANDIDATES or temperature < 1e-5:
        assert torch.equal(draws.token, cold.token)
        assert not draws.log_prob.isnan().any()
    else:
        assert draws.token.tolist() == [int(row.logits.argmax()) for row in rows]


def test_end_of_text_takes_priority_only_where_asked_aligned_and_preferred():
    ends = np.zeros(12)
    ends[laws.EOS_ID] = 4.0
    shuns = -ends * 5
    asked, not_asked = AlignmentParams(eos_priority=True), AlignmentParams()
    rows = [
        Row(ends, ((shuns, 1.0),), alignment=asked),
        Row(ends, ((shuns, 1.0),), alignment=not_asked),
        Row(ends, (), alignment=asked),
        Row(ends, ((shuns, 1.0),), SamplingParams(ignore_eos=True), asked),
    ]
    ending = law_of(rows)[:, laws.EOS_ID]
    assert ending[0] == 1
    assert ending[1] < 1e-6
    assert 0.5 < ending[2] < 0.9
    assert ending[3] < 1e-6


def test_end_of_text_that_the_proposal_does_not_prefer_is_left_to_chance():
    logits = np.array([1.0, 0.9, 0.0])
    row = Row(logits, ((np.zeros(3), 1.0),), alignment=AlignmentParams(eos_priority=True, proposal_top_p=1.0))
    assert law_of([row])[0] == pytest.approx(np.exp(laws.log_softmax(logits)), abs=1e-6)


def test_a_cold_row_never_takes_a_token_that_its_own_truncation_dropped():
    """Scores can differ where probabilities no longer do: `top_k` then says which token it is."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(3000):
        bias = np.full(3, rng.normal(), dtype=np.float32)
        bias[1] = np.nextafter(bias[1], np.float32(9))
        cold = SamplingParams(temperature=0.0, top_k=1)
        rows.append(Row(np.array([0.0, 0.0, -20.0]), (), cold, bias=bias))
    draws = laws.draw(rows)
    assert len(draws.token.unique()) == 2
    assert (draws.log_prob == 0).all()


def test_alternatives_too_improbable_for_float32_keep_their_digits():
    draws = laws.draw([Row(np.array([0.0, -95.5, -150.25]), seed=seed) for seed in range(20)])
    assert (draws.token == 0).all()
    expected = torch.tensor([0.0, -95.5, -150.25]).expand(20, -1)
    torch.testing.assert_close(draws.top_log_prob, expected, rtol=1e-6, atol=1e-6)


def test_ties_just_below_a_power_of_two_are_cut_as_elsewhere():
    """Their last twenty bits are all ones, so the search for them stands at the upper edge of its range."""
    below = float(np.nextafter(np.float32(0.125), np.float32(0)))
    p = torch.tensor([[below, 0.5, below, below, 0.125]])
    assert keep_top_p(p, torch.tensor([0.7])).tolist() == [[True, True, False, False, True]]
    assert keep_top_p(p, torch.tensor([0.8])).tolist() == [[True, True, True, False, True]]
    assert keep_top_k(p, torch.tensor([3])).tolist() == [[True, True, False, False, True]]


# Contrast


def test_a_contrast_prefers_what_its_model_shuns():
    rows = rows_with(proposal_top_p=0.9)
    rows = [with_terms(row, (row.terms[0][0], -0.5)) for row in rows]
    expected = np.stack([laws.step(row).law for row in rows])
    assert np.abs(law_of(rows) - expected).max() < 1e-5


def test_a_contrast_heeds_a_grammar():
    """A token that the grammar forbids has no mass in q, whatever the sign of its exponent."""
    allowed = np.arange(12) % 3 == 0
    rows = rows_with(proposal_top_p=0.9)
    rows = [replace(with_terms(row, (row.terms[0][0], -0.5)), allowed=allowed) for row in rows]
    draws = laws.draw(rows)
    steps = [laws.step(row) for row in rows]
    assert np.abs(laws.laws(draws) - np.stack([step.law for step in steps])).max() < 1e-5
    assert draws.telemetry.kl_p_q.tolist() == pytest.approx([step.kl_p_q for step in steps], abs=1e-5)
    assert draws.telemetry.aligner_mass.tolist() == pytest.approx([s.aligner_mass for s in steps], abs=1e-5)


def test_a_zero_of_a_contrast_outside_the_nucleus_does_not_blur_the_law_on_it():
    rows = []
    for row in rows_with(proposal_top_p=0.9):
        contrast = row.terms[0][0].copy()
        contrast[int(row.logits.argmin())] = -np.inf
        rows.append(with_terms(row, (contrast, -1.0)))
    # In the twin the zero, outside of the nucleus, does no harm at any exponent.
    twins = [with_terms(row, (np.maximum(row.terms[0][0], -40), -1.0)) for row in rows]
    expected = np.stack([laws.step(row).law for row in twins])
    assert np.abs(law_of(rows) - expected).max() < 1e-4


# Nothing to choose from


def without_mass_on_the_likely(row: Row) -> np.ndarray:
    """An aligner whose only token is the proposal's least probable one."""
    logits = np.full(len(row.logits), -np.inf)
    logits[int(row.logits.argmin())] = 0.0
    return logits


@pytest.mark.parametrize("mode", [Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS])
def test_an_aligner_without_mass_on_the_nucleus_is_a_fallback_and_never_nan(mode):
    rows = [
        with_terms(row, (without_mass_on_the_likely(row), 1.0))
        for row in rows_with(num_rows=2000, resampling=mode, proposal_top_p=0.5)
    ]
    rows = [replace(row, logits=rows[0].logits, terms=rows[0].terms) for row in rows]
    draws = laws.draw(rows)
    assert draws.telemetry.is_fallback.all()
    assert draws.telemetry.kl_p_q.isposinf().all()
    assert (draws.telemetry.aligner_mass == 0).all()
    assert (draws.telemetry.ess == 0).all()
    assert (draws.telemetry.kl_pi_p == 0).all()
    law = np.exp(laws.log_softmax(rows[0].logits))
    likely = np.where(law > 0.01, np.arange(len(law)), law.argmin())
    laws.assert_follows(likely[draws.token], np.bincount(likely, law, minlength=len(law)))


def test_two_aligners_that_share_no_token_are_a_fallback_and_never_nan():
    even, odd = np.arange(12) % 2 == 0, np.arange(12) % 2 == 1
    rows = [
        with_terms(row, (np.where(even, 0, -np.inf), 1.0), (np.where(odd, 0, -np.inf), 1.0))
        for row in rows_with(proposal_top_p=0.9)
    ]
    draws = laws.draw(rows)
    assert draws.telemetry.is_fallback.all()
    assert np.abs(laws.laws(draws) - np.stack([laws.step(row).law for row in rows])).max() < 1e-6
    assert draws.telemetry.kl_p_q.isposinf().all()
    assert (draws.telemetry.ess == 0).all()
    assert not draws.is_bad.any()


def test_an_aligner_that_shuns_all_that_a_grammar_allows_is_a_fallback_and_not_a_bad_row():
    allowed = np.arange(12) % 2 == 0
    rows = [
        replace(with_terms(row, (np.where(allowed, -np.inf, 0), 1.0)), allowed=allowed) for row in rows_with()
    ]
    draws = laws.draw(rows)
    assert not draws.is_bad.any()
    assert draws.telemetry.is_fallback.all()
    assert np.abs(laws.laws(draws) - np.stack([laws.step(row).law for row in rows])).max() < 1e-6


def test_candidates_without_any_weight_are_a_fallback_and_never_nan():
    """The nucleus has a token that the aligner likes, but it was not among the drawn."""
    likes_third = np.array([-np.inf, -np.inf, 0.0, 0.0])
    row = Row(
        np.log([0.6, 0.2, 0.15, 0.05]),
        ((likes_third, 1.0),),
        alignment=AlignmentParams(resampling=Resampling.CANDIDATES, num_candidates=2, proposal_top_p=0.9),
    )
    rows = [replace(row, seed=seed) for seed in range(1500)]
    draws = laws.draw(rows)
    steps = [laws.step(row) for row in rows]
    assert draws.telemetry.is_fallback.tolist() == [step.is_fallback for step in steps]
    assert draws.token.tolist() == [step.token for step in steps]
    assert draws.log_prob.isnan().all()
    p = np.array([0.6, 0.2, 0.15, 0.05])

    def finish(weighted: np.ndarray) -> np.ndarray:
        return weighted / weighted.sum() if weighted.sum() else p

    mass = np.array([0.6, 0.2, 0.15, 0]) / 0.95
    laws.assert_follows(draws.token, laws.enumerate_candidates(mass, np.exp(likes_third), 2, finish))


# Which parts of the step run


ALL_ON = StepFeatures(
    is_aligned=True,
    has_proposal_temperature=True,
    has_proposal_top_k=True,
    has_proposal_top_p=True,
    has_mixtures=True,
    has_nucleus_mode=True,
    max_candidates=40,
    has_greedy=True,
    has_top_k=True,
    has_top_p=True,
    has_min_p=True,
    has_eos_priority=True,
)


@pytest.mark.parametrize("vocab_size", [2, 7, 40])
def test_parts_of_the_step_that_no_row_needs_change_nothing(vocab_size):
    """Bit for bit: each kind of row alone with the least that it needs, and with everything switched on."""
    rows = [row for row in random_rows(vocab_size) if row.bias is None]
    alike: dict[StepFeatures, list[Row]] = {}
    for row in rows:
        # A cold proposal puts tokens below what float32 can hold.
        row = replace(row, logits=row.logits * 60) if row.seed % 3 == 0 else row
        alike.setdefault(StepFeatures.of([row.params]), []).append(row)
    assert len(alike) > 20
    for group in list(alike.values())[:60]:
        least, most = laws.draw(group), laws.draw(group, features=ALL_ON)
        assert torch.equal(least.token, most.token)
        for name in ("log_prob", "top_log_prob"):
            assert torch.equal(getattr(least, name).nan_to_num(7), getattr(most, name).nan_to_num(7))
        assert torch.equal(least.telemetry.kl_p_q, most.telemetry.kl_p_q)
        assert torch.equal(least.telemetry.is_fallback, most.telemetry.is_fallback)
