"""Paged attention by the FlashInfer package, an optional extra, for 16-bit models without sinks.

FlashInfer plans a forward on the host, from the lengths of all contexts. Ours are on the device, so that
steps can be recorded; here the host waits for them, once a forward. Steps are therefore neither recorded nor
planned while others run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor

from ram_core.errors import CheckpointError
from ram_core.models.attention import AttentionOptions
from ram_core.models.backends import check_package_can
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch

_WORKSPACE_BYTES = 128 << 20
_HEAD_DIMS = (64, 128, 256)


class RowPages(NamedTuple):
    """Where each row's queries and pages begin, all pages of all rows, and the tokens in each row's last."""

    query_starts: Int32[Tensor, " row_plus_one"]
    page_starts: Int32[Tensor, " row_plus_one"]
    pages: Int32[Tensor, " page"]
    last_lens: Int32[Tensor, " row"]

    @classmethod
    def of(cls, batch: PackedBatch) -> RowPages:
        """Waits for the device; all but `pages` stay on the host."""
        contexts = batch.context_lens.cpu()
        num_pages = -(-contexts // batch.page_size)
        is_held = torch.arange(batch.page_table.shape[1]) < num_pages[:, None]
        return cls(
            _starts(torch.tensor(batch.query_lens)),
            _starts(num_pages),
            batch.page_table[is_held.to(batch.page_table.device)].int(),
            (contexts - (num_pages - 1) * batch.page_size).int(),
        )


@dataclass(slots=True)
class FlashInferAttention:
    """Serves a forward by `BatchPrefillWithPagedKVCacheWrapper`, all rows of a layer in one call."""

    batch: PackedBatch
    pool: KvPool
    _rows: RowPages | None = None
    _planned: dict[AttentionOptions, Any] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        _check(query, value, options)
        self.pool.write(layer, self.batch.slots, key.transpose(0, 1), value.transpose(0, 1))
        if options not in self._planned:
            self._planned[options] = self._plan(query, key, options)
        memory = self.pool.keys[layer], self.pool.values[layer]
        out: Tensor = self._planned[options].run(query.transpose(0, 1).contiguous(), memory)
        return out

    def _plan(self, query: Tensor, key: Tensor, options: AttentionOptions) -> Any:
        """Once a forward for all layers of equal options."""
        if self._rows is None:
            self._rows = RowPages.of(self.batch)
        stream = torch.cuda.current_stream(query.device).cuda_stream
        wrapper = _wrapper(query.device, stream, options.window, options.softcap, options.scaling)
        wrapper.plan(
            *self._rows,
            query.shape[0],
            key.shape[0],
            query.shape[-1],
            self.pool.page_size,
            # The last query of a row sees all of its keys.
            causal=True,
            sm_scale=options.scaling,
            window_left=-1 if options.window is None else options.window - 1,
            logits_soft_cap=options.softcap,
            q_data_type=query.dtype,
            kv_data_type=query.dtype,
        )
        return wrapper


def _check(query: Tensor, value: Tensor, options: AttentionOptions) -> None:
    check_package_can("flashinfer", query, options)
    dim = query.shape[-1]
    if dim != value.shape[-1] or dim not in _HEAD_DIMS:
        raise CheckpointError(
            f"`attention` 'flashinfer' needs heads of one size, {', '.join(map(str, _HEAD_DIMS))}, "
            f"got {dim} and {value.shape[-1]}"
        )


def _starts(lengths: Tensor) -> Int32[Tensor, " row_plus_one"]:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()


@cache
def _wrapper(device: torch.device, stream: int, *options: float | None) -> Any:
    """What a plan is kept in: of its own for each stream, and for layers that differ in their options."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
