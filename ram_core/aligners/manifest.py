"""`aligner.json`: what an aligner says of itself. Never imports torch."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from ram_core.aligners.files import BLAKE3, SHA256, Digests, resolve_below
from ram_core.aligners.names import MANIFEST_FILE, SELF, require_name, require_version
from ram_core.errors import CheckpointError, RamError
from ram_core.models.source import one_line
from ram_core.params import MAX_CANDIDATES, MAX_STRENGTH, Resampling

SCHEMA = 1
MAX_TERMS = 32

_MAX_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BELOW = "./"


class Term(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One factor of the aligner: a model, and the exponent that it gets at strength 1.

    `model` is "self" for the model in the aligner's own directory, `./path` for one in a directory below
    it, or the name of another aligner.
    """

    model: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not -MAX_STRENGTH <= self.weight <= MAX_STRENGTH:
            raise ValueError(f"`weight` must be within ±{MAX_STRENGTH:g}, got {self.weight!r}")
        if self.is_below:
            _require_path(self.model, "model")
        elif self.model != SELF:
            require_name(self.model, "model")

    @property
    def is_below(self) -> bool:
        """Whether it names a directory below the aligner's."""
        return self.model.startswith(_BELOW)

    @property
    def is_own(self) -> bool:
        """Whether its weights come with the aligner, and not from another one."""
        return self.is_below or self.model == SELF


OWN_TERMS = (Term(SELF),)
"""What an aligner is if nothing else is said: its own model."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a file must be: its size, and its digests in hexadecimal.

    `blake3` is "" in manifests that were written before there was one. It is as hard to meet with other bytes
    as SHA-256, and takes a fraction of its time.
    """

    sha256: str
    bytes: int
    blake3: str = ""

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.sha256):
            raise ValueError(f"`sha256` must be 64 hexadecimal digits, got {self.sha256!r}")
        if self.blake3 and not _DIGEST.fullmatch(self.blake3):
            raise ValueError(f"`blake3` must be 64 hexadecimal digits, got {self.blake3!r}")
        if self.bytes < 0:
            raise ValueError(f"`bytes` must not be negative, got {self.bytes}")

    @property
    def digests(self) -> Digests:
        """All that are known; the one that is computed soonest comes first."""
        return ({BLAKE3: self.blake3} if self.blake3 else {}) | {SHA256: self.sha256}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An aligner's own description.

    `tokenizer` is the fingerprint of the proposal's tokenizer; "" if it is not known. `kl_threshold` None
    is no gate, and `candidates` None the core's number of draws in that mode. `files` has every file but
    the manifest by its relative path; empty, nothing is promised about them. `provenance` is for people.
    """

    schema: int = SCHEMA
    name: str
    version: str
    tokenizer: str = ""
    terms: tuple[Term, ...] = OWN_TERMS
    strength: float = 1.0
    resampling: Resampling = Resampling.PRODUCT
    kl_threshold: float | None = None
    candidates: int | None = None
    license: str = ""
    provenance: dict[str, str] = {}
    files: dict[str, FileRecord] = {}

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"`schema` must be {SCHEMA}, got {self.schema}")
        require_name(self.name)
        require_version(self.version)
        if self.tokenizer and not _DIGEST.fullmatch(self.tokenizer):
            raise ValueError(f"`tokenizer` must be 64 hexadecimal digits, got {self.tokenizer!r}")
        if not -MAX_STRENGTH <= self.strength <= MAX_STRENGTH:
            raise ValueError(f"`strength` must be within ±{MAX_STRENGTH:g}, got {self.strength!r}")
        if self.kl_threshold is not None and not 0 <= self.kl_threshold < math.inf:
            raise ValueError(f"`kl_threshold` must be null, or at least 0, got {self.kl_threshold!r}")
        if self.candidates is not None and not 1 <= self.candidates <= MAX_CANDIDATES:
            raise ValueError(f"`candidates` must be null, or 1 to {MAX_CANDIDATES}, got {self.candidates!r}")
        require_terms(self.name, self.terms)
        for path in self.files:
            _require_path(path, "files")
            if path.startswith(_BELOW):
                raise ValueError(f"`files`: {path!r} must not begin with {_BELOW!r}")
        if MANIFEST_FILE in self.files:
            raise ValueError(f"`files` must not list {MANIFEST_FILE} itself")

    @property
    def parts(self) -> tuple[str, ...]:
        """The directories with models of its own, relative to its own: "." and those of its terms."""
        return tuple(term.model if term.is_below else "." for term in self.terms if term.is_own)


def require_terms(name: str, terms: tuple[Term, ...]) -> None:
    """Raise ValueError unless these can be the terms of the aligner `name`."""
    models = [term.model for term in terms]
    if not 1 <= len(models) <= MAX_TERMS:
        raise ValueError(f"`terms` must be 1 to {MAX_TERMS}, got {len(models)}")
    if len(set(models)) != len(models):
        raise ValueError("`terms` must not name one model twice")
    if name in models:
        raise ValueError(f"`terms` must say {SELF!r}, not {name!r}, of the aligner's own model")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in a directory; None if it has none.

    Raises:
        CheckpointError: it is broken, or says what cannot be; one line that names the field.
    """
    path = directory / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from None
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"`{path}` is larger than {_MAX_BYTES} bytes")
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, source: str) -> Manifest:
    """The manifest that `text` is. Raises `CheckpointError` as `read_manifest` does; `source` is named."""
    try:
        raw = json.loads(text, object_pairs_hook=_without_duplicates)
        return msgspec.convert(raw, Manifest)
    # Nothing that a file holds may end in anything else than a line.
    except (ValueError, RecursionError, msgspec.MsgspecError, RamError) as error:
        raise CheckpointError(f"`{source}`: {one_line(error)}") from None


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as a file holds it: the same bytes for the same manifest."""
    compact = msgspec.json.encode(manifest, order="deterministic")
    return msgspec.json.format(compact, indent=2) + b"\n"


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Put a manifest into a directory: wholly or not at all. Raises OSError if it cannot be written."""
    path = directory / MANIFEST_FILE
    handle, name = tempfile.mkstemp(dir=directory, prefix=f".{MANIFEST_FILE}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(manifest_bytes(manifest))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def default_manifest(name: str, version: str) -> Manifest:
    """What holds for an aligner without a manifest.

    Raises:
        CheckpointError: no aligner, or no version, may be called so.
    """
    try:
        return Manifest(name=name, version=version)
    except ValueError as error:
        raise CheckpointError(one_line(error)) from None


def _require_path(path: str, field: str) -> None:
    try:
        resolve_below(Path(), path)
    except CheckpointError as error:
        raise ValueError(f"`{field}`: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` is said twice")
    return table
