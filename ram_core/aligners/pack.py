"""Writing an aligner's manifest: what its files are now, and what it is to be served with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ram_core.aligners.files import (
    BLAKE3,
    SHA256,
    OnProgress,
    digest_files,
    list_files,
    resolve_below,
    version_of,
)
from ram_core.aligners.manifest import (
    OWN_TERMS,
    FileRecord,
    Manifest,
    Term,
    read_manifest,
    write_manifest,
)
from ram_core.errors import CheckpointError
from ram_core.models.lora import is_adapter, read_lora_config
from ram_core.models.source import one_line
from ram_core.models.vocabulary import fingerprint, load_tokenizer
from ram_core.params import Resampling


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a manifest is to say. None leaves what an earlier one said, or else the default.

    `version` None takes the earlier one if its files are still the same, and else a hash of the files.
    `provenance` is added to what was there; a `kl_threshold` of infinity is no gate.
    """

    name: str | None = None
    version: str | None = None
    terms: tuple[Term, ...] | None = None
    strength: float | None = None
    resampling: Resampling | None = None
    kl_threshold: float | None = None
    candidates: int | None = None
    license: str | None = None
    provenance: Mapping[str, str] | None = None


def pack(directory: Path, wishes: Wishes, on_progress: OnProgress | None = None) -> Manifest:
    """Write the manifest of a directory, with its files' hashes and its tokenizer's fingerprint.

    Raises:
        CheckpointError: there is something that an aligner must not have, or a wish that no manifest grants.
    """
    if not directory.is_dir():
        raise CheckpointError(f"`{directory}`: no such directory")
    before = read_manifest(directory)
    paths = list_files(directory)
    digests = digest_files(paths, on_progress, lambda path: (SHA256, BLAKE3))
    files = {
        path: FileRecord(found[SHA256], paths[path].stat().st_size, found[BLAKE3])
        for path, found in digests.items()
    }
    said = {field: getattr(before, field) for field in Manifest.__struct_fields__} if before else {}
    said |= {name: wish for name in _PLAIN_WISHES if (wish := getattr(wishes, name)) is not None}
    said.setdefault("name", directory.resolve().name)
    said["provenance"] = {**said.get("provenance", {}), **(wishes.provenance or {})}
    is_same = before is not None and _hashes(before.files) == _hashes(files)
    if wishes.version is None and not is_same:
        said["version"] = version_of(digests)
    if said.get("kl_threshold") == math.inf:
        said["kl_threshold"] = None
    terms = said.get("terms", OWN_TERMS)
    tokenizer = _fingerprint(directory, terms) or said.get("tokenizer", "")
    try:
        manifest = msgspec.convert(
            msgspec.to_builtins(said | {"files": files, "tokenizer": tokenizer}), Manifest
        )
        write_manifest(directory, manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"`{directory}`: {one_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"`{directory}`: the manifest cannot be written: {error.strerror}") from None
    return manifest


_PLAIN_WISHES = (
    "name",
    "version",
    "terms",
    "strength",
    "resampling",
    "kl_threshold",
    "candidates",
    "license",
)


def _hashes(files: Mapping[str, FileRecord]) -> dict[str, str]:
    """What every manifest has of a file, also one of before there was BLAKE3."""
    return {path: record.sha256 for path, record in files.items()}


def _fingerprint(directory: Path, terms: tuple[Term, ...]) -> str:
    """The tokenizer's of its first model that is on this disk; "" if there is none."""
    for term in terms:
        if term.is_own:
            source = str(resolve_below(directory, term.model) if term.is_below else directory)
            if is_adapter(source):
                source = read_lora_config(source).tokenizer_source
            if Path(source).is_dir():
                return fingerprint(load_tokenizer(source))
    return ""
