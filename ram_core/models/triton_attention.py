"""Paged attention on a device: every layer is a write, one or two launches over tiles, and a join of splits.

Nothing here looks at numbers on the device. How work is cut follows from shapes and from what the host knows
anyway, so batches of rows of equal length (steps that only draw, or verify drafts of one length) can be
captured in CUDA graphs and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor
from triton import next_power_of_2

from ram_core.models.attention import AttentionOptions
from ram_core.models.attention_kernels import attend_tile, join_splits, write_kv
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch

_MAX_QUERY_LINES = 128
_QUERY_BYTES = _BLOCK_BYTES = 32 * 1024
"""Of a tile's queries, and of a block's keys and values: two blocks have to fit beside a tile."""

_PROGRAMS_PER_CORE = 2
_MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class RowRange:
    """Neighbouring rows that one launch serves; `row_len` is each one's tokens, 0 if they differ."""

    first_row: int
    num_rows: int
    first_token: int
    num_tokens: int
    row_len: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes of what a program holds: `tile_tokens` of a row, `query` lines, `tokens` of the context.

    Few different ones occur, as for each of them there is a kernel to compile.
    """

    tile_tokens: int
    query: int
    tokens: int
    key: int
    value: int

    @classmethod
    def of(cls, longest: int, group: int, key_dim: int, value_dim: int, itemsize: int) -> Blocks:
        """For rows of up to `longest` tokens; matrix units want 16 lines at least, and powers of two."""
        key, value = (max(16, next_power_of_2(dim)) for dim in (key_dim, value_dim))
        # Matrix units take a float32 in two parts, and both have to be held.
        width = itemsize if itemsize < 4 else 2 * itemsize
        lines = min(_MAX_QUERY_LINES, _floor_power_of_two(_QUERY_BYTES // (width * key)))
        query = max(16, next_power_of_2(min(longest * group, max(group, lines))))
        tokens = max(16, min(64, _floor_power_of_two(_BLOCK_BYTES // (width * (key + value)))))
        return cls(query // group, query, tokens, key, value)

    @property
    def num_warps(self) -> int:
        return 8 if self.query >= 128 else 4


def split_rows(query_lens: Sequence[int], num_decode: int) -> list[RowRange]:
    """The launches of a batch: rows of one token first, the others behind them."""
    ranges, row, token = [], 0, 0
    is_uniform = len(set(query_lens)) == 1
    for lens in [query_lens] if is_uniform else [query_lens[:num_decode], query_lens[num_decode:]]:
        if lens:
            row_len = lens[0] if len(set(lens)) == 1 else 0
            ranges.append(RowRange(row, len(lens), token, sum(lens), row_len))
            row, token = row + len(lens), token + sum(lens)
    return ranges


def map_tiles(
    query_lens: Sequence[int], rows: RowRange, tile_tokens: int, device: torch.device
) -> Int32[Tensor, "tile 4"]:
    """Of each tile: its row, its first token in the row, the row's tokens, and where these are packed."""
    tiles, token = [], rows.first_token
    for row in range(rows.first_row, rows.first_row + rows.num_rows):
        length = query_lens[row]
        tiles += [(row, first, length, token) for first in range(0, length, tile_tokens)]
        token += length
    flat = torch.from_numpy(np.array(tiles, dtype=np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return flat.to(device, non_blocking=True)


def choose_num_splits(num_programs: int, max_blocks: int, num_cores: int) -> int:
    """A power of two: enough programs for all cores, and a block at least for each."""
    wanted = min(_PROGRAMS_PER_CORE * num_cores // num_programs, max_blocks, _MAX_SPLITS)
    return _floor_power_of_two(max(wanted, 1))


@dataclass(slots=True)
class TritonAttention:
    """Serves a forward by Triton's kernels. `num_splits` 0 chooses how many parts a context is cut into."""

    batch: PackedBatch
    pool: KvPool
    num_splits: int = 0
    _tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        query = _dense(query)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            self._write(layer, _dense(key), _dense(value))
            for rows in split_rows(self.batch.query_lens, self.batch.num_decode):
                self._attend_rows(rows, layer, query, options, out)
        return out

    def _write(
        self, layer: int, key: Float[Tensor, "kv_head token dim"], value: Float[Tensor, "kv_head token dim"]
    ) -> None:
        """What `KvPool.write` does, in one launch: see there why memory stays finite."""
        num_kv_heads, num_tokens, key_dim = key.shape
        write_kv[(num_tokens,)](
            key,
            value,
            self.pool.keys[layer],
            self.pool.values[layer],
            self.batch.slots,
            *key.stride()[:2],
            *value.stride()[:2],
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value.shape[-1],
            block_key=next_power_of_2(num_kv_heads * key_dim),
            block_value=next_power_of_2(num_kv_heads * value.shape[-1]),
            num_warps=4,
        )

    def _attend_rows(
        self, rows: RowRange, layer: int, query: Tensor, options: AttentionOptions, out: Tensor
    ) -> None:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        group = query.shape[0] // keys.shape[2]
        longest = rows.row_len or max(self.batch.query_lens[rows.first_row :][: rows.num_rows])
        blocks = Blocks.of(longest, group, keys.shape[-1], values.shape[-1], keys.element_size())
        tiles = None if rows.row_len else self._map_tiles(rows, blocks.tile_tokens)
        num_tiles = rows.num_rows * -(-longest // blocks.tile_tokens) if tiles is None else len(tiles)
        num_programs = num_tiles * keys.shape[2]
        num_splits = self.num_splits or self._choose_num_splits(num_programs, blocks, options)
        found, log_sums = out, None
        if num_splits > 1:
            found = out.new_empty(num_splits, *out.shape, dtype=torch.float32)
            log_sums = out.new_empty(num_splits, *out.shape[:2], dtype=torch.float32)
        attend_tile[num_tiles, keys.shape[2], num_splits](
            query,
            keys,
            values,
            self.batch.page_table,
            self.batch.context_lens,
            options.sinks,
            tiles,
            found,
            log_sums,
            first_row=rows.first_row,
            first_token=rows.first_token,
            row_len=rows.row_len,
            table_stride=self.batch.page_table.stride(0),
            num_tokens=query.shape[1],
            query_head_stride=query.stride(0),
            query_token_stride=query.stride(1),
            group=group,
            is_split=num_splits > 1,
            has_tiles=tiles is not None,
            **_constants_of(keys, values, options),
            **_constants_of_blocks(blocks),
        )
        if log_sums is not None:
            _join(found, log_sums, out, rows)

    def _map_tiles(self, rows: RowRange, tile_tokens: int) -> Tensor:
        """Made once a forward and shared by all layers that cut rows alike."""
        place = (rows.first_row, tile_tokens)
        if place not in self._tiles:
            device = self.batch.slots.device
            self._tiles[place] = map_tiles(self.batch.query_lens, rows, tile_tokens, device)
        return self._tiles[place]

    def _choose_num_splits(self, num_programs: int, blocks: Blocks, options: AttentionOptions) -> int:
        max_tokens = self.batch.page_table.shape[1] * self.pool.page_size
        if options.window is not None:
            max_tokens = min(max_tokens, options.window + blocks.tile_tokens + blocks.tokens)
        num_cores = _num_cores(self.batch.slots.device)
        return choose_num_splits(num_programs, max_tokens // blocks.tokens, num_cores)


def _constants_of(keys: Tensor, values: Tensor, options: AttentionOptions) -> dict[str, Any]:
    """What of the launch follows from the layer."""
    _, page_size, num_kv_heads, key_dim = keys.shape
    return {
        "num_kv_heads": num_kv_heads,
        "key_dim": key_dim,
        "value_dim": values.shape[-1],
        "page_size": page_size,
        "page_bits": page_size.bit_length() - 1,
        "has_page_bits": page_size == next_power_of_2(page_size),
        "scale": key_dim**-0.5 if options.scaling is None else options.scaling,
        "softcap": options.softcap or 0.0,
        "window": options.window or 0,
        "has_window": options.window is not None,
        "has_softcap": options.softcap is not None,
        "has_sinks": options.sinks is not None,
        # Matrix units know no float32: three products of its parts come close, one (TF32) does not.
        "precision": "tf32x3" if keys.dtype == torch.float32 else "tf32",
        # Triton's interpreter, which runs this on CPU, would multiply bfloat16 as if it were integers.
        "is_widened": not keys.is_cuda,
    }


def _constants_of_blocks(blocks: Blocks) -> dict[str, int]:
    """What of the launch follows from how work is cut."""
    return {
        "tile_tokens": blocks.tile_tokens,
        "block_query": blocks.query,
        "block_tokens": blocks.tokens,
        "block_key": blocks.key,
        "block_value": blocks.value,
        "num_warps": blocks.num_warps,
        "num_stages": 2,
    }


def _join(found: Tensor, log_sums: Tensor, out: Tensor, rows: RowRange) -> None:
    num_splits, num_tokens, num_heads, value_dim = found.shape
    join_splits[rows.num_tokens, num_heads](
        found,
        log_sums,
        out,
        rows.first_token,
        num_tokens,
        num_heads=num_heads,
        value_dim=value_dim,
        num_splits=num_splits,
        block_splits=next_power_of_2(num_splits),
        block_value=next_power_of_2(value_dim),
        num_warps=4,
    )


def _dense(tensor: Tensor) -> Tensor:
    """With the numbers of a head side by side, as kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _floor_power_of_two(size: int) -> int:
    """The last one that is not bigger."""
    return 1 << (size.bit_length() - 1)


@cache
def _num_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
