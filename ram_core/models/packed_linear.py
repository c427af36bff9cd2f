"""Linear layers on CPU with their weights in oneDNN's blocked layout.

A decoding step multiplies a few rows by every weight. PyTorch's plain float32 product is at its worst there:
with 8 rows it takes 1.6 times as long as oneDNN's on a weight that was laid out for it beforehand, with a
vocabulary's width 2.5 times (`benchmarks/README.md`). The layout is what PyTorch's own compiler uses when it
freezes a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Rows that the layout is made for; it serves any number.
_TYPICAL_ROWS = 32
# Kernels are made for each number of rows, which takes milliseconds: above this they come in eights.
_MAX_EXACT_ROWS = 8


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` on CPU, for inference alone; its own weight is let go."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight, for models that look at it."""
        dense: Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, for `x` of shape [..., in_features]."""
        rows = x.reshape(-1, self.in_features)
        num_rows = len(rows)
        if num_rows > _MAX_EXACT_ROWS and num_rows % 8:
            rows = pad(rows, (0, 0, 0, -num_rows % 8))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out[:num_rows].view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module) -> None:
    """Replace every float32 `nn.Linear` of a model on CPU; does nothing where PyTorch lacks oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Not its subclasses: these may do more than multiply.
            if type(child) is nn.Linear and _is_packable(child.weight):
                setattr(parent, name, PackedLinear(child))


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32
