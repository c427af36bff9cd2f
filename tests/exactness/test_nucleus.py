"""The nucleus found by digits is the sort's nucleus, token for token, in tensors and in compiled code.

Why they are equal: order a row by probability, most probable first, and lower ids first among equals. The
fewest tokens whose mass reaches a target are then a prefix of that order, and a prefix is told by the value
of its last token and by how many of that value it holds. Bit patterns of non-negative floats are ordered as
the floats are. So the value sought is the largest bit pattern at or above which the mass reaches the
target: three histograms of ten bits each find it digit by digit, and a running sum over the ids of that one
value finds how many. All masses are 64-bit integers (units of 2⁻⁵²), whose sums do not depend on their
order: both ways add up the same numbers to the same totals, ties and rounding included.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from ram_core.resampling import kernel
from ram_core.resampling.compiled import Room
from ram_core.resampling.nucleus import keep_min_p, keep_top_k, keep_top_p, truncate
from tests.exactness import laws

TOP_PS = [1e-30, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 2**-24, 1.0]


def units_of(p: np.ndarray) -> np.ndarray:
    return np.floor(p.astype(np.float64) * 2.0**52).astype(np.int64)


def most_probable_first(p: np.ndarray) -> np.ndarray:
    return np.argsort(-p, kind="stable")


def target_of(p: np.ndarray, top_p: float) -> int:
    total = int(units_of(p).sum())
    return min(max(int(float(total) * float(np.float32(top_p))), 1), total)


def sorted_top_p(p: np.ndarray, top_p: float) -> np.ndarray:
    if top_p >= 1:
        return np.ones(len(p), dtype=bool)
    order = most_probable_first(p)
    mass = np.cumsum(units_of(p)[order])
    kept = np.zeros(len(p), dtype=bool)
    kept[order[: int(np.searchsorted(mass, target_of(p, top_p))) + 1]] = True
    return kept


def sorted_top_k(p: np.ndarray, top_k: int) -> np.ndarray:
    kept = np.zeros(len(p), dtype=bool)
    kept[most_probable_first(p)[: top_k or len(p)]] = True
    return kept


def rows_of(vocab_size: int) -> dict[str, torch.Tensor]:
    """Distributions of all shapes, by what is odd about them."""
    generator = torch.Generator().manual_seed(vocab_size)
    normal = torch.randn(vocab_size, generator=generator)
    spike = torch.zeros(vocab_size)
    spike[vocab_size // 2] = 30.0
    holes = normal.masked_fill(torch.rand(vocab_size, generator=generator) < 0.7, -torch.inf)
    holes[vocab_size // 3] = 1.0
    alone = torch.full((vocab_size,), -torch.inf)
    alone[-1] = 0.0
    logits = {
        "random": normal * 3,
        "peaked": normal * 12,
        "flat": torch.zeros(vocab_size),
        "flat but for noise": normal * 1e-6,
        "ties, as bfloat16 makes them": (normal * 3).bfloat16().float(),
        "few values": (normal * 2).round(),
        "zeros": holes,
        "one token": alone,
        "one spike": spike,
        "a long tail": -torch.arange(vocab_size).float().sqrt(),
        "underflow": normal * 60,
    }
    return {name: row.softmax(-1) for name, row in logits.items()}


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 1000, 150_000])
def test_top_p_keeps_what_the_sort_keeps(vocab_size):
    rows = rows_of(vocab_size)
    p = torch.stack(list(rows.values()))
    for top_p in TOP_PS if vocab_size <= 1000 else [0.3, 0.95, 1 - 2**-24]:
        kept = keep_top_p(p, torch.full((len(p),), top_p)).numpy()
        for name, row, of_row in zip(rows, p.numpy(), kept, strict=True):
            assert np.array_equal(of_row, sorted_top_p(row, top_p)), (name, top_p)


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 1000, 150_000])
def test_top_k_keeps_what_the_sort_keeps(vocab_size):
    rows = rows_of(vocab_size)
    p = torch.stack(list(rows.values()))
    top_ks = [0, 1, 2, 50, vocab_size - 1, vocab_size, vocab_size + 1, 2**31 - 1]
    for top_k in top_ks if vocab_size <= 1000 else [50, vocab_size // 3, 2**31 - 1]:
        kept = keep_top_k(p, torch.full((len(p),), top_k)).numpy()
        for name, row, of_row in zip(rows, p.numpy(), kept, strict=True):
            assert np.array_equal(of_row, sorted_top_k(row, top_k)), (name, top_k)


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 1000, 150_000])
def test_min_p_keeps_what_a_comparison_keeps(vocab_size):
    p = torch.stack(list(rows_of(vocab_size).values()))
    for min_p in (0.0, 1e-30, 0.05, 0.5, 1.0):
        kept = keep_min_p(p, torch.full((len(p),), min_p)).numpy()
        assert np.array_equal(kept, p.numpy() >= np.float32(min_p) * p.numpy().max(-1, keepdims=True))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32)), min_size=1, max_size=12
    ),
    st.floats(0, 1, exclude_min=True, width=32),
)
def test_the_nucleus_reaches_its_mass_and_not_without_its_last_token(masses, top_p):
    p = torch.tensor(masses)
    p = (p + (p.sum() == 0)) / (p + (p.sum() == 0)).sum()
    kept = keep_top_p(p[None], torch.tensor([top_p]))[0].numpy()
    units, target = units_of(p.numpy()), target_of(p.numpy(), top_p)
    assert kept[int(p.argmax())]
    assert p.numpy()[kept].min() >= p.numpy()[~kept].max(initial=0)
    assert units[kept].sum() >= target
    if top_p < 1:
        last = np.flatnonzero(kept & (p.numpy() == p.numpy()[kept].min()))[-1]
        assert units[kept].sum() - units[last] < target


def test_lower_ids_come_first_among_equally_probable_tokens():
    p = torch.tensor([[0.125, 0.25, 0.125, 0.125, 0.25, 0.125]])
    assert keep_top_p(p, torch.tensor([0.6])).tolist() == [[True, True, False, False, True, False]]
    assert keep_top_p(p, torch.tensor([0.25])).tolist() == [[False, True, False, False, False, False]]
    assert keep_top_k(p, torch.tensor([4])).tolist() == [[True, True, True, False, True, False]]


def test_mass_that_only_just_reaches_is_enough():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert keep_top_p(p, torch.tensor([0.75])).sum() == 2
    assert keep_top_p(p, torch.tensor([0.75 + 2**-23])).sum() == 3


def test_each_row_has_its_own_knobs_and_knows_no_neighbour():
    p = torch.stack(list(rows_of(1000).values()))
    top_p = torch.linspace(0.05, 1.0, len(p))
    top_k = torch.arange(len(p)) * 7
    for keep, knob in ((keep_top_p, top_p), (keep_top_k, top_k), (keep_min_p, top_p)):
        together = keep(p, knob)
        for i in range(len(p)):
            assert torch.equal(keep(p[i : i + 1], knob[i : i + 1])[0], together[i])


def test_each_cut_acts_on_what_the_one_before_left():
    """First top-k, then top-p of the renormalised rest, then min-p: the order that servers share."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 40)) * 2
    top_k, top_p, min_p = rng.integers(0, 20, 300), rng.uniform(0.2, 1, 300), rng.uniform(0, 0.3, 300)
    kept = truncate(
        torch.from_numpy(scores).float(),
        top_k=torch.from_numpy(top_k),
        top_p=torch.from_numpy(top_p).float(),
        min_p=torch.from_numpy(min_p).float(),
    ).numpy()
    num_compared = 0
    for i in range(300):
        margin = laws.Margin()
        expected = laws.keep(
            scores[i], top_k=int(top_k[i]), top_p=float(top_p[i]), min_p=float(min_p[i]), margin=margin
        )
        if margin.value > 1e-5:
            assert np.array_equal(kept[i], expected)
            num_compared += 1
    assert num_compared > 290


