"""One-line breaks of the code that its tests must notice, one list a layer: `python -m tests.mutants`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; one of `tests` (paths, as pytest takes them) must notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()}  →  {self.new.strip()}".replace("\n", "⏎")


def mutants(file: str, tests: str | tuple[str, ...], *changes: tuple[str, str]) -> list[Mutant]:
    """Several breaks of one file that the same tests notice."""
    noticing = (tests,) if isinstance(tests, str) else tests
    return [Mutant(file, old, new, noticing) for old, new in changes]
