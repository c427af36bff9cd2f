"""How many weights an aligner brings, by the headers of its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ram_core.aligners.files import resolve_below
from ram_core.aligners.manifest import Manifest
from ram_core.models.weight_files import read_checkpoint_headers, read_header


@dataclass(frozen=True, slots=True)
class WeightCount:
    """Weights of its own models and adapters, and those of the models that its adapters change, by source."""

    own: int
    bases: dict[str, int]


def count_weights(directory: Path, manifest: Manifest) -> WeightCount:
    """Count the weights of all parts; reads none.

    Raises:
        CheckpointError: a file that is missing or broken.
    """
    # Those who only pass counts on need no torch.
    from ram_core.models.loading import build_skeleton, load_config
    from ram_core.models.lora import WEIGHTS_FILE, is_adapter, read_lora_config

    own = 0
    bases: dict[str, int] = {}
    for part in manifest.parts:
        path = directory if part == "." else resolve_below(directory, part)
        if is_adapter(str(path)):
            own += sum(math.prod(tensor.shape) for tensor in read_header(path / WEIGHTS_FILE).values())
            base = read_lora_config(str(path)).base
            skeleton = build_skeleton(load_config(base))
            bases[base] = sum(weight.numel() for weight in skeleton.parameters())
        else:
            own += sum(math.prod(tensor.shape) for tensor in read_checkpoint_headers(path).values())
    return WeightCount(own, bases)
