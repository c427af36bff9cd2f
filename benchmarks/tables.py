"""What a run leaves behind: claims with what was expected of them, tables, and one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure that a command is there to measure: what was expected before, and what it must reach."""

    name: str
    expected: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bar(self) -> str:
        parts = [f"≥ {show(self.at_least)}"] if self.at_least is not None else []
        parts += [f"≤ {show(self.at_most)}"] if self.at_most is not None else []
        return ", ".join(parts) or "–"

    def holds(self, measured: float) -> bool:
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= measured <= high


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """A table in Markdown, text to the left, numbers to the right."""
        is_text = [all(isinstance(row[at], str) for row in self.rows) for at in range(len(self.columns))]
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_line(self.columns))
        lines.append("|" + "|".join("---" if left else "---:" for left in is_text) + "|")
        return "\n".join(lines + [_line(map(show, row)) for row in self.rows])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command measured: its tables, and the figures of its claims by their names.

    A claim without a figure was not measured in this run. `notes` tell what a reader must know.
    """

    tables: Sequence[Table]
    figures: Mapping[str, float]
    notes: Sequence[str] = ()


def show(value: Cell) -> str:
    """A cell as text: three significant digits, but whole numbers whole."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return str(value)


def claims_table(claims: Sequence[Claim], figures: Mapping[str, float]) -> Table:
    """Claims beside what was measured.

    Raises:
        KeyError: a figure that no claim names.
    """
    unknown = set(figures) - {claim.name for claim in claims}
    if unknown:
        raise KeyError(f"no claim is called {sorted(unknown)}")
    rows: list[list[Cell]] = []
    for claim in claims:
        measured = figures.get(claim.name)
        verdict = "not measured" if measured is None else "yes" if claim.holds(measured) else "no"
        has_bar = claim.bar != "–" or measured is None
        rows.append([claim.name, claim.bar, claim.expected, measured, verdict if has_bar else "–"])
    return Table("Claims", ["claim", "bar", "predicted", "measured", "holds"], rows)


def document(
    name: str,
    environment: Mapping[str, str],
    options: Mapping[str, Any],
    claims: Sequence[Claim],
    found: Outcome,
) -> dict[str, Any]:
    """Everything about a run, ready for JSON."""
    return {
        "benchmark": name,
        "environment": dict(environment),
        # Where files lie on the machine is nobody's business.
        "options": {key: value for key, value in options.items() if not isinstance(value, Path)},
        "tables": [asdict(table) for table in [*found.tables, claims_table(claims, found.figures)]],
        "notes": list(found.notes),
    }


def markdown(run: Mapping[str, Any]) -> str:
    """A document's environment, tables and notes, as they are printed and shown in README.md."""
    parts = [" · ".join(f"{name} {value}" for name, value in run["environment"].items())]
    parts += [Table(**table).markdown() for table in run["tables"]]
    parts += ["\n".join(f"- {note}" for note in run["notes"])] if run["notes"] else []
    return "\n\n".join(parts)


def write(run: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
