"""KV memory: pages of keys and values for every layer of one geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What a model keeps of a token. Models of equal geometry can share a pool."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        numbers = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return numbers * self.dtype.itemsize


class KvPool:
    """`num_pages` pages of `page_size` tokens in every layer; page 0 is the trash page."""

    def __init__(self, geometry: KvGeometry, num_pages: int, page_size: int, device: torch.device) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.page_size = page_size

        def allocate(heads: int, dim: int) -> Tensor:
            # Zeros, not empty: masked positions are multiplied by zero, and 0 · NaN is NaN.
            return torch.zeros(num_pages, page_size, heads, dim, dtype=geometry.dtype, device=device)

        self.keys = [allocate(layer.num_kv_heads, layer.key_dim) for layer in geometry.layers]
        self.values = [allocate(layer.num_kv_heads, layer.value_dim) for layer in geometry.layers]

    def write(
        self,
        layer: int,
        slots: Int64[Tensor, " token"],
        key: Float[Tensor, "token head dim"],
        value: Float[Tensor, "token head dim"],
    ) -> None:
        """Put each token's key and value into its slot (`page * page_size + offset`).

        Memory stays finite, because what a failed request leaves behind is read again, masked, by the next
        owner of its page, and 0 · NaN is NaN. The failed request itself still fails: a token that draws tells
        by its own logits, and of the others `KvWatch` tells that zeros stand for something else here.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key.nan_to_num(0.0, 0.0, 0.0))
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value.nan_to_num(0.0, 0.0, 0.0))
