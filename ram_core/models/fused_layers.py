"""Norms, gates and rotary embedding of Hugging Face decoders in compiled code, where batches are packed.

A model's modules keep their weights, names and code: an instance's class becomes a subclass that computes
the same in one pass, if it was found to be the same on random numbers, and only inside our own forward over
pages. So the check at load, which compares that forward with the model's own, compares this as well.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import silu

from ram_core.models.attention import is_paged
from ram_core.models.layer_kernels import rms_norm, rotate, silu_product

_ROTATION = "apply_rotary_pos_emb"
_TOLERANCE = 1e-5
# Where a class keeps the one that it was made of.
_PLAIN = "_plain_class"


def fuse_layers(model: nn.Module) -> None:
    """Have a float32 model on CPU run compiled code where it is known to be the same."""
    if any(weight.device.type != "cpu" or weight.dtype is not torch.float32 for weight in model.parameters()):
        return
    for module in model.modules():
        kind: Any = type(module)
        if (shift := _norm_shift(module)) is not None:
            module.__class__ = _norm_class(kind, shift)
        elif _is_gated(module):
            module.__class__ = _gated_class(kind)
        elif _rotates(kind):
            module.__class__ = _rotating_class(kind)


def restore_layers(model: nn.Module) -> None:
    """Take back what `fuse_layers` did, for those who look at a model's code."""
    for module in model.modules():
        module.__class__ = vars(type(module)).get(_PLAIN, type(module))


def _fused(kind: type[Any], forward: Callable[..., Any]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": forward, _PLAIN: kind})


def _can_run(*tensors: Tensor) -> bool:
    """Whether this is our forward, and the compiled code for them: for numbers, none that are traced."""
    return is_paged() and all(type(x) is Tensor and x.dtype is torch.float32 for x in tensors)


def _is_near(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < _TOLERANCE)


# Norms


@torch.inference_mode()
def _norm_shift(module: nn.Module) -> float | None:
    """0 for a root-mean-square norm, 1 for one that adds 1 to its weights; None for anything else."""
    weight, eps = getattr(module, "weight", None), _eps_of(module)
    is_leaf = [*dict(module.named_parameters())] == ["weight"] and not [*module.children()]
    if eps is None or not is_leaf or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    x, own = torch.randn(2, 3, len(weight)), torch.rand(len(weight)) + 0.5
    try:
        theirs = functional_call(module, {"weight": own}, (x,))
    except Exception:  # It wants more than that, so it is something else.
        return None
    return next((by for by in (0.0, 1.0) if _is_near(rms_norm(x, own, eps, by), theirs)), None)


def _eps_of(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@cache
def _norm_class(kind: type[Any], shift: float) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        if not _can_run(x) or weight.dtype is not torch.float32:
            theirs: Tensor = kind.forward(self, x)
            return theirs
        return rms_norm(x, weight, _eps_of(self) or 0.0, shift)

    return _fused(kind, forward)


# Gates


class _Stub(nn.Module):
    """Says what it was made with."""

    def __init__(self, says: Tensor | None = None) -> None:
        super().__init__()
        self._says = says

    def forward(self, x: Tensor) -> Tensor:
        return x if self._says is None else self._says


@torch.inference_mode()
def _is_gated(module: nn.Module) -> bool:
    """Whether it is `down_proj(silu(gate_proj(x)) * up_proj(x))`."""
    if not {"gate_proj", "up_proj", "down_proj"} <= dict(module.named_children()).keys():
        return False
    gate, up = torch.randn(2, 1, 3, 8)
    twin = copy(module)
    twin._modules = module._modules | {
        "gate_proj": _Stub(gate),
        "up_proj": _Stub(up),
        "down_proj": _Stub(),
    }
    try:
        return _is_near(silu(gate) * up, twin(gate))
    except Exception:  # Whatever else it may want of its layers.
        return False


@cache
def _gated_class(kind: type[Any]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _can_run(x):
            theirs: Tensor = kind.forward(self, x)
            return theirs
        out: Tensor = self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))
        return out

    return _fused(kind, forward)


# Rotary embedding


@cache
def _rotates(kind: type[Any]) -> bool:
    """Whether its forward calls the usual function on queries and keys by its usual name."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return False
    theirs: Any = forward.__globals__.get(_ROTATION)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    cos, sin = torch.randn(2, 1, 3, 8)
    try:
        turned = theirs(query, key, cos, sin)
        return all(
            _is_near(rotate(x[0], cos[0], sin[0])[None], y) for x, y in zip((query, key), turned, strict=True)
        )
    except Exception:  # A function of that name with other arguments.
        return False


@cache
def _rotating_class(kind: type[Any]) -> type[nn.Module]:
    """Its forward, unchanged, finds another function by that name."""
    theirs = kind.forward
    known = theirs.__globals__ | {_ROTATION: _rotation(theirs.__globals__[_ROTATION])}
    forward = FunctionType(theirs.__code__, known, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    forward.__kwdefaults__ = theirs.__kwdefaults__
    return _fused(kind, forward)


def _rotation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_usual = query.ndim == 4 and len(query) == len(cos) == 1 and cos.shape[1:] == query.shape[2:]
        if args or kwargs or not is_usual or key.ndim != 4 or not _can_run(query, key, cos, sin):
            return theirs(query, key, cos, sin, *args, **kwargs)
        return tuple(rotate(x[0], cos[0], sin[0])[None] for x in (query, key))

    return turn
