"""Attention of the rows that are being written, in compiled code that reads keys and values where they lie.

PyTorch's scaled dot product wants a row's keys one after the other, so pages would be copied for it first,
padding included, in every layer of every step. Here a row is computed page by page: what is read is what the
row has, once for all query heads that share it, by one thread from the first token to the last, so that a
row's bits depend on nothing but itself. For float32 on CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch
from ram_core.resampling import kernel
from ram_core.resampling.compiled import F32, I64, entry, inner, made_of, prefetch
from ram_core.resampling.kernel import exp, find_top
from ram_core.resampling.threads import in_parallel

# Numbers that a thread has to read before another one is worth waking.
_NUMBERS_A_THREAD = 1 << 15
# Numbers in a line of the cache.
_LINE = 16
_plain, _sums = inner("contract"), inner("contract", "reassoc")

Count = tuple[None, ...]
"""A number that the compiler knows, as the length of a tuple is part of its type: loops over a head's numbers
come out unrolled, which makes them twice as fast."""


class Layer(NamedTuple):
    """One layer's tensors: queries, new keys and values, the pool's memory, and where the output goes."""

    query: F32
    key: F32
    value: F32
    keys: F32
    values: F32
    out: F32


class Rows(NamedTuple):
    """Where each row's tokens lie."""

    pages: I64
    contexts: I64
    slots: I64


class Shape(NamedTuple):
    """What a layer's code is made for: numbers in a key and in a value, query heads that share them."""

    key: Count
    value: Count
    group: Count


def can_attend(query: Tensor) -> bool:
    """Whether this is the code for it: for tensors that hold numbers, and nothing else besides."""
    return type(query) is Tensor and query.dtype is torch.float32 and query.device.type == "cpu"


