"""`ram demo`: rebuild the embedded bundle, and measure it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer

from ram_core.demo import bundle_path
from ram_core.demo.build import build_bundle
from ram_core.demo.evaluate import evaluate_bundle
from ram_core.progress import terminal_progress


def build(out: Path | None, seed: int) -> None:
    """Train a bundle into `out`, by default in place of the embedded one."""
    target = out or bundle_path()
    with terminal_progress() as show:
        build_bundle(target, seed=seed, on_progress=show)
    typer.echo(f"Built {target}")


def evaluate(bundle: Path | None, *, is_json: bool) -> bool:
    """Print the report; return whether every bar is met."""
    with terminal_progress() as show:
        report = evaluate_bundle(bundle, on_progress=show)
    typer.echo(json.dumps(dataclasses.asdict(report), indent=2) if is_json else report.render())
    for failure in report.failures():
        typer.echo(failure, err=True)
    return not report.failures()
