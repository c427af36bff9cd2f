"""The safetensors files of a checkpoint, judged by their headers: before a minute is spent on loading."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from ram_core.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The length of the header comes first, as a little-endian integer of 8 bytes.
_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file says of one tensor; `dtype` is in safetensors' own names ("BF16").

    Its numbers begin at byte `start` of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_checkpoint_headers(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint by name, over all its shards; reads no weights.

    Raises:
        CheckpointError: no safetensors, a missing shard, or a file that is cut off or corrupt.
    """
    headers: dict[str, TensorHeader] = {}
    for path in weight_files(directory):
        headers |= read_header(path)
    return headers


def checkpoint_bytes(directory: Path) -> int:
    """Bytes of all tensors of a checkpoint, as they are stored."""
    return sum(path.stat().st_size - _header_bytes(path) for path in weight_files(directory))


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return _PREFIX_BYTES + int.from_bytes(file.read(_PREFIX_BYTES), "little")


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, whose size must be what its header promises.

    Raises:
        CheckpointError: the file is cut off, too long, or no safetensors file.
    """
    with path.open("rb") as file:
        return read_header_of(file, path.name)


def read_header_of(file: BinaryIO | FileIO, file_name: str) -> dict[str, TensorHeader]:
    """As `read_header`, of a file that is open, and stays so."""
    num_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(_PREFIX_BYTES), "little")
    if not 2 <= header_bytes <= num_bytes - _PREFIX_BYTES:
        raise CheckpointError(f"{file_name} is cut off, or is no safetensors file")
    header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(entry, _PREFIX_BYTES + header_bytes) for name, entry in entries.items()}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file_name} is corrupt: its header cannot be read") from None
    promised = _PREFIX_BYTES + header_bytes + max(ends, default=0)
    if num_bytes != promised:
        kind = "cut off" if num_bytes < promised else "too long"
        raise CheckpointError(f"{file_name} is {kind}: it has {num_bytes} bytes and should have {promised}")
    return tensors


def _tensor(entry: dict[str, Any], data_start: int) -> TensorHeader:
    """Raises ValueError, or what Python makes of a wrong type, if the entry contradicts itself."""
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    tensor = TensorHeader(str(entry["dtype"]), shape, data_start + start)
    if start < 0 or min(shape, default=0) < 0:
        raise ValueError("a tensor begins before its file, or has a negative size")
    if tensor.dtype in _DTYPE_BYTES and end - start != math.prod(shape) * _DTYPE_BYTES[tensor.dtype]:
        raise ValueError("a tensor's bytes are not those of its shape")
    return tensor


def weight_files(directory: Path) -> list[Path]:
    """The shards of a checkpoint, in the order of their names.

    Raises:
        CheckpointError: no safetensors, or a missing shard.
    """
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"its weights are pickled ({pickles[0]}), which can run code; convert them to safetensors"
            )
        raise CheckpointError(f"it has no weights (neither {SINGLE_FILE} nor {INDEX_FILE})")
    names = _shard_names(directory / INDEX_FILE)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(names)} shards are missing, the first is {missing[0]}")
    return [directory / name for name in names]


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        are_plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{index.name} is broken: no map of weights to shards can be read") from None
    if not names or not are_plain:
        raise CheckpointError(f"{index.name} names no shards, or files that are not safetensors beside it")
    return names
