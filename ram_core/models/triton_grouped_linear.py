"""`grouped_linear` on CUDA: one kernel for any mix of slots, whose shapes do not depend on the mix.

A program has a slot, a tile of columns, and every n-th tile of the slot's rows. Programs of slots without
rows end at once, so a step reads the weights of those slots only that its rows take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ram_core.models.grouped_linear import RowGroups


@triton.jit
def _kernel(
    x,
    weight,
    bias,
    out,
    order,
    offsets,
    num_columns,
    depth,
    stride_x,
    stride_out,
    has_bias: tl.constexpr,
    is_added: tl.constexpr,
    num_splits: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    slot = tl.program_id(1)
    end = tl.load(offsets + slot + 1)
    columns = tl.program_id(0) * block_n + tl.arange(0, block_n)
    has_column = columns < num_columns
    # 64 bits: a stack of vocabularies has more than 2^31 numbers.
    own_weight = weight + slot.to(tl.int64) * num_columns * depth + columns[:, None].to(tl.int64) * depth
    first = tl.load(offsets + slot) + tl.program_id(2) * block_m
    for tile in range(first, end, block_m * num_splits):
        at = tile + tl.arange(0, block_m)
        has_row = at < end
        rows = tl.load(order + at, mask=has_row, other=0)
        total = tl.zeros((block_m, block_n), dtype=tl.float32)
        for k in range(0, depth, block_k):
            deep = k + tl.arange(0, block_k)
            is_deep = deep[None, :] < depth
            a = tl.load(x + rows[:, None] * stride_x + deep[None, :], has_row[:, None] & is_deep, other=0.0)
            b = tl.load(own_weight + deep[None, :], has_column[:, None] & is_deep, other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        if has_bias:
            own_bias = tl.load(bias + slot * num_columns + columns, mask=has_column, other=0.0)
            total += own_bias[None, :].to(tl.float32)
        place = out + rows[:, None] * stride_out + columns[None, :]
        is_own = has_row[:, None] & has_column[None, :]
        if is_added:
            total += tl.load(place, is_own, other=0.0).to(tl.float32)
        tl.store(place, total.to(out.dtype.element_ty), is_own)


def grouped_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: RowGroups,
    *,
    add_to: Tensor | None = None,
) -> Tensor:
    """See `grouped_linear`; sums in float32. `weight` and the rows of `add_to` must be contiguous."""
    x = x.contiguous()
    num_rows, (num_slots, num_columns, depth) = len(x), weight.shape
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device) if add_to is None else add_to
    block_m, block_n, block_k, num_splits = _tiles(num_rows, num_columns, depth, x.element_size())
    _kernel[(triton.cdiv(num_columns, block_n), num_slots, num_splits)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        groups.order,
        groups.offsets,
        num_columns,
        depth,
        x.stride(0),
        out.stride(0),
        has_bias=bias is not None,
        is_added=add_to is not None,
        num_splits=num_splits,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=4,
        num_stages=4 if num_rows <= _MAX_FEW_ROWS else 3,
    )
    return out


_MAX_FEW_ROWS = 256
"""Up to here a step is bound by reading weights, above by arithmetic."""
_MAX_SPLITS = 32


def _tiles(num_rows: int, num_columns: int, depth: int, item_bytes: int) -> tuple[int, int, int, int]:
    """Tiles of rows, columns and depth, and among how many programs a slot's tiles of rows are shared.

    By shapes alone, never by the mix. Few rows: narrow tiles, so that even a single slot's columns keep
    every multiprocessor reading.
    """
    block_k = min(256 // item_bytes, max(16, triton.next_power_of_2(depth)))
    if num_rows <= _MAX_FEW_ROWS:
        block_n = 64 if num_columns >= 1 << 15 or depth <= 64 else 16 if num_columns <= 2048 else 32
        return 16 if num_rows <= 16 else 32, block_n, block_k, 1
    block_m = 64
    splits = min(triton.cdiv(num_rows, block_m), _MAX_SPLITS)
    return block_m, 64, min(block_k, 64), splits
