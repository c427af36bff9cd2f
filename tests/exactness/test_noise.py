"""Noise is a pure function of (seed, position, purpose, lane), uniform and independent in each of them."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from ram_core.resampling.noise import Purpose, uniform_noise
from tests.exactness import laws

SEEDS = [0, 1, 2, 12345, 2**31, 2**53 + 1, 2**63 - 1, -1, -2, -(2**40), -(2**63)]
POSITIONS = [0, 1, 7, 4096, 2**31 - 1, 2**32, 2**40]
NUM_DRAWS = 1 << 17


def draws(seeds: torch.Tensor, positions: torch.Tensor, purpose: Purpose = Purpose.TOKEN) -> np.ndarray:
    return uniform_noise(seeds, positions, purpose)[:, 0].numpy()


@cache
def along(axis: str) -> np.ndarray:
    """A long run of draws in which only one part of the key counts up."""
    count, still = torch.arange(NUM_DRAWS), torch.full((NUM_DRAWS,), 3)
    if axis == "seed":
        return draws(count - NUM_DRAWS // 2, still)
    if axis == "position":
        return draws(still, count)
    if axis == "high bits of the seed":
        return draws(count << 40, still)
    assert axis == "lane"
    return uniform_noise(still[:1], still[:1], Purpose.CANDIDATES, NUM_DRAWS)[0].numpy()


AXES = ["seed", "position", "high bits of the seed", "lane"]


@pytest.mark.parametrize("purpose", list(Purpose))
def test_noise_equals_the_big_integer_reference_bit_for_bit(purpose):
    keys = [(seed, position) for seed in SEEDS for position in POSITIONS]
    seeds, positions = torch.tensor(keys).T
    expected = [[laws.noise(*key, purpose, lane) for lane in range(5)] for key in keys]
    assert uniform_noise(seeds, positions, purpose, 5).tolist() == expected


def test_purposes_are_numbered_as_the_reference_has_them():
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "TOKEN": laws.TOKEN,
        "CANDIDATES": laws.CANDIDATES,
    }


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_uniform_in_its_high_and_in_its_low_bits(axis):
    seen = along(axis)
    assert seen.min() >= 0
    assert seen.max() < 1
    laws.assert_follows((seen * 256).astype(np.int64), np.full(256, 1 / 256))
    laws.assert_follows((seen * 2**53).astype(np.int64) % 256, np.full(256, 1 / 256))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_along_a_key_are_independent(axis, lag):
    """All pairs of a lag fall evenly on a 16 × 16 board; a correlation is bounded by 5 standard errors."""
    seen = along(axis)
    one, other = seen[:-lag], seen[lag:]
    board = (one * 16).astype(np.int64) * 16 + (other * 16).astype(np.int64)
    laws.assert_follows(board, np.full(256, 1 / 256))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))


def test_a_token_and_its_candidates_are_independent():
    count, still = torch.arange(NUM_DRAWS), torch.full((NUM_DRAWS,), 5)
    token, candidate = (draws(count, still, purpose) for purpose in Purpose)
    board = (token * 16).astype(np.int64) * 16 + (candidate * 16).astype(np.int64)
    laws.assert_follows(board, np.full(256, 1 / 256))


def test_a_million_keys_make_a_million_values():
    """Chance alone would make two of a million 53-bit values meet once in 18 000 runs."""
    seeds, positions = torch.cartesian_prod(torch.arange(-256, 256), torch.arange(256)).T
    seen = [uniform_noise(seeds, positions, purpose, 4).flatten() for purpose in Purpose]
    assert len(torch.cat(seen).unique()) == 2**20


def test_every_bit_of_the_key_flips_half_of_the_value():
    """Mean flips of the 53 bits over 1000 keys lie within 6 standard errors of 26.5, whichever bit it is."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(-(2**62), 2**62, (2, 1000), generator=generator)
    bound = 6 * math.sqrt(53 / 4 / 1000)
    for part in (0, 1):
        for bit in range(63):
            flipped = base.clone()
            flipped[part] ^= 1 << bit
            changed = (draws(*base) * 2**53).astype(np.uint64) ^ (draws(*flipped) * 2**53).astype(np.uint64)
            assert abs(np.bitwise_count(changed).mean() - 26.5) < bound


def test_a_rows_noise_does_not_depend_on_its_neighbours_or_on_the_number_of_lanes():
    generator = torch.Generator().manual_seed(1)
    seeds, positions = torch.randint(-(2**60), 2**60, (2, 500), generator=generator)
    together = uniform_noise(seeds, positions, Purpose.CANDIDATES, 8)
    order = torch.randperm(500, generator=generator)
    assert torch.equal(uniform_noise(seeds[order], positions[order], Purpose.CANDIDATES, 8), together[order])
    assert torch.equal(uniform_noise(seeds[3:4], positions[3:4], Purpose.CANDIDATES, 3), together[3:4, :3])
