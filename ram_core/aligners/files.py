"""The files of an aligner: which there are, what they hash to, and whether they are still the same ones."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

from blake3 import blake3

from ram_core.aligners.names import MANIFEST_FILE, is_passed_over
from ram_core.errors import CheckpointError

MAX_FILES = 4096
SHORT_DIGITS = 12
SHA256, BLAKE3 = "sha256", "blake3"

_CHUNK_BYTES = 1 << 22
_AHEAD_CHUNK_BYTES, _MAX_AHEAD_BYTES = 1 << 24, 1 << 31
_MAX_HASHES = MAX_FILES
_NEW: Mapping[str, Callable[[], Any]] = {SHA256: hashlib.sha256, BLAKE3: blake3}
_TICK_NS = 100_000_000
# Pickles can run code when they are read, and Python's files are code.
_REFUSED = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"), "may be pickled"),
    **dict.fromkeys((".py", ".pyc", ".so"), "is code"),
}

OnBytes = Callable[[int], None]
"""Told how many more bytes were read."""
OnProgress = Callable[[int, int], None]
"""Told how many bytes of how many were read."""
Digests = Mapping[str, str]
"""Of one file, in hexadecimal, by the name of the hash."""


def list_files(directory: Path, root: Path | None = None) -> dict[str, Path]:
    """Every regular file of an aligner by its relative path, in order; hidden and unfinished ones aside.

    A link to a file counts as the file if it leads to one below `root`, by default the directory itself.

    Raises:
        CheckpointError: there is something else: a link that leads out or to a directory, a socket, a
            pickle, code, or too many files. What is hidden or unfinished is not read, but judged as well.
    """
    limit = (root or directory).resolve()
    found: dict[str, Path] = {}
    num_seen = 0
    for folder, folders, names in os.walk(directory, onerror=_raise):
        folders.sort()
        for name in sorted([*names, *folders]):
            path = Path(folder, name)
            is_file = _judge(path, limit)
            num_seen += 1
            relative = path.relative_to(directory)
            if is_file and not any(is_passed_over(part) for part in relative.parts):
                found[relative.as_posix()] = path
        if num_seen > MAX_FILES:
            raise CheckpointError(f"it has more than {MAX_FILES} files")
    return dict(sorted(found.items()))


def resolve_below(directory: Path, relative: str) -> Path:
    """The path of `relative` below a directory.

    Raises:
        CheckpointError: it is not the plain way to something below it (absolute, `..`, a backslash).
    """
    pure = PurePosixPath(relative)
    is_plain = str(pure) == relative.removeprefix("./") and "\\" not in relative and "\0" not in relative
    if not is_plain or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise CheckpointError(f"{relative!r} is no path below the aligner's directory")
    return directory / pure


def digests_of(path: Path, kinds: Iterable[str], on_bytes: OnBytes | None = None) -> Digests:
    """A file's digests, all of one reading, piece by piece; known ones if it has not changed since."""
    with path.open("rb", buffering=0) as file:
        before = _state_of(os.fstat(file.fileno()))
        known = _digests.get(before, {})
        hashes = {kind: _NEW[kind]() for kind in kinds if kind not in known}
        if not hashes:
            if on_bytes is not None:
                on_bytes(before.num_bytes)
            return known
        # The clock of files is coarse: a second write in one of its ticks would leave no trace.
        is_settled = time.time_ns() - before.ctime_ns > _TICK_NS
        room = memoryview(bytearray(_CHUNK_BYTES))
        while num_bytes := file.readinto(room):
            for each in hashes.values():
                each.update(room[:num_bytes])
            if on_bytes is not None:
                on_bytes(num_bytes)
        found = {**known, **{kind: each.hexdigest() for kind, each in hashes.items()}}
        if is_settled and _state_of(os.fstat(file.fileno())) == before:
            while len(_digests) >= _MAX_HASHES:
                _digests.pop(next(iter(_digests)), None)
            _digests[before] = found
    return found


