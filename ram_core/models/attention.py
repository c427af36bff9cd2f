"""One attention function for every Hugging Face decoder, over paged KV memory.

transformers calls it through its public `AttentionInterface`; what it needs to know of the batch travels in
a context, because some models drop keyword arguments that they do not know. This backend gathers pages and
runs PyTorch's scaled dot product: correct everywhere, quick on CPU, the reference for any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ram_core.models.compiled_attention import attend_decode, can_attend
from ram_core.models.kv import KvPool, LayerShape
from ram_core.models.kv_watch import current_watch
from ram_core.models.packing import PackedBatch

ATTENTION_NAME = "ram_paged"
"""The `attn_implementation` under which our function is registered."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer's attention does besides the scaled dot product over the tokens before.

    `scaling` None means 1/√dim. With `window`, a token sees that many tokens, itself the last. `softcap`
    bends scaled scores, before anything is masked, to `softcap * tanh(score / softcap)`. `sinks` holds one
    score per query head that enlarges the softmax's denominator and stands for no token.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a softmax of scaled products and no more."""
        return self.softcap is None and self.sinks is None


class AttentionBackend(Protocol):
    """Computes attention for one layer of the forward that is under way."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "head token dim"],
        key: Float[Tensor, "kv_head token dim"],
        value: Float[Tensor, "kv_head token dim"],
        options: AttentionOptions,
    ) -> Float[Tensor, "token head dim"]:
        """Remember the new keys and values, and attend to all of each row's context."""


_backend: ContextVar[AttentionBackend] = ContextVar("attention_backend")


