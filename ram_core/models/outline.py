"""All of a model but its weights: kept of an architecture, so that the next of its kind is made of that."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvGeometry
from ram_core.models.loading import build_skeleton
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import trailing_axes


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of an architecture: what its weights take, its KV geometry, what its norms see.

    No `axes` if it cannot share a module. `buffers` are those of a model that was loaded: None before, and
    if a shell would not have its weights' dtypes.
    """

    num_bytes: int
    geometry: KvGeometry
    axes: dict[str, int]
    buffers: dict[str, Tensor] | None = None


def outline_of(skeleton: PagedModel) -> Outline:
    """The outline of a model without weights, on the meta device."""
    axes: dict[str, int] = {}
    with suppress(CheckpointError):
        axes = trailing_axes(skeleton)
    return Outline(skeleton.weight_bytes, skeleton.geometry, axes)


def buffers_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """Copies of a model's buffers, by name; None if not all its weights are of that dtype."""
    if any(weight.dtype != dtype for weight in model.parameters()):
        return None
    return {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def make_shell(
    config: PreTrainedConfig,
    buffers: dict[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A model whose weights have their shapes, and take no memory: all are to be replaced.

    Nothing is read from its files. None if it has numbers of its own that nobody keeps.
    """
    model = build_skeleton(config, attn_implementation=ATTENTION_NAME, trust_remote_code=trust_remote_code)
    if {name for name, _ in model.named_buffers(remove_duplicate=False)} != buffers.keys():
        return None
    # Tied ones stay one.
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight not in known:
                number = torch.zeros((), device=device, dtype=dtype)
                known[weight] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
            module.register_parameter(name, known[weight])
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.clone()
    others = chain.from_iterable(vars(module).values() for module in model.modules())
    return None if any(isinstance(each, Tensor) and each.is_meta for each in others) else model
