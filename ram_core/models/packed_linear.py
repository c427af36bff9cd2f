"""Linear layers on CPU with their weights in oneDNN's blocked layout.

A decoding step multiplies a few rows by every weight. PyTorch's plain float32 product is at its worst there:
with 8 rows it takes 1.6 times as long as oneDNN's on a weight that was laid out for it beforehand, with a
vocabulary's width 2.5 times. The layout is what PyTorch's own compiler uses when it freezes a model.

One or two rows are a tenth faster with the plain weight on Intel's CPUs, so small models keep it there beside
the other. The plain product is MKL's, made for these CPUs: on AMD's it takes three times as long as oneDNN's.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from pathlib import Path
from typing import TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ram_core.models.stored import take_from_files

# Rows that the layout is made for; it serves any number.
_TYPICAL_ROWS = 32
# Up to so many, the plain weight is read faster.
_MAX_PLAIN_ROWS = 2
_MAX_PLAIN_BYTES = 2 << 30
"""Models whose packed weights take more do not keep plain ones as well."""
_CPU_INFO = Path("/proc/cpuinfo")
# Kernels are made for each number of rows, which takes milliseconds: above this they come in eights.
_MAX_EXACT_ROWS = 8


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` on CPU, for inference alone; its plain weight is let go unless `keeps_plain`."""

    def __init__(self, layer: nn.Linear, *, keeps_plain: bool) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        self._plain = weight if keeps_plain else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def keeps_plain(self) -> bool:
        """Whether the plain weight is kept beside the packed one."""
        return self._plain is not None

    @property
    def weight(self) -> Tensor:
        """The plain weight, or a copy in its layout, for models that look at it; not for writing."""
        plain: Tensor = self._packed.to_dense() if self._plain is None else self._plain
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, for `x` of shape [..., in_features]."""
        if torch.compiler.is_compiling():
            opaque: Tensor = _product_opaque(x, self._number, self.out_features)
            return opaque
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // self.in_features
        if num_rows <= _MAX_PLAIN_ROWS and self._plain is not None:
            return linear(x, self._plain, self.bias)
        rows = x.reshape(-1, self.in_features)
        if num_rows > _MAX_EXACT_ROWS and num_rows % 8:
            rows = pad(rows, (0, 0, 0, -num_rows % 8))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out[:num_rows].view(*x.shape[:-1], self.out_features)


_numbers = count()
# A compiled graph takes numbers and plain tensors, neither modules nor weights in a layout of oneDNN's.
_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


@torch.library.custom_op("ram::packed_linear", mutates_args=())
def _product_opaque(x: Tensor, layer: int, out_features: int) -> Tensor:
    return _layers[layer]._product(x)


@_product_opaque.register_fake
def _(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def pack_linears(model: nn.Module) -> None:
    """Replace every float32 `nn.Linear` of a model on CPU; does nothing where PyTorch lacks oneDNN."""
    keeps_plain = keeps_plain_weights(model)
    if keeps_plain:
        take_from_files(model)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_packable(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child, keeps_plain=keeps_plain))


def is_packable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `pack_linears` replaces a layer."""
    # Not subclasses: these may do more than multiply.
    if type(layer) is not nn.Linear or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = layer.weight
    # Not quantised weights nor shares of one, which are tensors of their own kinds.
    is_plain = type(weight) in (Tensor, nn.Parameter)
    return is_plain and weight.device.type == "cpu" and weight.dtype is torch.float32


def keeps_plain_weights(model: nn.Module) -> bool:
    """Whether `pack_linears` keeps a model's plain weights beside the packed ones."""
    num_bytes = sum(layer.weight.nbytes for layer in model.modules() if is_packable(layer))
    return num_bytes <= _MAX_PLAIN_BYTES and _is_intel()


@cache
def _is_intel() -> bool:
    """The vendor decides, not a measurement: a machine has to compute the same bits after a restart."""
    try:
        return "GenuineIntel" in _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
