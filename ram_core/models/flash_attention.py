"""Paged attention by the flash-attn package, an optional extra, for 16-bit models without sinks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func
from jaxtyping import Int32
from torch import Tensor

from ram_core.errors import CheckpointError
from ram_core.models.attention import AttentionOptions
from ram_core.models.backends import check_package_can
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch, ready_to_send

_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Where each row's queries begin, and its keys if these lay one behind the other; and its pages."""

    query_starts: Int32[Tensor, " row_plus_one"]
    key_starts: Int32[Tensor, " row_plus_one"]
    page_table: Int32[Tensor, "row page"]


@dataclass(slots=True)
class FlashAttention:
    """Serves a forward by `flash_attn_varlen_func`, all rows of a layer in one call."""

    batch: PackedBatch
    pool: KvPool
    _lengths: _Lengths | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        _check(query, value, options)
        self.pool.write(layer, self.batch.slots, key.transpose(0, 1), value.transpose(0, 1))
        if self._lengths is None:
            self._lengths = _lengths_of(self.batch)
        out: Tensor = flash_attn_varlen_func(
            query.transpose(0, 1),
            self.pool.keys[layer],
            self.pool.values[layer],
            cu_seqlens_q=self._lengths.query_starts,
            cu_seqlens_k=self._lengths.key_starts,
            max_seqlen_q=max(self.batch.query_lens),
            max_seqlen_k=self.batch.page_table.shape[1] * self.pool.page_size,
            softmax_scale=options.scaling,
            # The last query of a row sees all of its keys.
            causal=True,
            window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
            softcap=options.softcap or 0.0,
            block_table=self._lengths.page_table,
        )
        return out


def _check(query: Tensor, value: Tensor, options: AttentionOptions) -> None:
    check_package_can("flash_attn", query, options)
    dim = query.shape[-1]
    if dim != value.shape[-1] or dim % 8 or dim > _MAX_HEAD_DIM:
        raise CheckpointError(
            f"`attention` 'flash_attn' needs heads of one size, a multiple of 8 up to {_MAX_HEAD_DIM}, "
            f"got {dim} and {value.shape[-1]}"
        )


def _lengths_of(batch: PackedBatch) -> _Lengths:
    """Without a look at the device; for rows of equal length, which may be recorded, without an upload."""
    device, lens = batch.slots.device, batch.query_lens
    if len(set(lens)) == 1:
        query_starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=device) * lens[0]
    else:
        on_host = ready_to_send(np.cumsum([0, *lens]), device)
        query_starts = on_host.to(device, non_blocking=True).int()
    ends = batch.context_lens.cumsum(0, dtype=torch.int32)
    key_starts = torch.cat([torch.zeros_like(ends[:1]), ends])
    return _Lengths(query_starts, key_starts, batch.page_table.int())
