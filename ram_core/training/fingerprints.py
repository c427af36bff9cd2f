"""What a run's inputs were, in few characters: models by their files, lists of token ids by their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from ram_core.aligners.names import MANIFEST_FILE, is_passed_over
from ram_core.errors import CheckpointError
from ram_core.models.source import resolve_source

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
_PIECE_BYTES = 1 << 16
_MAX_PIECES = 64


def model_fingerprint(source: str) -> str:
    """SHA-256, in hexadecimal, over the files of a model, in a local directory or of a hub id.

    Of a large file only the size and 64 pieces of 64 KiB, evenly over it, are read: training changes all.

    Raises:
        CheckpointError: there is no such model, or a file cannot be read.
    """
    directory = resolve_source(source, with_weights=True)
    digest = hashlib.sha256()
    try:
        for path in sorted(directory.iterdir()):
            if path.suffix in _SUFFIXES and path.name != MANIFEST_FILE and not is_passed_over(path.name):
                digest.update(f"{path.name} {_sampled(path)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"`{error.filename}` cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def model_name(source: str) -> str:
    """What a model is called for others: a hub id with its commit, or the name of a local directory."""
    directory = resolve_source(source, with_weights=False)
    if Path(source).expanduser().is_dir():
        return directory.resolve().name
    return f"{source}@{directory.name}" if directory.parent.name == "snapshots" else source


def ids_fingerprint(rows: Iterable[Sequence[Sequence[int]]]) -> str:
    """SHA-256, in hexadecimal, of rows of lists of token ids, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(b"row")
        for ids in row:
            digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return digest.hexdigest()


def _sampled(path: Path) -> str:
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb", buffering=0) as file:
        for at in range(_MAX_PIECES):
            # The last piece is the end of the file.
            start = max(num_bytes - _PIECE_BYTES, 0) * at // (_MAX_PIECES - 1)
            file.seek(start)
            digest.update(file.read(_PIECE_BYTES))
            if num_bytes <= _PIECE_BYTES:
                break
    return digest.hexdigest()
