"""LoRA adapters of random weights, as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.shapes import Shape


def save_adapter(shape: Shape, base: str, directory: Path, dtype: str, rank: int) -> str:
    """An adapter of all linear layers of `base`, whose shape is given; returns where it is."""
    wide, narrow = shape.hidden, shape.kv_heads * shape.head_dim
    layers = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (wide, narrow),
        "self_attn.v_proj": (wide, narrow),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (wide, shape.intermediate),
        "mlp.up_proj": (wide, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, wide),
    }
    weights = {}
    noise = torch.Generator().manual_seed(0)
    for layer in range(shape.layers):
        for name, (num_in, num_out) in layers.items():
            where = f"base_model.model.model.layers.{layer}.{name}"
            for side, size in (("A", (rank, num_in)), ("B", (num_out, rank))):
                drawn = 0.02 * torch.randn(size, generator=noise)
                weights[f"{where}.lora_{side}.weight"] = drawn.to(getattr(torch, dtype))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted(name.partition(".")[2] for name in layers),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)
