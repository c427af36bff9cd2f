"""Counter-based noise: every draw is a function of (seed, position, purpose, lane) and of nothing else.

So a request's draws never depend on its neighbours in the batch, on preemption or on a resume, and no
generator state has to travel with a sequence. The mixing function is SplitMix64's finaliser (Steele, Lea
and Flood, OOPSLA 2014), which passes BigCrush.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    TOKEN = 1
    CANDIDATES = 2


def _signed(value: int) -> int:
    """The int64 with the same bits as a 64-bit unsigned constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Logical shift: torch's own `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """A bijection of 64-bit integers in which every input bit flips about half of the output bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform_noise(
    seed: Int64[Tensor, " batch"], position: Int64[Tensor, " batch"], purpose: Purpose, num_lanes: int = 1
) -> Float64[Tensor, "batch lanes"]:
    """Independent uniforms in [0, 1) with 53 random bits, `num_lanes` a row.

    `position` is the index in the sequence of the token to be drawn.
    """
    key = _mix(seed + _GOLDEN)
    key = _mix((key ^ position) + _GOLDEN)
    key = _mix((key ^ int(purpose)) + _GOLDEN)
    lanes = torch.arange(1, num_lanes + 1, device=seed.device)
    bits = _mix(key[:, None] + lanes * _GOLDEN)
    return _shift_right(bits, 11).double() * 2.0**-53