def read_ahead(paths: Iterable[Path], is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Have the system read files into its memory, for those who will read them: 2 GiB at most.

    Whoever computes between two reads leaves the disk idle meanwhile. Here nothing is copied, so that it
    takes next to no time of a core: 14 ms for 0.5 GB, which two readers then had in 0.26 s instead of 0.33.
    Does nothing where a system cannot do it, or a file cannot be read.
    """
    left = _MAX_AHEAD_BYTES
    with suppress(OSError), Path(os.devnull).open("wb", buffering=0) as nowhere:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                at = 0
                while is_wanted():
                    count = os.sendfile(nowhere.fileno(), file.fileno(), at, min(_AHEAD_CHUNK_BYTES, left))
                    # The file's end, or no more is to be read.
                    if not count:
                        break
                    at, left = at + count, left - count


def hash_files(files: Mapping[str, Path], on_progress: OnProgress | None = None) -> dict[str, str]:
    """SHA-256 of each file by its path, without the manifest's own; raises as `digest_files`."""
    return {path: found[SHA256] for path, found in digest_files(files, on_progress).items()}


def digest_files(
    files: Mapping[str, Path],
    on_progress: OnProgress | None = None,
    kinds_of: Callable[[str], Iterable[str]] = lambda path: (SHA256,),
) -> dict[str, Digests]:
    """Digests of each file by its path, of at least those kinds, without the manifest's own.

    Raises:
        CheckpointError: a file cannot be read.
    """
    mine = {name: path for name, path in files.items() if name != MANIFEST_FILE}
    found: dict[str, Digests] = {}
    try:
        num_total = sum(path.stat().st_size for path in mine.values())
        num_done = 0

        def count(num_bytes: int) -> None:
            nonlocal num_done
            num_done += num_bytes
            if on_progress is not None:
                on_progress(num_done, num_total)

        for name, path in mine.items():
            found[name] = digests_of(path, kinds_of(name), count)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    return found


def content_version(files: Mapping[str, Path], on_progress: OnProgress | None = None) -> str:
    """A short name for what files hold; raises as `digest_files`."""
    is_done = threading.Event()
    ahead = threading.Thread(
        target=read_ahead, args=(list(files.values()), lambda: not is_done.is_set()), daemon=True
    )
    ahead.start()
    try:
        return version_of(digest_files(files, on_progress, lambda path: (BLAKE3,)))
    finally:
        is_done.set()
        ahead.join()


def version_of(digests: Mapping[str, Digests]) -> str:
    """The same of files whose BLAKE3 are known: digits of a hash over all paths and these."""
    lines = "".join(f"{found[BLAKE3]}  {path}\n" for path, found in sorted(digests.items()))
    return str(blake3(lines.encode()).hexdigest()[:SHORT_DIGITS])


@dataclass(frozen=True, slots=True)
class FileState:
    """What the file system says of a file's content without reading it.

    The time of the last change of the file's entry is told too: it cannot be set back, as `mtime_ns` can.
    """

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int


# Of files as they were, the oldest first.
_digests: dict[FileState, Digests] = {}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All files of a directory at one moment."""

    directory: Path
    root: Path
    files: Mapping[str, FileState]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(state.num_bytes for state in self.files.values())

    def require_unchanged(self) -> None:
        """Look again, after loading for instance.

        Raises:
            CheckpointError: a file was added, removed, replaced or written to; says which.
        """
        now = take_snapshot(self.directory, self.root).files
        for path in sorted({*now, *self.files}):
            if now.get(path) != self.files.get(path):
                verb = "appeared" if path not in self.files else "vanished" if path not in now else "changed"
                raise CheckpointError(f"`{self.directory}`: {path} {verb} after it was verified")


def take_snapshot(directory: Path, root: Path | None = None) -> Snapshot:
    """The state of all files now; raises `CheckpointError` as `list_files` does, or if one vanishes."""
    files = list_files(directory, root)
    return Snapshot(directory, root or directory, {name: _state(path) for name, path in files.items()})


def _judge(path: Path, limit: Path) -> bool:
    """Whether it is a file, not a directory; raises `CheckpointError` if it is neither, or not ours."""
    name = path.name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        raise CheckpointError(f"{name} is a broken link, or is vanishing") from None
    if path.is_symlink():
        if not target.is_relative_to(limit):
            raise CheckpointError(f"{name} is a link that leads out of {limit}")
        if not S_ISREG(mode):
            raise CheckpointError(f"{name} is a link to something else than a file")
    if not S_ISREG(mode):
        if target.is_dir():
            return False
        raise CheckpointError(f"{name} is neither a file nor a directory")
    # A link must not give a harmless name to what is refused.
    for each in (path, target):
        if reason := _REFUSED.get(each.suffix.lower()):
            raise CheckpointError(f"{name} {reason}, which an aligner must not bring; remove or convert it")
    return True


def _state(path: Path) -> FileState:
    try:
        return _state_of(path.stat())
    except OSError:
        raise CheckpointError(f"{path.name} has vanished") from None


def _state_of(stat: os.stat_result) -> FileState:
    return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)


def _raise(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}")
