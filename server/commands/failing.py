"""How a command gives up."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(reason: object) -> NoReturn:
    """One line on stderr, and exit code 1."""
    typer.echo(f"ram: {' '.join(str(reason).split())}", err=True)
    raise typer.Exit(1)