def attend_decode(
    batch: PackedBatch,
    pool: KvPool,
    layer: int,
    query: Float[Tensor, "head row dim"],
    key: Float[Tensor, "kv_head row dim"],
    value: Float[Tensor, "kv_head row dim"],
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "row head dim"]:
    """Remember what is new of the batch's first rows, one token each, and attend to their contexts."""
    num_heads, num_rows, dim = query.shape
    out = torch.empty(num_rows, num_heads, value.shape[-1], dtype=torch.float32)
    new = [each.transpose(0, 1).contiguous().numpy() for each in (query, key, value)]
    memory = pool.keys[layer].numpy(), pool.values[layer].numpy()
    tensors = Layer(*new, *memory, out.numpy())  # type: ignore[call-arg]  # mypy does not count them
    rows = Rows(batch.page_table.numpy(), batch.context_lens.numpy(), batch.slots.numpy())
    scale = np.float32(dim**-0.5 if scaling is None else scaling)
    shape = Shape((None,) * dim, (None,) * value.shape[-1], (None,) * (num_heads // len(key)))
    longest = batch.page_table.shape[1] * batch.page_size
    worthwhile = num_rows * longest * len(key) * dim // _NUMBERS_A_THREAD
    num_parts = min(max(worthwhile, 1), torch.get_num_threads(), num_rows * len(key))
    # A row's heads lie side by side and are best read together, if that leaves work for every thread.
    heads_at_once = len(key) if num_rows >= num_parts else 1

    attend_rows(tensors, rows, shape, scale, window or longest, heads_at_once, num_parts)
    return out


@_sums
def _dot(a: F32, b: F32, count: Count) -> np.float32:
    total = np.float32(0)
    for i in range(len(count)):
        total += a[i] * b[i]
    return total


@_plain
def _remember(new: F32, memory: F32) -> None:
    """As `KvPool.write` does: memory stays finite."""
    for i in range(len(new)):
        memory[i] = new[i] if np.isfinite(new[i]) else np.float32(0)


@_sums
def _softmax(scores: F32) -> None:
    top, _ = find_top(scores)
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - top)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total


@_plain
def _score(
    layer: Layer,
    rows: Rows,
    shape: Shape,
    scores: F32,
    scale: np.float32,
    first: int,
    row: int,
    heads: tuple[int, int],
) -> None:
    """The scaled products of a row's queries with its keys from token `first` on."""
    page_size, group, context = layer.keys.shape[1], len(shape.group), rows.contexts[row]
    for start in range(first // page_size * page_size, context, page_size):
        page = rows.pages[row, start // page_size]
        following = rows.pages[row, min(start // page_size + 1, (context - 1) // page_size)]
        for i in range(max(first, start), min(start + page_size, context)):
            for head in range(heads[0], heads[1]):
                # What is read next: this token's value when all scores are known, and the next page's key.
                for at in range(0, len(shape.key), _LINE):
                    prefetch(layer.keys[following, i - start, head], at)
                for at in range(0, len(shape.value), _LINE):
                    prefetch(layer.values[page, i - start, head], at)
                key = layer.keys[page, i - start, head]
                for at in range(head * group, (head + 1) * group):
                    scores[at, i - first] = _dot(layer.query[row, at], key, shape.key) * scale


@_plain
def _add_one(out: F32, share: np.float32, value: F32, count: Count) -> None:
    for d in range(len(count)):
        out[d] += share * value[d]


@_plain
def _add_four(out: F32, shares: F32, a: F32, b: F32, c: F32, d: F32, count: Count) -> None:
    """Of four tokens at once, as the sums are read and written each time."""
    s, t, u, v = shares[0], shares[1], shares[2], shares[3]
    for i in range(len(count)):
        out[i] += s * a[i] + t * b[i] + u * c[i] + v * d[i]


@_plain
def _add_up(
    layer: Layer, rows: Rows, shape: Shape, shares: F32, first: int, row: int, heads: tuple[int, int]
) -> None:
    """The sums of a row's values from token `first` on, each times its share."""
    page_size, group, context = layer.values.shape[1], len(shape.group), rows.contexts[row]
    values = layer.values
    for start in range(first // page_size * page_size, context, page_size):
        page = rows.pages[row, start // page_size]
        i, end = max(first - start, 0), min(page_size, context - start)
        while i + 4 <= end:
            begin = start + i - first
            for head in range(heads[0], heads[1]):
                w, x = values[page, i, head], values[page, i + 1, head]
                y, z = values[page, i + 2, head], values[page, i + 3, head]
                for at in range(head * group, (head + 1) * group):
                    _add_four(layer.out[row, at], shares[at, begin : begin + 4], w, x, y, z, shape.value)
            i += 4
        while i < end:
            for head in range(heads[0], heads[1]):
                for at in range(head * group, (head + 1) * group):
                    share = shares[at, start + i - first]
                    _add_one(layer.out[row, at], share, values[page, i, head], shape.value)
            i += 1


@_plain
def _attend(
    layer: Layer,
    rows: Rows,
    shape: Shape,
    scores: F32,
    scale: np.float32,
    window: int,
    row: int,
    heads: tuple[int, int],
) -> None:
    """One row's query heads that share the key-value heads from `heads[0]` to before `heads[1]`."""
    group, context = len(shape.group), rows.contexts[row]
    first = max(context - window, 0)
    _score(layer, rows, shape, scores, scale, first, row, heads)
    for at in range(heads[0] * group, heads[1] * group):
        _softmax(scores[at, : context - first])
        layer.out[row, at] = 0
    _add_up(layer, rows, shape, scores, first, row, heads)


@_plain
def _attend_part(
    layer: Layer,
    rows: Rows,
    shape: Shape,
    scale: np.float32,
    window: int,
    heads_at_once: int,
    first: int,
    stride: int,
) -> None:
    """Every `stride`th part from the `first` on, of all rows' runs of `heads_at_once` heads."""
    num_heads, page_size = layer.keys.shape[2], layer.keys.shape[1]
    scores = np.empty((layer.query.shape[1], rows.pages.shape[1] * page_size), np.float32)
    num_runs = num_heads // heads_at_once
    for part in range(first, len(layer.query) * num_runs, stride):
        row, begin = part // num_runs, part % num_runs * heads_at_once
        heads = begin, begin + heads_at_once
        page, offset = rows.slots[row] // page_size, rows.slots[row] % page_size
        for head in range(heads[0], heads[1]):
            _remember(layer.key[row, head], layer.keys[page, offset, head])
            _remember(layer.value[row, head], layer.values[page, offset, head])
        _attend(layer, rows, shape, scores, scale, window, row, heads)


def _compile(key: int) -> Any:
    """`key` is what numba's cache tells versions of this code by, besides this file."""

    @entry
    def attend_rows(
        layer: Layer,
        rows: Rows,
        shape: Shape,
        scale: np.float32,
        window: int,
        heads_at_once: int,
        num_threads: int,
    ) -> None:
        """All rows, each run of `heads_at_once` heads by one thread."""
        assert key >= 0
        in_parallel(_attend_part, (layer, rows, shape, scale, window, heads_at_once), num_threads)

    return attend_rows


attend_rows = _compile(made_of(kernel))
