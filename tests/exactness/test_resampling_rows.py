"""A row is its own: no neighbour, padding, dtype or bad row changes one bit of what it draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ram_core.params import AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import Draws
from ram_core.resampling.telemetry import kl_divergence
from tests.exactness import laws
from tests.exactness.laws import Row, random_rows, way  # noqa: F401

pytestmark = pytest.mark.usefixtures("way")
VOCAB_SIZE = 40


def bits(draws: Draws) -> dict[str, torch.Tensor]:
    """Everything that a step yields, NaN made comparable."""
    own = {field.name: getattr(draws, field.name) for field in fields(draws) if field.name != "telemetry"}
    told = {field.name: getattr(draws.telemetry, field.name) for field in fields(draws.telemetry)}
    return {
        name: value.double().nan_to_num(nan=7.0, posinf=8.0, neginf=-8.0)
        for name, value in (own | told).items()
    }


def assert_same(
    draws: Draws, others: Draws, rows: object = slice(None), other_rows: object = slice(None)
) -> None:
    """Bit for bit, on the given rows of each."""
    one, other = bits(draws), bits(others)
    for name in one:
        assert torch.equal(one[name][rows], other[name][other_rows]), name


def aligned_rows(modes: list[Resampling], vocab_size: int = VOCAB_SIZE, scale: float = 3.0) -> list[Row]:
    rng = np.random.default_rng(3)
    return [
        Row(
            rng.normal(size=vocab_size).astype(np.float32) * np.float32(scale),
            ((rng.normal(size=vocab_size).astype(np.float32) * np.float32(scale), 0.7),),
            alignment=AlignmentParams(resampling=mode, num_candidates=4),
            seed=seed,
        )
        for seed, mode in enumerate(modes)
    ]


ONE_OF_EACH = list(Resampling)


def test_a_row_alone_draws_what_it_draws_among_others():
    """Alone it also runs with no more parts of the step than it needs itself."""
    rows = random_rows(VOCAB_SIZE, 150)
    together = laws.draw(rows)
    for i, row in enumerate(rows):
        assert_same(laws.draw([row]), together, other_rows=slice(i, i + 1))


def test_the_order_of_rows_does_not_matter():
    rows = random_rows(VOCAB_SIZE)
    order = np.random.default_rng(0).permutation(len(rows))
    assert_same(laws.draw([rows[i] for i in order]), laws.draw(rows), other_rows=torch.from_numpy(order))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def test_a_row_of_a_large_vocabulary_alone_draws_what_it_draws_among_others():
    """With threads enough to split a single row, which adds its numbers up in another order.

    Divergences gate, so they too must not depend on who else is there.
    """
    rows = aligned_rows(ONE_OF_EACH * 2, vocab_size=150_000)
    with threads(4):
        together = bits(laws.draw(rows))
        for i, row in enumerate(rows[:4]):
            alone = bits(laws.draw([row]))
            for name in ("token", "log_prob", "top_log_prob", "kl_p_q", "is_fallback"):
                assert torch.equal(alone[name][0], together[name][i]), name


@pytest.mark.parametrize("garbage", [[1e30], [math.nan, 5.0], [-math.inf] * 3, [math.inf, -math.inf, 0.0]])
@pytest.mark.parametrize("of", ["proposal", "aligner", "both"])
def test_padding_columns_are_never_looked_at(of, garbage):
    rows = random_rows(VOCAB_SIZE, 60)
    padded = laws.draw(
        rows,
        padding=garbage if of != "aligner" else [],
        aligner_padding=[*garbage, math.nan] if of != "proposal" else [],
    )
    assert_same(padded, laws.draw(rows))
    assert not padded.is_bad.any()
    assert not padded.telemetry.kl_p_q.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_before_anything_is_computed(dtype):
    """Equal to the float32 step on the rounded logits: a bfloat16 softmax would be off by a tenth."""

    def rounded(logits: np.ndarray) -> np.ndarray:
        return torch.from_numpy(logits).to(dtype).double().numpy()

    rows = random_rows(VOCAB_SIZE)
    same = [
        replace(
            row, logits=rounded(row.logits), terms=tuple((rounded(term), beta) for term, beta in row.terms)
        )
        for row in rows
    ]
    assert_same(laws.draw(rows, dtype=dtype), laws.draw(same))


# Bad rows


def spoilt(logits: np.ndarray, how: str) -> np.ndarray:
    spoilt = logits.astype(np.float64)
    if how == "all -inf":
        spoilt[:] = -np.inf
    else:
        spoilt[5] = {"NaN": np.nan, "+inf": np.inf}[how]
    return spoilt


@pytest.mark.parametrize("how", ["NaN", "+inf", "all -inf"])
@pytest.mark.parametrize("of", ["proposal", "aligner"])
def test_a_bad_row_is_told_and_its_neighbours_go_on(of, how):
    modes = ONE_OF_EACH * 3
    good = aligned_rows(modes)
    rows = list(good)
    for i in range(4, 8):
        logits, strength = good[i].terms[0]
        rows[i] = (
            replace(good[i], logits=spoilt(good[i].logits, how))
            if of == "proposal"
            else replace(good[i], terms=((spoilt(logits, how), strength),))
        )
    draws = laws.draw(rows)
    assert draws.is_bad.tolist() == [4 <= i < 8 for i in range(12)]
    others = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    assert_same(draws, laws.draw(good), others, others)
    assert (draws.token[4:8] >= 0).all()
    assert (draws.token[4:8] < VOCAB_SIZE).all()


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_one_spoilt_aligner_of_several_spoils_its_own_row_only(nth):
    rows = [replace(row, terms=row.terms * 3) for row in aligned_rows([Resampling.PRODUCT] * 3)]
    terms = list(rows[1].terms)
    terms[nth] = (np.full(VOCAB_SIZE, np.nan), 0.5)
    rows[1] = replace(rows[1], terms=tuple(terms))
    assert laws.draw(rows).is_bad.tolist() == [False, True, False]


def test_a_few_zeros_are_not_bad():
    holes = np.where(np.arange(VOCAB_SIZE) % 4, -np.inf, 1.0)
    rows = [replace(row, logits=row.logits + holes) for row in aligned_rows(ONE_OF_EACH)]
    draws = laws.draw(rows)
    assert not draws.is_bad.any()
    assert (draws.token % 4 == 0).all()


def test_nan_hidden_behind_a_grammar_is_still_bad():
    allowed = np.arange(VOCAB_SIZE) != 5
    row = aligned_rows([Resampling.PRODUCT])[0]
    rows = [
        replace(row, logits=spoilt(row.logits, "NaN"), allowed=allowed),
        replace(row, allowed=allowed),
    ]
    assert laws.draw(rows).is_bad.tolist() == [True, False]


@pytest.mark.parametrize("mode", list(Resampling))
def test_a_grammar_that_leaves_nothing_is_a_bad_row_and_no_nan_for_others(mode):
    rows = aligned_rows([mode] * 3)
    rows[1] = replace(rows[1], allowed=np.zeros(VOCAB_SIZE, dtype=bool))
    draws = laws.draw(rows)
    assert draws.is_bad.tolist() == [False, True, False]
    assert_same(draws, laws.draw(aligned_rows([mode] * 3)), torch.tensor([0, 2]), torch.tensor([0, 2]))


@pytest.mark.parametrize("bias", [-np.inf, np.inf, np.nan])
def test_a_bias_that_leaves_no_law_is_a_bad_row_and_harms_no_neighbour(bias):
    """With truncation on, which must not stumble over it either."""
    rows = [replace(row, sampling=SamplingParams(top_p=0.9)) for row in aligned_rows(ONE_OF_EACH)]
    spoiling = [replace(row, bias=np.full(VOCAB_SIZE, bias)) if i == 2 else row for i, row in enumerate(rows)]
    draws = laws.draw(spoiling)
    assert draws.is_bad.tolist() == [False, False, True, False]
    others = torch.tensor([0, 1, 3])
    assert_same(draws, laws.draw(rows), others, others)


def test_a_bias_may_forbid_tokens_altogether():
    bias = np.where(np.arange(VOCAB_SIZE) < 30, -np.inf, 0.0)
    rows = [replace(row, bias=bias) for row in aligned_rows([Resampling.PROPOSAL] * 50)]
    draws = laws.draw(rows)
    assert (draws.token >= 30).all()
    assert not draws.is_bad.any()


# Telemetry


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("vocab_size", [1000, 128_256])
def test_telemetry_equals_float64_over_a_large_vocabulary(vocab_size, scale):
    """Flat to peaked: to 1e-5, and so are the log-probabilities on a nucleus that is the same but for ties.

    In a flat row several tokens are equal in float32 but not in float64 where the nucleus ends.
    """
    rows = aligned_rows([Resampling.PRODUCT, Resampling.NUCLEUS], vocab_size, scale)
    draws = laws.draw(rows)
    seen = laws.laws(draws)
    for i, row in enumerate(rows):
        expected = laws.step(row)
        in_both = (seen[i] > 0) & (expected.law > 0)
        assert ((seen[i] > 0) ^ (expected.law > 0)).sum() <= 4
        assert np.abs(np.log(seen[i][in_both] / expected.law[in_both])).max() < 1e-5
        for name in ("kl_p_q", "kl_pi_p", "ess", "aligner_mass"):
            value = getattr(draws.telemetry, name)[i].item()
            assert value == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-5), name


def test_a_divergence_is_never_negative_and_never_nan():
    rng = np.random.default_rng(0)
    log_p = torch.from_numpy(rng.normal(size=(200, 500)) * 3).float()
    log_p[:, ::3] = -torch.inf
    log_p = log_p.log_softmax(-1)
    assert (kl_divergence(log_p.softmax(-1), log_p, log_p) == 0).all()
    for blur in (1e-7, 1e-5, 1e-3):
        near = (log_p + torch.from_numpy(rng.normal(size=log_p.shape) * blur).float()).log_softmax(-1)
        divergence = kl_divergence(log_p.softmax(-1), log_p, near)
        assert (divergence >= 0).all()
        assert (divergence < 1e-6 + 2 * blur**2).all()


def test_a_divergence_is_infinite_where_the_aligner_lacks_the_proposals_support():
    log_p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    log_q = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).log()
    assert kl_divergence(log_p.softmax(-1), log_p, log_q).tolist() == [math.inf, pytest.approx(math.log(2))]


def test_a_row_without_an_aligner_reports_zeros():
    rows = [
        Row(np.arange(5.0)),
        *aligned_rows([Resampling.PROPOSAL], 5),
        *aligned_rows([Resampling.PRODUCT], 5),
    ]
    telemetry = laws.draw(rows).telemetry
    for field in fields(telemetry):
        assert (getattr(telemetry, field.name)[:2] == 0).all()
    assert telemetry.ess[2] > 0