def test_a_token_too_improbable_for_float32_is_kept_while_nothing_cuts_it():
    scores = torch.tensor([[0.0, -150.0, -torch.inf]])
    assert truncate(scores).tolist() == [[True, True, False]]
    assert truncate(scores, top_p=torch.tensor([1.0])).tolist() == [[True, True, False]]
    assert truncate(scores, top_p=torch.tensor([0.9999999])).tolist() == [[True, False, False]]


# Compiled


@njit
def _keep_compiled(
    e: np.ndarray, top_k: int, top_p: np.float32, min_p: np.float32, room: Room
) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens, as they stay and as scores."""
    kept, x = e.copy(), np.zeros_like(e)
    kernel.drop(kept, x, kernel.truncate(e, len(e), top_k, top_p, min_p, room))
    return kept, x


def keep_compiled(e: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    blank = np.empty(0, np.float32)
    histogram = np.empty(kernel.NUM_BINS * kernel.NUM_LANES, np.int64)
    room = Room(*[blank] * 6, np.empty(0, np.int64), histogram, np.empty(len(e), np.int32))
    kept, x = _keep_compiled(e, top_k, np.float32(top_p), np.float32(min_p), room)
    assert np.array_equal(kept, np.where(x == 0, e, 0))
    return x == 0


def keep_sorted(e: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """All three cuts on the row in order, with the units of the compiled code."""
    order = most_probable_first(e)
    mass = np.rint(e.astype(np.float64) * 2.0**44).astype(np.int64)[order]
    num = min(top_k or len(e), len(e))
    if top_p < 1:
        total = int(mass[:num].sum())
        wanted = min(max(int(float(total) * float(np.float32(top_p))), 1), total)
        num = int(np.searchsorted(np.cumsum(mass), wanted)) + 1
    kept = np.zeros(len(e), dtype=bool)
    kept[order[:num]] = True
    return kept & (e >= np.float32(min_p))


def relative(p: torch.Tensor) -> np.ndarray:
    """Masses below the largest, which is 1, as the compiled code has them."""
    return (p / p.max()).numpy()


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 1000, 150_000])
def test_compiled_cuts_keep_what_the_sort_keeps(vocab_size):
    few = vocab_size <= 1000
    for name, p in rows_of(vocab_size).items():
        e = relative(p)
        for top_p in TOP_PS if few else [0.3, 0.95, 1 - 2**-24]:
            assert np.array_equal(keep_compiled(e, top_p=top_p), keep_sorted(e, top_p=top_p)), (name, top_p)
        for top_k in [1, 2, 50, vocab_size - 1, vocab_size, 2**31 - 1] if few else [50, vocab_size // 3]:
            assert np.array_equal(keep_compiled(e, top_k), keep_sorted(e, top_k)), (name, top_k)
        for min_p in (1e-30, 0.05, 1.0):
            assert np.array_equal(keep_compiled(e, min_p=min_p), keep_sorted(e, min_p=min_p)), (name, min_p)
        for knobs in ((7, 0.8, 0.0), (vocab_size // 2, 0.99, 0.2), (3, 0.3, 0.01)):
            assert np.array_equal(keep_compiled(e, *knobs), keep_sorted(e, *knobs)), (name, knobs)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32)), min_size=1, max_size=12
    ),
    st.integers(0, 13),
    st.floats(0, 1, exclude_min=True, width=32),
    st.sampled_from([0.0, 0.0, 0.25, 1.0]),
)
def test_compiled_cuts_of_any_row_keep_what_the_sort_keeps(masses, top_k, top_p, min_p):
    """With masses on the very boundary, as those of a quarter make them."""
    e = np.array([*masses, 1.0], dtype=np.float32)
    assert np.array_equal(keep_compiled(e, top_k, top_p, min_p), keep_sorted(e, top_k, top_p, min_p))


def test_compiled_ties_just_below_a_power_of_two_are_cut_as_elsewhere():
    below = np.nextafter(np.float32(0.25), np.float32(0))
    e = np.array([below, 1, below, below, 0.25], dtype=np.float32)
    for top_k in range(1, 6):
        assert np.array_equal(keep_compiled(e, top_k), keep_sorted(e, top_k))
    for top_p in np.linspace(0.01, 0.99, 99):
        assert np.array_equal(keep_compiled(e, top_p=top_p), keep_sorted(e, top_p=top_p))
