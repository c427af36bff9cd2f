"""What verification found. Never imports torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ram_core.aligners.files import Snapshot
from ram_core.aligners.manifest import Manifest
from ram_core.errors import CheckpointError, VocabularyMismatch


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what came out, in words, and how long it took."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """All checks of a directory, in order.

    `manifest` is its own or what holds without one, None if that is broken; `snapshot` is what its files
    were before anything was read, None if they could not be listed. `fingerprint` is its tokenizer's, "" if
    it has none that can be read.
    """

    directory: Path
    has_manifest: bool
    manifest: Manifest | None
    snapshot: Snapshot | None
    fingerprint: str
    checks: tuple[Check, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome is not Outcome.FAILED for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """What failed, a line each."""
        return tuple(check.detail for check in self.checks if check.outcome is Outcome.FAILED)

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(check.seconds for check in self.checks)

    def require_sound(self) -> None:
        """Raise `CheckpointError` for the first failure, `VocabularyMismatch` if it is the vocabulary's."""
        for check in self.checks:
            if check.outcome is Outcome.FAILED:
                error = VocabularyMismatch if check.name == "vocabulary" else CheckpointError
                named = f"`{self.directory}`"
                raise error(check.detail if named in check.detail else f"{named}: {check.detail}")


@dataclass
class CheckLog:
    """Writes down checks as they are made."""

    checks: list[Check] = field(default_factory=list)

    @contextmanager
    def check(self, name: str, success: str) -> Iterator[list[str]]:
        """Time a block. Words appended to the list replace `success`; a `CheckpointError` is a failure."""
        words: list[str] = []
        start_s = time.perf_counter()
        outcome = Outcome.PASSED
        try:
            yield words
        except CheckpointError as error:
            outcome, words = Outcome.FAILED, [str(error)]
        detail = words[-1] if words else success
        self.checks.append(Check(name, outcome, detail, time.perf_counter() - start_s))

    def skip(self, name: str, reason: str) -> None:
        """Write down that something was not looked at."""
        self.checks.append(Check(name, Outcome.SKIPPED, reason, 0.0))

    @property
    def has_failed(self) -> bool:
        """Whether the last check failed."""
        return bool(self.checks) and self.checks[-1].outcome is Outcome.FAILED
