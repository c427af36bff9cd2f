"""Results as text in README.md, between two comments each: no figure there is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.tables import markdown

# <!-- results NAME --> … <!-- end -->, where NAME is that of a file of results without its `.json`.
_PLACE = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """The text with every place filled from its file; "Not measured yet." where there is none."""

    def place(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        filled = "Not measured yet."
        if path.is_file():
            filled = markdown(json.loads(path.read_text(encoding="utf-8")))
        return f"{match[1]}\n{filled}\n\n{match[3]}"

    return _PLACE.sub(place, text)


def rewrite(readme: Path, results: Path) -> None:
    """Fill a file's places where it lies."""
    readme.write_text(fill(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
