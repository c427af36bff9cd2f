"""What is known of aligners before the engine starts, and which of them it starts with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ram_core.aligners.directory import AlignersDirectory
from ram_core.aligners.states import VersionKey
from ram_core.engine.config import AlignerSource
from ram_core.errors import CheckpointError
from server.aligners.checking import Checker
from server.aligners.known import KnownVersion, Origin, from_directory, from_settings

ALL = "all"
"""Where names of aligners are given, every one that is there."""
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found: the versions of a name in the order in which they are to be made known.

    The first version of a name answers its requests. `loaded_names` are in memory from the start; of these
    the engine cannot do without what the settings name. `unsound` says why a version must not be served.
    """

    versions: tuple[KnownVersion, ...] = ()
    loaded_names: tuple[str, ...] = ()
    directory: AlignersDirectory | None = None
    unsound: Mapping[VersionKey, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners, each once."""
        return tuple(dict.fromkeys(known.key.name for known in self.versions))

    @property
    def loaded(self) -> tuple[KnownVersion, ...]:
        """The versions that answer for what is loaded from the start."""
        first: dict[str, KnownVersion] = {}
        for known in self.versions:
            first.setdefault(known.key.name, known)
        return tuple(first[name] for name in self.loaded_names)

    def sources(self) -> tuple[AlignerSource, ...]:
        """What the engine starts with."""
        return tuple(
            AlignerSource(model, directory, required=known.origin is Origin.SETTINGS)
            for known in self.loaded
            for model, directory in known.parts
        )


def take_inventory(aligners: Mapping[str, str], directory: Path | None, preload: Iterable[str]) -> Inventory:
    """Look at what the settings name, and at what is in the directory; `preload` has names in it, or "all".

    Reads files whole only where there is no manifest to tell the version.

    Raises:
        CheckpointError: one that is named cannot be read, or the directory cannot.
    """
    given = [from_settings(name, source) for name, source in aligners.items()]
    watched = AlignersDirectory(directory) if directory is not None else None
    found: list[KnownVersion] = []
    if watched is not None and directory is not None:
        watched.poll(is_settled=True)
        found = [from_directory(each, directory) for each in watched.known]
    taken = {known.key for known in given}
    found = sorted((known for known in found if known.key not in taken), key=_newest_last, reverse=True)
    found.sort(key=lambda known: known.key.name)
    names = dict.fromkeys(known.key.name for known in found)
    wanted = list(names) if ALL in (preload := list(preload)) else preload
    if missing := [name for name in wanted if name not in names and name not in aligners]:
        raise CheckpointError(f"`preload`: there is no aligner `{missing[0]}` in {directory}")
    loaded = dict.fromkeys([*aligners, *wanted])
    return Inventory((*given, *found), tuple(loaded), watched)


def check_inventory(inventory: Inventory, checker: Checker) -> Inventory:
    """Verify what is loaded from the start; what is not required may be unsound.

    Raises:
        CheckpointError: a version that the settings name cannot be served.
    """
    unsound: dict[VersionKey, str] = {}
    for known in inventory.loaded:
        try:
            checker.check(known)
            checker.require_unchanged(known)
        except CheckpointError as error:
            if known.origin is Origin.SETTINGS:
                raise
            unsound[known.key] = str(error)
    return replace(inventory, unsound=unsound)


def _newest_last(known: KnownVersion) -> list[tuple[bool, int, str]]:
    """As people count: 9 before 10, and dates by their parts."""
    pieces = _DIGITS.split(known.key.version)
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]
