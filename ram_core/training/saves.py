"""Saves of a run: a directory each, and a file in it, written last, that says that it is whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ram_core.training.errors import ConfigError

_SAVE = re.compile(r"checkpoint-(\d+)")
_SEAL = "complete.json"


class Spent(msgspec.Struct, frozen=True):
    """What a run has cost up to here, on all processes together; `seconds` are those on the clock."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0


class _Seal(msgspec.Struct, frozen=True):
    fingerprint: str
    spent: Spent
    sizes: dict[str, int]


@dataclass(frozen=True)
class Save:
    """A whole save, after update `step`."""

    path: Path
    step: int
    spent: Spent


def seal(path: Path, fingerprint: str, spent: Spent) -> None:
    """Declare the save at `path` whole: its files are on the disk, and no other process writes to it."""
    for file in _files(path).values():
        _sync(file)
    content = msgspec.json.encode(_Seal(fingerprint, spent, _sizes(path)))
    write_aside(path / _SEAL, content)


def last_save(directory: Path, fingerprint: str) -> Save | None:
    """The newest whole save below `directory`; what was interrupted while it was written is passed over.

    Raises:
        ConfigError: it is of a run with other data or settings.
    """
    for path, step in reversed(_paths(directory)):
        found = _read_seal(path)
        if found is None:
            continue
        require_same_run(directory, found.fingerprint, fingerprint)
        return Save(path, step, found.spent)
    return None


def require_same_run(directory: Path, found: str, fingerprint: str) -> None:
    """Refuse to go on with what another run has left, as the fingerprints tell.

    Raises:
        ConfigError: they differ.
    """
    if found != fingerprint:
        raise ConfigError(
            f"`{directory}` holds a run with other data or settings; remove it, or name another `output`"
        )


def prune(directory: Path, keep: int) -> None:
    """Remove all saves but the newest `keep` of those that are whole."""
    whole = [path for path, _ in _paths(directory) if _read_seal(path) is not None]
    kept = set(whole[-keep:])
    for path, _ in _paths(directory):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def write_aside(path: Path, content: bytes) -> None:
    """Write a file so that it has either its old content or the new one, whatever happens."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_bytes(content)
    _sync(aside)
    aside.replace(path)


def _paths(directory: Path) -> Sequence[tuple[Path, int]]:
    """All saves, whole or not, and their steps; the oldest first."""
    found = [
        (path, int(match[1]))
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (match := _SAVE.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, key=lambda each: each[1])


def _read_seal(path: Path) -> _Seal | None:
    try:
        found = msgspec.json.decode((path / _SEAL).read_bytes(), type=_Seal)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.sizes == _sizes(path) else None


def _files(path: Path) -> Mapping[str, Path]:
    return {
        str(file.relative_to(path)): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (_SEAL, f"{_SEAL}.partial")
    }


def _sizes(path: Path) -> dict[str, int]:
    return {name: file.stat().st_size for name, file in _files(path).items()}


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
