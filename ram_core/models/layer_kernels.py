"""What a decoder computes between matrix products, each in one pass of compiled code. For float32 on CPU.

A step of few rows spends its time here not on arithmetic: each operation of PyTorch's is begun anew and reads
and writes memory, part of which lies in another core's cache. Work is cut as matrix products cut it, by
columns, so that each thread goes on with the numbers that it has just written.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ram_core.resampling import kernel
from ram_core.resampling.compiled import F32, entry, inner, made_of
from ram_core.resampling.kernel import exp
from ram_core.resampling.threads import in_parallel

# Numbers that are worth another thread.
_NUMBERS_A_THREAD = 1 << 13
_plain, _sums = inner("contract"), inner("contract", "reassoc")


def rms_norm(
    x: Float[Tensor, "*row dim"], weight: Float[Tensor, "*row dim"], eps: float, shift: float
) -> Float[Tensor, "*row dim"]:
    """Each row over the root of its mean square, times `weight + shift`, which broadcasts against `x`.

    Of a weight's axes, all between the first and the last are 1, as of weights that differ between tokens.
    """
    rows = _rows(x)
    own = weight.reshape(-1, weight.shape[-1])
    out = torch.empty_like(rows)
    rows_a_weight = prod(x.shape[x.ndim - weight.ndim + 1 : -1]) if weight.ndim > 1 else 1
    asked = np.float32(eps), np.float32(shift)
    _norm_rows(rows.numpy(), own.numpy(), rows_a_weight, *asked, out.numpy(), _threads_for(rows))
    return out.view(x.shape)


def silu_product(
    gate: Float[Tensor, "*row dim"], other: Float[Tensor, "*row dim"]
) -> Float[Tensor, "*row dim"]:
    """`silu(gate) * other`."""
    rows, others = _rows(gate), _rows(other)
    out = torch.empty_like(rows)
    _silu_columns(rows.numpy(), others.numpy(), out.numpy(), _threads_for(rows))
    return out.view(gate.shape)


def rotate(
    x: Float[Tensor, "head token dim"], cos: Float[Tensor, "token dim"], sin: Float[Tensor, "token dim"]
) -> Float[Tensor, "head token dim"]:
    """Rotary embedding: the first half of each head's numbers is turned against the second."""
    tokens = x.transpose(0, 1).contiguous()
    out = torch.empty_like(tokens)
    _rotate_heads(tokens.numpy(), cos.numpy(), sin.numpy(), out.numpy(), _threads_for(tokens))
    return out.transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _threads_for(x: Tensor) -> int:
    return max(min(x.numel() // _NUMBERS_A_THREAD, torch.get_num_threads()), 1)


@_sums
def _sum_of_squares(x: F32) -> np.float32:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@_plain
def _scale(x: F32, by: np.float32, weight: F32, shift: np.float32, out: F32) -> None:
    for i in range(len(x)):
        out[i] = x[i] * by * (weight[i] + shift)


@_plain
def _norm_part(
    x: F32,
    weight: F32,
    rows_a_weight: int,
    eps: np.float32,
    shift: np.float32,
    out: F32,
    first: int,
    count: int,
) -> None:
    # Neighbours in memory, as PyTorch cuts what comes before: sums of rows.
    for row in range(len(x) * first // count, len(x) * (first + 1) // count):
        mean = _sum_of_squares(x[row]) / np.float32(x.shape[1])
        by = np.float32(1) / np.sqrt(mean + eps)
        _scale(x[row], by, weight[row // rows_a_weight % len(weight)], shift, out[row])


@_plain
def _silu_row(gate: F32, other: F32, out: F32) -> None:
    for i in range(len(gate)):
        x = gate[i]
        e = exp(-abs(x))
        share = (np.float32(1) if x >= 0 else e) / (np.float32(1) + e)
        out[i] = x * share * other[i]


@_plain
def _silu_part(gate: F32, other: F32, out: F32, first: int, count: int) -> None:
    begin, end = gate.shape[1] * first // count, gate.shape[1] * (first + 1) // count
    for row in range(len(gate)):
        _silu_row(gate[row, begin:end], other[row, begin:end], out[row, begin:end])


@_plain
def _rotate_one(x: F32, cos: F32, sin: F32, out: F32) -> None:
    half = len(x) // 2
    for i in range(half):
        out[i] = x[i] * cos[i] - x[half + i] * sin[i]
        out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


@_plain
def _rotate_part(x: F32, cos: F32, sin: F32, out: F32, first: int, count: int) -> None:
    begin, end = x.shape[1] * first // count, x.shape[1] * (first + 1) // count
    for token in range(len(x)):
        for head in range(begin, end):
            _rotate_one(x[token, head], cos[token], sin[token], out[token, head])


def _compile(key: int) -> tuple[Any, Any, Any]:
    """`key` is what numba's cache tells versions of this code by, besides this file."""

    @entry
    def norm_rows(
        x: F32,
        weight: F32,
        rows_a_weight: int,
        eps: np.float32,
        shift: np.float32,
        out: F32,
        num_threads: int,
    ) -> None:
        assert key >= 0
        in_parallel(_norm_part, (x, weight, rows_a_weight, eps, shift, out), num_threads)

    @entry
    def silu_columns(gate: F32, other: F32, out: F32, num_threads: int) -> None:
        assert key >= 0
        in_parallel(_silu_part, (gate, other, out), num_threads)

    @entry
    def rotate_heads(x: F32, cos: F32, sin: F32, out: F32, num_threads: int) -> None:
        assert key >= 0
        in_parallel(_rotate_part, (x, cos, sin, out), num_threads)

    return norm_rows, silu_columns, rotate_heads


_norm_rows, _silu_columns, _rotate_heads = _compile(made_of(kernel))
