"""What commands print: tables whose words come from files and servers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

_MIN_COLUMNS = 100


def make_console(*, stderr: bool = False) -> Console:
    """A console that is wide enough for tables, also where nobody looks."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, stderr=stderr)
    console.width = max(console.width, _MIN_COLUMNS)
    return console


def new_table(*headings: str) -> Table:
    """An empty table; without headings, they are not shown."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """A row whose words come from elsewhere: none of them is markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))


def finite(value: float | None) -> float | None:
    """A number as JSON can hold it: null for what is not finite."""
    return value if value is not None and math.isfinite(value) else None
