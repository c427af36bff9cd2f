"""What is known of an aligner's version before it is loaded: where its files are, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ram_core.aligners.directory import FoundVersion
from ram_core.aligners.files import content_version, list_files, resolve_below
from ram_core.aligners.manifest import Manifest, default_manifest, read_manifest
from ram_core.aligners.names import CONFIG_FILES, MANIFEST_FILE, SELF
from ram_core.aligners.states import VersionKey
from ram_core.errors import CheckpointError
from ram_core.models.source import fetch_from_hub, resolve_source

_HUB_SNAPSHOTS = "snapshots"
_HUB_DIGITS = 12


class Origin(StrEnum):
    """Who made a version known: the command line, the watched directory, or an administrator."""

    SETTINGS = "settings"
    DIRECTORY = "directory"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """A version, and its files. `root` is where links may lead; None keeps them inside."""

    key: VersionKey
    directory: Path
    manifest: Manifest
    origin: Origin
    root: Path | None = None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """The engine's name for each of its own models, and the directory that it is in."""
        return tuple(
            (model_name(self.key, term.model), str(self.directory / term.model.removeprefix(SELF)))
            for term in self.manifest.terms
            if term.is_own
        )


def model_name(key: VersionKey, part: str) -> str:
    """What the engine calls a model of a version: NAME@VERSION, or NAME@VERSION/PART for one further down."""
    path = part.removeprefix("./")
    return str(key) if path in (SELF, ".") else f"{key}/{path}"


def key_of(model: str) -> VersionKey:
    """The version that a model's name, or an aligner's, is of."""
    name, _, rest = model.rpartition("@")
    return VersionKey(name, rest.partition("/")[0])


def from_settings(name: str, source: str) -> KnownVersion:
    """The version at a local directory or hub id; without a manifest, its files' hash or the hub's commit.

    Raises:
        CheckpointError: there is no such directory, or it cannot be told what it is.
    """
    directory = resolve_source(source, with_weights=True)
    root = directory.parent.parent if _is_hub_snapshot(directory) else None
    return read_known(name, directory, root, Origin.SETTINGS)


def from_directory(found: FoundVersion, root: Path) -> KnownVersion:
    """What the watched directory has found."""
    key = VersionKey(found.name, found.version)
    return KnownVersion(key, found.directory, found.manifest, Origin.DIRECTORY, root)


def below(name: str, path: str, root: Path) -> KnownVersion:
    """The version at a path below the aligners' directory, for an administrator.

    Raises:
        CheckpointError: the path is not the plain way to a directory there, a link in it leads elsewhere, or
            what is there cannot be an aligner.
    """
    try:
        directory = resolve_below(root, path)
        is_there = directory.is_dir() and directory.resolve().is_relative_to(root.resolve())
    except (CheckpointError, OSError):
        is_there = False
    if not is_there:
        # The same words for what is not there and what must not be looked at.
        raise CheckpointError(f"`{path[:200]}`: no such directory below that of the aligners")
    return read_known(name, directory, root, Origin.ADMIN)


def from_hub(name: str, hub_id: str) -> KnownVersion:
    """The version that the hub gives now, for an administrator; raises `CheckpointError` if it gives none."""
    directory = fetch_from_hub(hub_id)
    return read_known(name, directory, directory.parent.parent, Origin.ADMIN)


def read_known(name: str, directory: Path, root: Path | None, origin: Origin) -> KnownVersion:
    """Read the manifest, or make what holds without one.

    Raises:
        CheckpointError: that cannot be, or there are files that no aligner may bring.
    """
    files = list_files(directory, root)
    manifest = read_manifest(directory)
    if manifest is None:
        if files.keys().isdisjoint(CONFIG_FILES):
            raise CheckpointError(f"`{directory}` has no {', '.join(CONFIG_FILES)} or {MANIFEST_FILE}")
        if _is_hub_snapshot(directory):
            version = directory.name[:_HUB_DIGITS]
        else:
            version = content_version(files)
        manifest = default_manifest(name, version)
    return KnownVersion(VersionKey(name, manifest.version), directory, manifest, origin, root)


def _is_hub_snapshot(directory: Path) -> bool:
    """Whether the hub's cache has it, where files are links to blobs that snapshots share."""
    return directory.parent.name == _HUB_SNAPSHOTS and (directory.parent.parent / "blobs").is_dir()
