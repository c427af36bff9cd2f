"""The most probable tokens of each row, chosen exactly and without a sort.

Sorting a 32k vocabulary costs more than all the rest of a step. Here the last token to keep is found by its
digits: a histogram of the masses over ten bits of the probability's bit pattern tells in which bin the
wanted mass is reached, and three such passes name the exact value. Masses are 64-bit integers, so sums do
not depend on their order and the result equals the sort's (`tests/exactness/test_nucleus.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# Units of mass in 1.0. A float32 has 24 significant bits, so probabilities down to 2**-28 are exact, and a
# sum over any vocabulary stays far below 2**63.
UNITS = 2.0**52
_DIGIT_BITS = 10
_MINUS_INF_BITS = -0x800000
_NUM_BINS = 1 << _DIGIT_BITS


def as_units(p: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Probabilities as integers, `UNITS` to 1.0, so that sums do not depend on the order of adding."""
    # Scaling by a power of two is exact in float32, so nothing is lost before the integers.
    return (p * UNITS).long()


def log_mask(keep: Bool[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """`log 1_keep`: 0 where kept, -inf elsewhere, to be added to scores.

    Made of bits, as `masked_fill` and `log` take ten times as long where a mask has no pattern to predict.
    """
    return ((keep.int() - 1) & _MINUS_INF_BITS).view(torch.float32)


def masked(values: Float[Tensor, "batch vocab"], keep: Bool[Tensor, "batch vocab"]) -> Tensor:
    """`values` where kept, 0 elsewhere; made of bits like `log_mask`."""
    return (values.contiguous().view(torch.int32) & -keep.int()).view(torch.float32)


def _keep_until(
    p: Float[Tensor, "batch vocab"],
    units: Int64[Tensor, "batch vocab"],
    target: Int64[Tensor, " batch"],
    units_of: Callable[[Float[Tensor, "batch 1"]], Int64[Tensor, "batch 1"]],
) -> Bool[Tensor, "batch vocab"]:
    """The fewest most probable tokens (lower ids first among equals) whose `units` sum to `target`.

    Probabilities are at most 1; equally probable tokens have equal units, those that `units_of` tells.
    Targets lie in [1, sum of the row's units]. A row of NaN gets any answer, and harms no other.
    """
    # Floats that are not negative are in the order of their bits; those up to 1 are below 2**30.
    key = p.contiguous().view(torch.int32)
    target = target[:, None]
    # The last token to keep has a key in [low, low + _NUM_BINS << shift).
    low = torch.zeros_like(target, dtype=torch.int32)
    above = target
    for shift in (2 * _DIGIT_BITS, _DIGIT_BITS, 0):
        # Bin 0 takes all that is below the range, the last but one all above; the very last stays empty.
        bins = ((key - low) >> shift).clamp_(-1, _NUM_BINS).add_(1)
        sums = units.new_zeros(len(units), _NUM_BINS + 3).scatter_add_(1, bins.long(), units)
        from_bin_up = sums.flip(-1).cumsum(-1).flip(-1)
        last_bin = (from_bin_up[:, :-1] >= target).sum(-1, keepdim=True) - 1
        above = from_bin_up.gather(-1, last_bin + 1)
        low = low + ((last_bin - 1) << shift).int()
    last = low.view(torch.float32)
    each = units_of(last).clamp(min=1)
    num_last = (target - above + each - 1) // each
    is_last = p == last
    return (p > last) | (is_last & (is_last.cumsum(-1, dtype=torch.int32) <= num_last))


def keep_top_p(
    p: Float[Tensor, "batch vocab"], top_p: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """The smallest set of most probable tokens whose mass reaches `top_p` of the row's.

    `p` is float32 and non-negative with a sum of about 1 a row. Always holds the most probable token;
    `top_p` of 1 keeps everything. Among equally probable tokens lower ids come first.
    """
    units = as_units(p)
    total = units.sum(-1)
    target = (total.double() * top_p.double()).long().clamp(min=1).minimum(total)
    keep = _keep_until(p, units, target, as_units)
    return keep | (top_p >= 1)[:, None]


def keep_top_k(
    p: Float[Tensor, "batch vocab"], top_k: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """The `top_k` most probable tokens of each row; 0 keeps everything. Ties as in `keep_top_p`."""
    units = torch.ones_like(p, dtype=torch.int64)
    target = torch.where(top_k > 0, top_k, p.shape[-1]).clamp(max=p.shape[-1])
    return _keep_until(p, units, target, lambda p: torch.ones_like(p, dtype=torch.int64))


def keep_min_p(
    p: Float[Tensor, "batch vocab"], min_p: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """Tokens at least `min_p` times as probable as the most probable one; 0 keeps everything."""
    return p >= min_p[:, None] * p.amax(-1, keepdim=True)


def truncate(
    log_p: Float[Tensor, "batch vocab"],
    *,
    p: Float[Tensor, "batch vocab"] | None = None,
    top_k: Int64[Tensor, " batch"] | None = None,
    top_p: Float[Tensor, " batch"] | None = None,
    min_p: Float[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch vocab"]:
    """What is left of each row after `top_k`, then `top_p` of what that left, then `min_p`.

    `log_p` need not be normalised: each cut acts on the renormalised result of the one before, as every
    OpenAI-compatible server has it. A knob of None is off for all rows and costs nothing. `p` is the softmax
    of `log_p`, from a caller who has it.
    """
    p = log_p.softmax(-1) if p is None else p
    # Not `p > 0`: what float32 cannot hold may still matter once an aligner has weighed it.
    keep = log_p > -torch.inf
    if top_k is not None:
        keep = keep & keep_top_k(p, top_k)
        p = (log_p + log_mask(keep)).softmax(-1)
    if top_p is not None:
        keep = keep & keep_top_p(p, top_p)
    if min_p is not None:
        keep = keep & keep_min_p(p, min_p)
    return keep
