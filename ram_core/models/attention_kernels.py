"""Attention over pages as Triton kernels: write keys and values, attend to them, join what splits found.

A program of `attend_tile` serves one tile (tokens of one row, times the query heads of one key head, so that
keys and values are read once for all of them) over one split of the row's context. What varies from step to
step, the context's length above all, is read from tensors, so that a captured launch can be replayed on other
numbers. Scores are in base 2, because that is the exponential that the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

# Whose value, or alignment, is another from batch to batch: none of it is worth compiling anew.
_VARYING = [
    "page_table",
    "context_lens",
    "window",
    "first_row",
    "first_token",
    "row_len",
    "table_stride",
    "page_size",
    "page_bits",
    "num_tokens",
]


@triton.jit(do_not_specialize=["slots"])
def write_kv(
    key,
    value,
    keys,
    values,
    slots,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    num_kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_key: tl.constexpr,
    block_value: tl.constexpr,
):
    """Put one token's key and value, of all heads, into its slot; zeros for what is not finite."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    lane = tl.arange(0, block_key)
    is_lane = lane < num_kv_heads * key_dim
    source = key + token * key_token_stride + lane // key_dim * key_head_stride + lane % key_dim
    new = tl.load(source, mask=is_lane)
    new = tl.where(tl.abs(new.to(tl.float32)) < float("inf"), new, 0.0)
    tl.store(keys + slot * (num_kv_heads * key_dim) + lane, new, mask=is_lane)
    lane = tl.arange(0, block_value)
    is_lane = lane < num_kv_heads * value_dim
    source = value + token * value_token_stride + lane // value_dim * value_head_stride + lane % value_dim
    new = tl.load(source, mask=is_lane)
    new = tl.where(tl.abs(new.to(tl.float32)) < float("inf"), new, 0.0)
    tl.store(values + slot * (num_kv_heads * value_dim) + lane, new, mask=is_lane)


@triton.jit
def _find_tile(
    tiles,
    first_row,
    first_token,
    row_len,
    tile_tokens: tl.constexpr,
    has_tiles: tl.constexpr,
):
    """This program's row, the tile's first token in it, the row's tokens, and where these are packed."""
    nth = tl.program_id(0)
    if has_tiles:
        row, first = tl.load(tiles + nth * 4), tl.load(tiles + nth * 4 + 1)
        num_queries, row_token = tl.load(tiles + nth * 4 + 2), tl.load(tiles + nth * 4 + 3)
    else:
        tiles_per_row = tl.cdiv(row_len, tile_tokens)
        row, first = first_row + nth // tiles_per_row, nth % tiles_per_row * tile_tokens
        num_queries, row_token = row_len, first_token + nth // tiles_per_row * row_len
    return row, first, num_queries, row_token


@triton.jit
def _find_blocks(begin, end, split, block_tokens: tl.constexpr):
    """The blocks of a context from `begin` to `end` that a split reads; the last splits may have none."""
    first = begin // block_tokens
    num_blocks = tl.cdiv(end, block_tokens) - first
    each = tl.cdiv(num_blocks, tl.num_programs(2))
    return first + split * each, first + tl.minimum((split + 1) * each, num_blocks)


@triton.jit
def _bend(scores, softcap):
    """softcap · tanh(scores / softcap); tanh(x) is 2 · sigmoid(2x) - 1."""
    return softcap * (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0)


