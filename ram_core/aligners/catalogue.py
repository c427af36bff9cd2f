"""Aligners by name: their versions, which of them answers new requests, and what a name comes to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ram_core.aligners.manifest import Term, require_terms
from ram_core.aligners.names import SELF, require_name, require_version
from ram_core.aligners.shares import choose
from ram_core.aligners.states import AskedAligner, Resolution, ResolvedTerm, State, Version, VersionKey
from ram_core.errors import Conflict, InvalidRequest, UnknownModel
from ram_core.params import MAX_STRENGTH

MAX_EARLIER = 8
MAX_FOLLOWED = 128

Shares = Mapping[str, float]
"""Versions and their parts of new requests, which add up to 1."""


@dataclass(slots=True)
class Entry:
    """An aligner. `shares` is replaced as a whole, never edited; `earlier` has the last one last."""

    name: str
    versions: dict[str, Version] = field(default_factory=dict)
    shares: Shares = field(default_factory=dict)
    earlier: list[Shares] = field(default_factory=list)

    def move_to(self, shares: Shares, *, is_step_back: bool = False) -> set[str]:
        """Let other versions answer new requests; return those that no longer do."""
        left = set(self.shares) - set(shares)
        if shares == self.shares:
            return left
        if is_step_back:
            self.earlier.pop()
        elif self.shares:
            self.earlier = [*self.earlier, self.shares][-MAX_EARLIER:]
        self.shares = shares
        return left

    def known(self, version: str) -> Version:
        """A version that can be promoted or loaded.

        Raises:
            UnknownModel: there is none.
        """
        found = self.versions.get(version)
        if found is None or (found.is_withdrawn and (found.is_leaving or not found.is_loaded)):
            raise UnknownModel(f"The aligner `{self.name}` has no version `{version}`.")
        return found


class Catalogue:
    """All entries. Decides nothing about memory.

    `restless` has every version that may have to be freed, put to rest or forgotten, so that nobody need look
    at all of them.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.restless: set[VersionKey] = set()
        self._names: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Version]:
        for entry in self.entries.values():
            yield from entry.versions.values()

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners that answer requests, as they were made known; the same object until they change."""
        if self._names is None:
            self._names = tuple(name for name, entry in self.entries.items() if entry.shares)
        return self._names

    def entry(self, name: str) -> Entry:
        """The aligner of a name; raises `UnknownModel` if none has it."""
        if name not in self.entries:
            raise UnknownModel(f"There is no aligner `{name}`.")
        return self.entries[name]

    def find(self, key: VersionKey) -> Version | None:
        """A version, also one that has been withdrawn but is still in memory; None if there is none."""
        entry = self.entries.get(key.name)
        return entry.versions.get(key.version) if entry else None

    def version(self, key: VersionKey) -> Version:
        """A version that is known to be there."""
        return self.entries[key.name].versions[key.version]

    def add(self, key: VersionKey, source: str, terms: tuple[Term, ...], strength: float) -> Version:
        """Make a version known, or known anew; the first of an aligner answers its requests at once.

        Raises:
            InvalidRequest: a name, version, term or strength that cannot be.
        """
        try:
            require_name(key.name)
            require_version(key.version)
            require_terms(key.name, terms)
        except ValueError as error:
            raise InvalidRequest(f"{error}.") from None
        entry = self.entries.setdefault(key.name, Entry(key.name))
        version = entry.versions.setdefault(key.version, Version(key, source))
        if version.is_virtual or not (version.is_busy or version.is_loaded):
            version.terms = terms
            version.rest()
            if version.is_virtual:
                version.state = State.RESIDENT
        elif version.terms != terms:
            raise Conflict(f"`{key}` is in memory with other terms; unload it, or add another version.")
        version.source, version.strength, version.is_withdrawn = source, strength, False
        if not entry.shares:
            entry.shares = {key.version: 1.0}
        self._names = None
        return version

    def silence(self, name: str) -> None:
        """Let an aligner answer no requests, now or after a step back."""
        entry = self.entry(name)
        entry.shares, entry.earlier = {}, []
        self._names = None

    def move(self, name: str, shares: Shares, *, is_step_back: bool) -> list[Version]:
        """Let other versions of an aligner answer new requests; return those that no longer do."""
        entry = self.entry(name)
        self._names = None
        return [entry.versions[left] for left in entry.move_to(shares, is_step_back=is_step_back)]

    def forget(self, key: VersionKey) -> None:
        """Drop a version that is not in memory, and its aligner if that has no other one."""
        entry = self.entries[key.name]
        del entry.versions[key.version]
        self.restless.discard(key)
        self._names = None
        entry.earlier = [shares for shares in entry.earlier if key.version not in shares]
        if key.version in entry.shares:
            rest = {version: share for version, share in entry.shares.items() if version != key.version}
            rest = rest or _newest(entry)
            entry.shares = normalised(rest) if rest else {}
        if not entry.versions:
            del self.entries[key.name]

    def resolve(self, aligners: Iterable[AskedAligner], sticky_key: str) -> Resolution:
        """The version of each aligner that is named, and the models and exponents that they come to.

        Exponents of one model add up.

        Raises:
            UnknownModel: nobody answers to a name.
            InvalidRequest: a preset that leads to itself, too many terms, or too large an exponent.
        """
        chosen: list[VersionKey] = []
        strengths: list[float] = []
        sum_ = _Sum()
        for asked in aligners:
            version = self._choose(asked.name, sticky_key)
            strength = asked.scale * (version.strength if asked.strength is None else asked.strength)
            chosen.append(version.key)
            strengths.append(strength)
            self._expand(version, strength, sticky_key, (asked.name,), sum_)
        return Resolution(tuple(chosen), tuple(strengths), sum_.resolved())

    def _choose(self, name: str, sticky_key: str) -> Version:
        entry = self.entry(name)
        if not entry.shares:
            raise UnknownModel(f"There is no aligner `{name}`.")
        return entry.versions[choose(entry.shares, salt=name, key=sticky_key)]

    def _expand(
        self, version: Version, strength: float, sticky_key: str, path: tuple[str, ...], sum_: _Sum
    ) -> None:
        for term in version.terms:
            exponent = strength * term.weight
            if term.is_own:
                sum_.add(version.key, "." if term.model == SELF else term.model, exponent)
                continue
            if term.model in path:
                raise InvalidRequest(f"The aligner `{term.model}` is made of itself.", param="aligners")
            sum_.count()
            inner = self._choose(term.model, sticky_key)
            self._expand(inner, exponent, sticky_key, (*path, term.model), sum_)


@dataclass(slots=True)
class _Sum:
    """Exponents by model, and how many terms were followed to get there."""

    exponents: dict[tuple[VersionKey, str], float] = field(default_factory=dict)
    num_terms: int = 0

    def add(self, key: VersionKey, part: str, exponent: float) -> None:
        self.count()
        self.exponents[key, part] = self.exponents.get((key, part), 0.0) + exponent

    def count(self) -> None:
        self.num_terms += 1
        if self.num_terms > MAX_FOLLOWED:
            raise InvalidRequest(
                f"The aligners come to more than {MAX_FOLLOWED} terms, presets counted.", param="aligners"
            )

    def resolved(self) -> tuple[ResolvedTerm, ...]:
        for (key, _), exponent in self.exponents.items():
            if not abs(exponent) <= MAX_STRENGTH:
                raise InvalidRequest(
                    f"`{key.name}` comes to the strength {exponent:g}, beyond ±{MAX_STRENGTH:g}.",
                    param="aligners",
                )
        # Also those that come to 0: they change nothing, and tell what they would say.
        return tuple(ResolvedTerm(*model, exponent) for model, exponent in self.exponents.items())


def _newest(entry: Entry) -> dict[str, float]:
    """The version that was made known last, to answer when none is left that did; none if all are going."""
    return {version: 1.0 for version, each in list(entry.versions.items())[-1:] if not each.is_withdrawn}


def normalised(weights: Mapping[str, float]) -> Shares:
    """Shares in proportion to weights.

    Raises:
        InvalidRequest: no version at all, or a weight that is not positive.
    """
    if not weights:
        raise InvalidRequest("A promotion must name a version.", param="versions")
    for version, weight in weights.items():
        if not 0 < weight < math.inf:
            raise InvalidRequest(
                f"The weight of version `{version}` must be positive, got {weight!r}.", param="versions"
            )
    total = sum(weights.values())
    return {version: weight / total for version, weight in weights.items()}
