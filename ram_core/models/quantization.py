"""Weights stored in fewer bits, through transformers' own quantisers.

Either a checkpoint brings a `quantization_config` of any kind that transformers loads, or plain weights are
quantised while they are loaded: weight-only, by torchao, all linear layers but the output layer. Activations,
keys and values stay in the model's dtype.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TorchAoConfig

from ram_core.errors import CheckpointError

PLAIN = "none"
QUANTIZATIONS = (PLAIN, "int8", "int4", "fp8")
"""What can be asked for at load."""

_INT4_GROUP = 128
_GROUP_BYTES = 4
_ROW_BYTES = 5
"""A scale and a zero point for each row, or for each group of four bits."""
# Compute capabilities that the kernels behind each need.
_MIN_CAPABILITY = {"int4": (8, 0), "fp8": (8, 9)}


def check_quantization(
    name: str, *, device: torch.device, dtype: torch.dtype | None, config: PreTrainedConfig
) -> None:
    """Refuse a way of storing weights that cannot be had here.

    Raises:
        CheckpointError: an unknown name, quantised weights already, a package or a device that is missing.
    """
    if name not in QUANTIZATIONS:
        raise CheckpointError(f"`quantization` must be one of {', '.join(QUANTIZATIONS)}, got {name!r}")
    if name == PLAIN:
        return
    if is_quantized(config):
        raise CheckpointError(
            f"`quantization` is {name}, but the checkpoint's weights are quantised already; leave it out"
        )
    missing = [package for package in ("torchao", "accelerate") if find_spec(package) is None]
    if missing:
        raise CheckpointError(
            f"`quantization` {name} needs the package {missing[0]}: install `ram-server[quantized]`"
        )
    if name in _MIN_CAPABILITY and not _is_capable(device, _MIN_CAPABILITY[name]):
        at_least = ".".join(map(str, _MIN_CAPABILITY[name]))
        raise CheckpointError(
            f"`quantization` {name} needs a CUDA device of compute capability {at_least} or more, "
            f"which `{device}` is not; int8 runs everywhere"
        )
    if name == "int4" and dtype is not torch.bfloat16:
        raise CheckpointError(f"`quantization` int4 computes in bfloat16 only, but `dtype` is {dtype}")


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint brings weights that are quantised already."""
    return getattr(config, "quantization_config", None) is not None


def may_round_activations(model: PreTrainedModel) -> bool:
    """Whether a model was quantised by others, who may have wanted more than its weights rounded."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.pre_quantized)


def quantization_options(name: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` has to be told so that quantised weights, or ones to quantise, come to `device`.

    They are made where they stay: some layouts exist on one kind of device only.
    """
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if name == PLAIN:
        return place
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if name == "int4":
        # The packing that PyTorch's own kernels read.
        kind = Int4WeightOnlyConfig(group_size=_INT4_GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        kind = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[name]()
    return place | {"quantization_config": TorchAoConfig(kind)}


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in this process: not those of its shape if it is quantised or shared."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = (getattr(tensor, name) for name in flatten()[0])
        return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor))
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights in this process, tied ones once; a quantiser may keep some as buffers."""
    buffers = (each for each in model.buffers() if is_quantized(getattr(model, "config", model)))
    return sum(stored_bytes(tensor) for tensor in (*model.parameters(), *buffers))


def quantized_bytes(model: PreTrainedModel, name: str) -> int:
    """About as many bytes as a plain model's weights will take once they are quantised like that."""
    output = model.get_output_embeddings()
    total = weight_bytes(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not output:
            total += _linear_bytes(layer, name) - stored_bytes(layer.weight)
    return total


def _linear_bytes(layer: nn.Linear, name: str) -> int:
    if name == PLAIN:
        return stored_bytes(layer.weight)
    if name == "int4":
        groups = -(-layer.in_features // _INT4_GROUP)
        return layer.out_features * (layer.in_features // 2 + groups * _GROUP_BYTES)
    return layer.out_features * (layer.in_features + _ROW_BYTES)


def _is_capable(device: torch.device, least: tuple[int, int]) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= least