@triton.jit(do_not_specialize=_VARYING)
def attend_tile(
    query,
    keys,
    values,
    page_table,
    context_lens,
    sinks,
    tiles,
    out,
    log_sums,
    scale,
    softcap,
    window,
    first_row,
    first_token,
    row_len,
    table_stride,
    page_size,
    page_bits,
    num_tokens,
    query_head_stride,
    query_token_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    is_split: tl.constexpr,
    has_tiles: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    has_page_bits: tl.constexpr,
    tile_tokens: tl.constexpr,
    block_query: tl.constexpr,
    block_tokens: tl.constexpr,
    block_key: tl.constexpr,
    block_value: tl.constexpr,
    precision: tl.constexpr,
    is_widened: tl.constexpr,
):
    """One tile's attention to one split of its row's context.

    Without `tiles`, all rows from `first_row` on have `row_len` tokens, packed from `first_token` on; else
    `tiles` holds (row, first token in the row, tokens of the row, where these are packed) for each tile.
    Unless it `is_split`, `out` is [token, head, dim]; else it is float32, [split, token, head, dim], and
    `log_sums` [split, token, head] gets the base-2 logarithm of each softmax's denominator. `is_widened`
    multiplies matrices in float32, which holds the products of 16-bit numbers without rounding.
    """
    kv_head, split = tl.program_id(1), tl.program_id(2)
    row, first, num_queries, row_token = _find_tile(
        tiles, first_row, first_token, row_len, tile_tokens, has_tiles
    )
    context = tl.load(context_lens + row).to(tl.int32)
    lane = tl.arange(0, block_query)
    nth = first + lane // group
    head = kv_head * group + lane % group
    is_query = (lane < tile_tokens * group) & (nth < num_queries)
    start = context - num_queries
    position = start + nth
    token = (row_token + nth).to(tl.int64)

    key_lane, value_lane = tl.arange(0, block_key), tl.arange(0, block_value)
    is_key_dim, is_value_dim = key_lane < key_dim, value_lane < value_dim
    queries = tl.load(
        query + (head * query_head_stride + token * query_token_stride)[:, None] + key_lane[None, :],
        mask=is_query[:, None] & is_key_dim[None, :],
        other=0.0,
    )
    if is_widened:
        queries = queries.to(tl.float32)

    begin, end = 0, start + tl.minimum(first + tile_tokens, num_queries)
    if has_window:
        begin = tl.maximum(start + first - window + 1, 0)
    from_block, to_block = _find_blocks(begin, end, split, block_tokens)
    top = tl.full([block_query], float("-inf"), tl.float32)
    total = tl.zeros([block_query], tl.float32)
    if has_sinks:
        # A sink is a score like a token's, without a value; the first split has it.
        has_sink = is_query & (split == 0)
        top = tl.load(sinks + head, mask=has_sink, other=float("-inf")).to(tl.float32) * _LOG2_E
        total = has_sink.to(tl.float32)
    summed = tl.zeros([block_query, block_value], tl.float32)
    table = page_table + row.to(tl.int64) * table_stride
    for block in range(from_block, to_block):
        at = block * block_tokens + tl.arange(0, block_tokens)
        is_token = (at >= begin) & (at < end)
        # A power of two is divided by in one instruction, if that is known.
        nth_page = at >> page_bits if has_page_bits else at // page_size
        page = tl.load(table + nth_page, mask=is_token, other=0)
        place = ((page - nth_page) * page_size + at) * num_kv_heads + kv_head
        tile_keys = tl.load(
            keys + place[None, :] * key_dim + key_lane[:, None],
            mask=is_token[None, :] & is_key_dim[:, None],
            other=0.0,
        )
        if is_widened:
            tile_keys = tile_keys.to(tl.float32)
        scores = tl.dot(queries, tile_keys, input_precision=precision) * scale
        if has_softcap:
            scores = _bend(scores, softcap)
        is_seen = is_token[None, :] & (at[None, :] <= position[:, None])
        if has_window:
            is_seen = is_seen & (at[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores * _LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Where nothing has been seen yet, -inf less -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        tile_values = tl.load(
            values + place[:, None] * value_dim + value_lane[None, :],
            mask=is_token[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        weights = weights.to(tile_values.dtype)
        if is_widened:
            weights, tile_values = weights.to(tl.float32), tile_values.to(tl.float32)
        found = tl.dot(weights, tile_values, input_precision=precision)
        summed = summed * shrink[:, None] + found
        top = new_top

    divisor = tl.where(total == 0.0, 1.0, total)
    summed = summed / divisor[:, None]
    place = (split.to(tl.int64) * num_tokens + token) * (num_kv_heads * group) + head
    is_stored = is_query[:, None] & is_value_dim[None, :]
    tl.store(
        out + place[:, None] * value_dim + value_lane[None, :],
        summed.to(out.dtype.element_ty),
        mask=is_stored,
    )
    if is_split:
        tl.store(log_sums + place, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor)), is_query)


@triton.jit(do_not_specialize=["first_token", "num_tokens"])
def join_splits(
    found,
    log_sums,
    out,
    first_token,
    num_tokens,
    num_heads: tl.constexpr,
    value_dim: tl.constexpr,
    num_splits: tl.constexpr,
    block_splits: tl.constexpr,
    block_value: tl.constexpr,
):
    """One token's and head's attention from that to its splits: their mean by their sums."""
    token = first_token + tl.program_id(0).to(tl.int64)
    split, lane = tl.arange(0, block_splits), tl.arange(0, block_value)
    place = (split * num_tokens.to(tl.int64) + token) * num_heads + tl.program_id(1)
    log_sum = tl.load(log_sums + place, mask=split < num_splits, other=float("-inf"))
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    each = tl.load(
        found + place[:, None] * value_dim + lane[None, :],
        mask=(split < num_splits)[:, None] & (lane < value_dim)[None, :],
        other=0.0,
    )
    joined = tl.sum(each * (weights / tl.sum(weights, 0))[:, None], 0)
    goal = out + (token * num_heads + tl.program_id(1)) * value_dim + lane
    tl.store(goal, joined.to(out.dtype.element_ty), mask=lane < value_dim)
