"""A directory of aligners that is looked at again and again: what has come, gone and changed. No torch.

An aligner is at NAME/ or at NAME/VERSION/. What is half written is held back: until its files have the sizes
that its manifest gives, or, without a manifest that lists files, until nothing in it has changed for a while.
Whoever wants to be sure writes under a name that is passed over (`.new`, `new.partial`, `new.tmp`) and
renames. What is inside is for verification to judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ram_core.aligners.files import Snapshot, content_version, list_files, take_snapshot
from ram_core.aligners.manifest import Manifest, default_manifest, read_manifest
from ram_core.aligners.names import CONFIG_FILES, MANIFEST_FILE, is_passed_over, require_name, require_version
from ram_core.errors import CheckpointError
from ram_core.models.weight_files import INDEX_FILE, read_checkpoint_headers, read_header

DEFAULT_SETTLE_S = 2.0

_MARKS = (MANIFEST_FILE, *CONFIG_FILES)


@dataclass(frozen=True, slots=True)
class FoundVersion:
    """A version that lies complete in the directory; `manifest` is its own, or what holds without one."""

    name: str
    version: str
    directory: Path
    manifest: Manifest
    snapshot: Snapshot

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from the look before, by name and version.

    `held_back` says of every directory that is not taken as it is now why that is so.
    """

    appeared: tuple[FoundVersion, ...] = ()
    vanished: tuple[FoundVersion, ...] = ()
    changed: tuple[FoundVersion, ...] = ()
    held_back: Mapping[Path, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.appeared or self.vanished or self.changed)


@dataclass(frozen=True, slots=True)
class _Sighting:
    """A state of files, and since when they have been in it."""

    snapshot: Snapshot
    since_s: float


class AlignersDirectory:
    """The aligners below `root`, as of the last `poll`. Not for several threads at once."""

    def __init__(
        self,
        root: Path,
        *,
        settle_s: float = DEFAULT_SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self._settle_s = settle_s
        self._clock = clock
        self._known: dict[Path, FoundVersion] = {}
        self._sightings: dict[Path, _Sighting] = {}

    @property
    def known(self) -> tuple[FoundVersion, ...]:
        """All complete versions, by name and version. One that is being rewritten is still what it was."""
        return tuple(sorted(self._known.values(), key=lambda found: found.key))

    def poll(self, *, is_settled: bool = False) -> Changes:
        """Look again. With `is_settled`, as at a start, what is there counts as unchanged for long.

        Reads the whole of a directory once if it needs a hash for a version: at NAME/ without a manifest.

        Raises:
            CheckpointError: `root` cannot be read; what was known stays known.
        """
        settle_s = 0.0 if is_settled else self._settle_s
        held_back: dict[Path, str] = {}
        found: dict[Path, FoundVersion] = {}
        candidates = list(self._candidates(held_back))
        for path, name, version in candidates:
            try:
                found[path] = self._complete(path, name, version, settle_s)
            except (CheckpointError, ValueError, OSError) as error:
                held_back[path] = str(error)
        for path, known in self._known.items():
            # While something is rewritten, or cannot be read, it is what it was.
            if path not in found and (path in held_back or path.parent in held_back):
                found[path] = known
        self._sightings = {path: seen for path, seen in self._sightings.items() if path in found | held_back}
        before = {each.key: each for each in self._known.values()}
        after = {each.key: each for each in found.values()}
        self._known = found
        return Changes(
            appeared=tuple(each for key, each in after.items() if key not in before),
            vanished=tuple(each for key, each in before.items() if key not in after),
            changed=tuple(
                each for key, each in after.items() if key in before and each.snapshot != before[key].snapshot
            ),
            held_back=held_back,
        )

    def _candidates(self, held_back: dict[Path, str]) -> Iterator[tuple[Path, str, str]]:
        """Path, name and version ("" if the path does not say) of all that could be an aligner."""
        try:
            folders = _folders(self.root)
        except OSError as error:
            raise CheckpointError(f"`{self.root}` cannot be read: {error.strerror}") from None
        for folder in folders:
            try:
                require_name(folder.name)
                self._require_below(folder)
                if any((folder / mark).exists() for mark in _MARKS):
                    yield folder, folder.name, ""
                    continue
                inside = _folders(folder)
            except (CheckpointError, ValueError, OSError) as error:
                held_back[folder] = str(error)
                continue
            for each in inside:
                yield each, folder.name, each.name

    def _require_below(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise CheckpointError(f"it is a link that leads out of `{self.root}`")

    def _complete(self, path: Path, name: str, version: str, settle_s: float) -> FoundVersion:
        """The version at a path; raises an error that says why it is not taken."""
        if version:
            require_version(version)
        self._require_below(path)
        snapshot = take_snapshot(path, self.root)
        known = self._known.get(path)
        if known is not None and known.snapshot == snapshot:
            return known
        seen = self._sightings.get(path)
        if seen is None or seen.snapshot != snapshot:
            seen = self._sightings[path] = _Sighting(snapshot, self._clock())
        if not any(mark in snapshot.files for mark in _MARKS):
            raise CheckpointError("it has no config.json, adapter_config.json or aligner.json")
        manifest = read_manifest(path)
        if manifest is not None and manifest.files:
            _require_sizes(manifest, snapshot)
        else:
            _require_whole(path, snapshot, has_manifest=manifest is not None)
            if self._clock() - seen.since_s < settle_s:
                raise CheckpointError("it may still be written: it changed a moment ago")
        if manifest is None:
            manifest = default_manifest(name, version or self._content_version(path, snapshot))
        if (manifest.name, manifest.version) != (name, version or manifest.version):
            raise CheckpointError(
                f"its manifest is of `{manifest.name}` {manifest.version}, "
                f"but its path says `{name}` {version}".rstrip()
            )
        return FoundVersion(name, manifest.version, path, manifest, snapshot)

    def _content_version(self, path: Path, snapshot: Snapshot) -> str:
        version = content_version(list_files(path, self.root))
        snapshot.require_unchanged()
        return version


def _folders(path: Path) -> list[Path]:
    """The directories in a directory that are not passed over, by name."""
    return sorted(each for each in path.iterdir() if each.is_dir() and not is_passed_over(each.name))


def _require_sizes(manifest: Manifest, snapshot: Snapshot) -> None:
    for path, record in manifest.files.items():
        state = snapshot.files.get(path)
        if state is None:
            raise CheckpointError(f"{path} is not there yet")
        if state.num_bytes != record.bytes:
            raise CheckpointError(f"{path} has {state.num_bytes} of {record.bytes} bytes")


def _require_whole(path: Path, snapshot: Snapshot, *, has_manifest: bool) -> None:
    """Weights say themselves how long they are, and an index says which files there should be."""
    for name in snapshot.files:
        if name.endswith(".safetensors"):
            read_header(path / name)
        if name == INDEX_FILE or name.endswith(f"/{INDEX_FILE}"):
            read_checkpoint_headers((path / name).parent)
    if not has_manifest and not any(name.endswith(".safetensors") for name in snapshot.files):
        raise CheckpointError("it has no weights yet")
