"""Linear layers on CPU with their weights laid out for `matrix_product`, for inference alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import TypeGuard
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ram_core.models.matrix_product import PANEL, lay_out, lay_out_bias, multiply, plain_layout
from ram_core.models.tied_embedding import take_rows_of


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` on CPU, for inference alone; its plain weight is let go."""

    def __init__(
        self,
        layer: nn.Linear,
        rows: Iterable[Tensor] | None = None,
        instead_of: PackedLinear | None = None,
    ) -> None:
        """`rows` are the layer's weight, as `lay_out` takes it, if it has none itself.

        They take the memory of one of the same sizes that nobody uses any more, if there is one.
        """
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        rows = [layer.weight] if rows is None else rows
        room = None if instead_of is None else instead_of._panels
        self._panels: Tensor = lay_out(rows, layer.out_features, layer.in_features, room)
        self._added = lay_out_bias(layer.bias, layer.out_features)
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def weight(self) -> Tensor:
        """A copy in the plain layout, for models that look at it; not for writing."""
        return plain_layout(self._panels, self.out_features)

    def rows_of(self, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token input"]:
        """Some rows of the weight."""
        return self._panels[ids // PANEL, :, ids % PANEL]

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, for `x` of shape [..., in_features]."""
        if torch.compiler.is_compiling():
            opaque: Tensor = _product_opaque(x, self._number, self.out_features)
            return opaque
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        out = multiply(x.reshape(-1, self.in_features), self._panels, self._added)
        return out[:, : self.out_features].view(*x.shape[:-1], self.out_features)


_numbers = count()
# A compiled graph takes numbers and plain tensors, no modules.
_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


@torch.library.custom_op("ram::packed_linear", mutates_args=())
def _product_opaque(x: Tensor, layer: int, out_features: int) -> Tensor:
    return _layers[layer]._product(x)


@_product_opaque.register_fake
def _(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def pack_linears(model: nn.Module) -> None:
    """Replace every float32 `nn.Linear` of a model on CPU; embeddings that one is tied to go with it."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_packable(child)
    ]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for parent, name, child in found:
        packed = PackedLinear(child)
        setattr(parent, name, packed)
        for embedding in embeddings:
            if is_lookup(embedding) and embedding.weight is child.weight:
                take_rows_of(embedding, packed)


def is_lookup(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """An embedding that only looks rows up."""
    return isinstance(module, nn.Embedding) and module.max_norm is None


def is_packable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `pack_linears` replaces a layer."""
    # Not subclasses: these may do more than multiply.
    if type(layer) is not nn.Linear:
        return False
    weight = layer.weight
    # Not quantised weights nor shares of one, which are tensors of their own kinds.
    is_plain = type(weight) in (Tensor, nn.Parameter)
    return is_plain and weight.device.type == "cpu" and weight.dtype is torch.float32