@contextmanager
def attention_backend(backend: AttentionBackend) -> Iterator[None]:
    """Serve every attention layer that runs inside the block by `backend`."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def is_paged() -> bool:
    """Whether this is inside such a block."""
    return _backend.get(None) is not None


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 head token dim"],
    key: Float[Tensor, "1 kv_head token dim"],
    value: Float[Tensor, "1 kv_head token dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " head"] | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 token head dim"], None]:
    """The function that transformers calls; returns the output and no weights."""
    layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module has it
    attend = _attend_opaque if torch.compiler.is_compiling() else _attend
    return attend(query[0], key[0], value[0], layer, scaling, sliding_window, softcap, s_aux)[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if (watch := current_watch()) is not None:
        watch.look(key, value)
    options = AttentionOptions(scaling, window, softcap, sinks)
    return _backend.get().attend(layer, query, key, value, options)


# A compiled graph calls it as it is: it knows the batch and its pages only when it runs.
_attend_opaque = torch.library.custom_op("ram::attend", _attend, mutates_args=())


@_attend_opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


AttentionInterface.register(ATTENTION_NAME, _attention)


class ShapeProbe:
    """Learns the KV shapes layer by layer from a forward of one token, whatever the config calls them."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1])
        # A single token attends to itself with weight 1, but for sinks, which change no shape.
        return value.repeat_interleave(query.shape[0] // key.shape[0], 0).transpose(0, 1)


def _dot_product_attention(
    query: Float[Tensor, "batch head query dim"],
    keys: Float[Tensor, "batch head key dim"],
    values: Float[Tensor, "batch head key dim"],
    mask: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Float[Tensor, "batch head query dim"]:
    """PyTorch's own where it knows all that is asked for, else by hand in float32.

    `mask` is what to add to the scores, or True where a query sees a key. `sinks` are those of `options` in a
    shape that broadcasts against the scores.
    """
    scale = options.scaling
    if options.is_plain:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = query.float() @ keys.float().transpose(-1, -2)
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return (weights @ values.float()).to(query.dtype)


@dataclass(frozen=True, slots=True)
class _DecodeView:
    """The pages that the decode rows read, row by row, and which of the tokens in them each sees."""

    pages: Tensor
    mask: Tensor


@dataclass(slots=True)
class PagedAttention:
    """Gathers each row's pages and runs `scaled_dot_product_attention` over them.

    Rows of one token take compiled code instead where that knows all that is asked for.
    """

    batch: PackedBatch
    pool: KvPool
    _views: dict[int | None, _DecodeView] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        start = self.batch.num_decode
        outs = []
        if start and options.is_plain and can_attend(query):
            new_query, new_key, new_value = (each[:, :start] for each in (query, key, value))
            out = attend_decode(
                self.batch, self.pool, layer, new_query, new_key, new_value, options.scaling, options.window
            )
            outs.append(out)
            self._write(layer, key, value, start)
        else:
            self._write(layer, key, value)
            if start:
                outs.append(self._decode(layer, query[:, :start], options))
        for row in range(start, len(self.batch.query_lens)):
            end = start + self.batch.query_lens[row]
            outs.append(self._prefill(layer, row, query[:, start:end], options))
            start = end
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _write(self, layer: int, key: Tensor, value: Tensor, first: int = 0) -> None:
        """Remember the batch's tokens from the `first` on."""
        slots = self.batch.slots[first:]
        if len(slots):
            self.pool.write(layer, slots, key[:, first:].transpose(0, 1), value[:, first:].transpose(0, 1))

    @staticmethod
    def _gather(memory: Tensor, pages: Tensor, num_rows: int) -> Tensor:
        """The tokens in each row's pages, [row, token, kv_head, dim].

        `memory[pages]` would do the same, and can take three times as long.
        """
        return memory.index_select(0, pages).view(num_rows, -1, *memory.shape[2:])

    def _decode(self, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """All rows of one token in a single call; the heads of a group share their keys as queries do."""
        num_heads, num_rows, dim = query.shape
        view = self._decode_view(options.window, query.dtype)
        keys = self._gather(self.pool.keys[layer], view.pages, num_rows).transpose(1, 2)
        values = self._gather(self.pool.values[layer], view.pages, num_rows).transpose(1, 2)
        grouped = query.transpose(0, 1).reshape(num_rows, keys.shape[1], -1, dim)
        sinks = None if options.sinks is None else options.sinks.view(keys.shape[1], -1, 1)
        out = _dot_product_attention(grouped, keys, values, view.mask, options, sinks)
        return out.reshape(num_rows, num_heads, -1)

    def _prefill(self, layer: int, row: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """One row of several tokens, over all of its context, cached or new."""
        context = self.batch.host_context_lens[row]
        pages = self.batch.page_table[row, : -(-context // self.batch.page_size)]
        keys = self._gather(self.pool.keys[layer], pages, 1)[0, :context].transpose(0, 1)
        values = self._gather(self.pool.values[layer], pages, 1)[0, :context].transpose(0, 1)
        # Heads of a group go into the batch axis, over which keys are expanded without a copy.
        grouped = query.reshape(keys.shape[0], -1, *query.shape[1:]).transpose(0, 1)
        groups = grouped.shape[0]
        keys, values = keys.expand(groups, -1, -1, -1), values.expand(groups, -1, -1, -1)
        mask = self._prefill_mask(row, options.window)
        sinks = None if options.sinks is None else options.sinks.view(-1, groups).T[:, :, None, None]
        out = _dot_product_attention(grouped, keys, values, mask, options, sinks)
        return out.permute(2, 1, 0, 3).flatten(1, 2)

    def _decode_view(self, window: int | None, dtype: torch.dtype) -> _DecodeView:
        """Computed once a step and shared by all layers of one window."""
        if window not in self._views:
            self._views[window] = self._make_decode_view(window, dtype)
        return self._views[window]

    def _make_decode_view(self, window: int | None, dtype: torch.dtype) -> _DecodeView:
        size = self.batch.page_size
        rows = self.batch.num_decode
        context = self.batch.context_lens[:rows, None]
        table = self.batch.page_table[:rows]
        if rows < len(self.batch.query_lens):
            # A prompt beside them may have more pages than any of them.
            table = table[:, : -(-max(self.batch.host_context_lens[:rows]) // size)]
        first = torch.zeros_like(context)
        if window is not None and window < table.shape[1] * size:
            # Only the pages that the window touches are read.
            first = (context - window).clamp(min=0) // size
            num_pages = min(table.shape[1], -(-window // size) + 1)
            wanted = first + torch.arange(num_pages, device=table.device)
            table = table.gather(1, wanted.clamp(max=table.shape[1] - 1))
        position = first * size + torch.arange(table.shape[1] * size, device=table.device)
        is_seen = position < context
        if window is not None:
            is_seen &= position >= context - window
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=table.device)
        return _DecodeView(table.flatten(), mask.masked_fill(~is_seen, -torch.inf)[:, None, None, :])

    def _prefill_mask(self, row: int, window: int | None) -> Tensor:
        """True where a query sees a key: not later, and within the window."""
        if (row, window) not in self._masks:
            context, length = self.batch.host_context_lens[row], self.batch.query_lens[row]
            device = self.batch.slots.device
            query_at = torch.arange(context - length, context, device=device)[:, None]
            key_at = torch.arange(context, device=device)
            is_seen = key_at <= query_at
            if window is not None:
                is_seen &= key_at > query_at - window
            self._masks[row, window] = is_seen
        return self._masks[row, window]
