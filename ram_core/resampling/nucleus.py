"""The most probable tokens of each row, chosen exactly and without a sort.

Sorting a 32k vocabulary costs more than all the rest of a step. Here the last token to keep is found by its
digits: a histogram of the masses over ten bits of the probability's bit pattern tells in which bin the
wanted mass is reached, and three such passes name the exact value. Masses are 64-bit integers, so sums do
not depend on their order and the result equals the sort's (`tests/exactness/test_nucleus.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

# Units of mass in 1.0. A float32 has 24 significant bits, so probabilities down to 2**-28 are exact, and a
# sum over any vocabulary stays far below 2**63.
UNITS = 2.0**52
_DIGIT_BITS = 10
_NUM_BINS = 1 << _DIGIT_BITS


def _keep_until(
    key: Int32[Tensor, "batch vocab"],
    units: Int64[Tensor, "batch vocab"],
    target: Int64[Tensor, " batch"],
) -> Bool[Tensor, "batch vocab"]:
    """The fewest tokens of largest `key` (lower ids first among equals) whose `units` sum to `target`.

    Keys are below 2**30. Targets lie in [1, sum of the row's units].
    """
    prefix = torch.zeros_like(target, dtype=torch.int32)[:, None]
    rest = target[:, None]
    for shift in (2 * _DIGIT_BITS, _DIGIT_BITS, 0):
        digit = ((key >> shift) & (_NUM_BINS - 1)).long()
        is_open = (key >> (shift + _DIGIT_BITS)) == prefix
        bins = units.new_zeros(len(units), _NUM_BINS + 1).scatter_add_(1, digit, units * is_open)
        from_bin_up = bins.flip(-1).cumsum(-1).flip(-1)
        last_bin = (from_bin_up >= rest).sum(-1, keepdim=True) - 1
        rest = rest - from_bin_up.gather(-1, last_bin + 1)
        prefix = (prefix << _DIGIT_BITS) | last_bin.int()
    is_last = key == prefix
    units_of_last = units * is_last
    already = units_of_last.cumsum(-1) - units_of_last
    return (key > prefix) | (is_last & (already < rest))


def keep_top_p(
    p: Float[Tensor, "batch vocab"], top_p: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """The smallest set of most probable tokens whose mass reaches `top_p` of the row's.

    `p` is float32 and non-negative with a sum of about 1 a row. Always holds the most probable token;
    `top_p` of 1 keeps everything. Among equally probable tokens lower ids come first.
    """
    units = (p.double() * UNITS).long()
    total = units.sum(-1)
    target = (total.double() * top_p.double()).long().clamp(min=1).minimum(total)
    keep = _keep_until(p.contiguous().view(torch.int32), units, target)
    return keep | (top_p >= 1)[:, None]


def keep_top_k(
    p: Float[Tensor, "batch vocab"], top_k: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """The `top_k` most probable tokens of each row; 0 keeps everything. Ties as in `keep_top_p`."""
    units = torch.ones_like(p, dtype=torch.int64)
    target = torch.where(top_k > 0, top_k, p.shape[-1]).clamp(max=p.shape[-1])
    return _keep_until(p.contiguous().view(torch.int32), units, target)


def keep_min_p(
    p: Float[Tensor, "batch vocab"], min_p: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch vocab"]:
    """Tokens at least `min_p` times as probable as the most probable one; 0 keeps everything."""
    return p >= min_p[:, None] * p.amax(-1, keepdim=True)


def truncate(
    log_p: Float[Tensor, "batch vocab"],
    *,
    top_k: Int64[Tensor, " batch"] | None = None,
    top_p: Float[Tensor, " batch"] | None = None,
    min_p: Float[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch vocab"]:
    """What is left of each row after `top_k`, then `top_p` of what that left, then `min_p`.

    `log_p` need not be normalised: each cut acts on the renormalised result of the one before, as every
    OpenAI-compatible server has it. A knob of None is off for all rows and costs nothing.
    """
    p = log_p.softmax(-1)
    # Not `p > 0`: what float32 cannot hold may still matter once an aligner has weighed it.
    keep = log_p > -torch.inf
    if top_k is not None:
        keep = keep & keep_top_k(p, top_k)
        p = log_p.masked_fill(~keep, -torch.inf).softmax(-1)
    if top_p is not None:
        keep = keep & keep_top_p(p, top_p)
    if min_p is not None:
        keep = keep & keep_min_p(p, min_p)
    return keep
