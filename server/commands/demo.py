"""`ram demo`: rebuild the embedded bundle, and measure it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer

from ram_core.demo import bundle_path
from ram_core.demo.data import write_demo_data
from ram_core.demo.evaluate import evaluate_bundle
from ram_core.progress import terminal_progress


def build(out: Path | None, seed: int, work: Path | None) -> None:
    """Train a bundle into `out`, by default in place of the embedded one; runs in `work` go on."""
    from ram_core.demo.build import build_bundle

    target = out or bundle_path()
    with terminal_progress() as show:
        build_bundle(target, seed=seed, work=work, on_progress=show)
    typer.echo(f"Built {target}")


def data(out: Path, num_prompts: int, max_held_out: int, seed: int) -> None:
    """Write the demo's data and models to `out`, and tell how to train with them."""
    write_demo_data(out, num_prompts=num_prompts, max_held_out=max_held_out, seed=seed)
    typer.echo(f"Wrote {out}. Now, for example:")
    typer.echo(
        f"  ram train --proposal {out}/proposal --model {out}/aligner-base --data {out}/pirate.train.jsonl"
        f" --name pirate --output runs/pirate --set fit.learning_rate=1e-3 --set fit.batch_size=32"
    )


def evaluate(bundle: Path | None, *, is_json: bool) -> bool:
    """Print the report; return whether every bar is met."""
    with terminal_progress() as show:
        report = evaluate_bundle(bundle, on_progress=show)
    typer.echo(json.dumps(dataclasses.asdict(report), indent=2) if is_json else report.render())
    for failure in report.failures():
        typer.echo(failure, err=True)
    return not report.failures()
