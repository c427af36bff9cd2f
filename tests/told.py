"""The table of faults: what was done, what clients saw, how long it took to mend, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass, field

_HEADS = ("fault", "clients saw", "seconds to recovery", "lost")


@dataclass
class Table:
    """Rows in the order in which faults were injected."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, fault: str, saw: str, recovery_s: float | None, lost: str) -> None:
        """`recovery_s` is from the fault until all was well again; None if nothing had to mend."""
        self.rows.append((fault, saw, "-" if recovery_s is None else f"{recovery_s:.1f}", lost))

    def __bool__(self) -> bool:
        return bool(self.rows)

    def lines(self) -> list[str]:
        """The table in Markdown."""
        return [f"| {' | '.join(row)} |" for row in (_HEADS, ("---",) * 4, *self.rows)]


TABLE = Table()
