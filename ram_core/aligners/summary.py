"""What an aligner's directory says of itself: for people, without judging it and without torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ram_core.aligners.files import OnProgress, content_version, list_files, resolve_below
from ram_core.aligners.manifest import Manifest, default_manifest, read_manifest
from ram_core.errors import CheckpointError
from ram_core.models.source import one_line
from ram_core.models.weight_files import read_header


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One model of an aligner. `base` is what a LoRA adapter changes, "" if it is a model by itself.

    `dtypes` has the number of parameters that are stored in each.
    """

    part: str
    architecture: str
    base: str
    num_parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AlignerSummary:
    """`manifest` is the aligner's own, or what holds without one; `files` has their sizes in bytes."""

    directory: Path
    has_manifest: bool
    manifest: Manifest
    parts: tuple[PartSummary, ...]
    files: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def summarise(directory: Path, on_progress: OnProgress | None = None) -> AlignerSummary:
    """Read manifest, configs and headers; without a manifest, all files once for a hash of them.

    Raises:
        CheckpointError: no such directory, or something that cannot be read, or must not be there.
    """
    if not directory.is_dir():
        raise CheckpointError(f"`{directory}`: no such directory")
    files = list_files(directory)
    manifest = read_manifest(directory)
    has_manifest = manifest is not None
    if manifest is None:
        manifest = default_manifest(directory.resolve().name, content_version(files, on_progress))
    return AlignerSummary(
        directory,
        has_manifest,
        manifest,
        tuple(_summarise_part(directory, part) for part in manifest.parts),
        {name: path.stat().st_size for name, path in files.items()},
    )


def _summarise_part(root: Path, part: str) -> PartSummary:
    directory = root if part == "." else resolve_below(root, part)
    dtypes: Counter[str] = Counter()
    for path in sorted(directory.glob("*.safetensors")):
        for tensor in read_header(path).values():
            dtypes[tensor.dtype] += math.prod(tensor.shape)
    if (directory / "config.json").is_file():
        config = _read_json(directory / "config.json")
        named = config.get("architectures") or [config.get("model_type", "unknown")]
        architecture, base = str(named[0]), ""
    elif (directory / "adapter_config.json").is_file():
        config = _read_json(directory / "adapter_config.json")
        architecture, base = f"LoRA of rank {config.get('r')}", str(config.get("base_model_name_or_path"))
    else:
        raise CheckpointError(f"`{directory}` has no config.json and no adapter_config.json")
    return PartSummary(part, architecture, base, sum(dtypes.values()), dict(dtypes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is broken ({one_line(error)})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"`{path}` is broken (not an object)")
    return raw
