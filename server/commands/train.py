"""`ram train`: a training run from a config file and flags, and what to do with what came of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import typer

from ram_core.progress import terminal_progress
from ram_core.training.config import STAGES, Stage, parse_setting, read_config
from ram_core.training.errors import ConfigError
from ram_core.training.stages import ProcessGroup, RunReport, StageReport, run_stages

_FIGURES = {
    "num_answers": "answers",
    "num_sampled": "sampled just now",
    "steps": "updates",
    "loss": "loss",
    "wanted_nats_per_token": "-log Q of a wanted token",
    "proposed_nats_per_token": "of a proposed one",
}
_OUTCOMES = {"done": "done", "resumed": "resumed and done", "kept": "was done already"}


def run(
    config: Path | None,
    flags: Mapping[str, str | None],
    settings: Sequence[str],
    stages: Sequence[str],
    *,
    restart: bool,
    install: Path | None,
    is_json: bool,
) -> None:
    """Run the stages and print what lies where. Flags go over the file, `settings` over both.

    Raises what `run_stages` raises, and `ConfigError` for what cannot be in the file or in a flag.
    """
    given = [(name, value) for name, value in flags.items() if value is not None]
    wanted = read_config(config, [*given, *map(parse_setting, settings)])
    is_main = ProcessGroup().is_main
    try:
        with terminal_progress() as show:
            report = run_stages(
                wanted, _stages(stages), restart=restart, install_into=install, on_progress=show
            )
    except KeyboardInterrupt:
        if is_main:
            typer.echo("ram: interrupted; the same command goes on from what is saved", err=True)
        raise typer.Exit(130) from None
    if is_main:
        typer.echo(json.dumps(_as_json(report), indent=2) if is_json else "\n".join(_lines(report)))


def _stages(names: Sequence[str]) -> list[Stage]:
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"`--stage` must be one of {', '.join(STAGES)}, got {name!r}")
    return [cast(Stage, name) for name in names]


def _lines(report: RunReport) -> list[str]:
    lines = [f"data: {note}" for note in report.notes]
    lines += [_stage_line(stage) for stage in report.stages]
    if report.aligner is not None:
        lines.append(f"aligner `{report.name}` {report.version}: {report.aligner}")
    if report.installed is not None:
        lines.append(f"installed: {report.installed}")
    if report.aligner is not None:
        words = ["ram", "serve", report.proposal, "--aligner", f"{report.name}={report.aligner}"]
        lines.append(f"Serve it: {shlex.join(words)}")
    return lines


def _stage_line(stage: StageReport) -> str:
    took = "" if stage.outcome == "kept" else f" in {stage.seconds:,.1f} s"
    figures = ", ".join(_figures(stage.summary))
    return f"{stage.stage}: {_OUTCOMES[stage.outcome]}{took}{f' ({figures})' if figures else ''}"


def _figures(summary: Mapping[str, Any]) -> list[str]:
    """The numbers of a summary that people look for."""
    found = {**summary, **summary.get("metrics", {})}
    return [f"{words} {found[name]:,.6g}" for name, words in _FIGURES.items() if name in found]


def _as_json(report: RunReport) -> dict[str, Any]:
    paths = {"output": report.output, "aligner": report.aligner, "installed": report.installed}
    return {
        **{name: None if path is None else str(path) for name, path in paths.items()},
        "proposal": report.proposal,
        "name": report.name,
        "version": report.version,
        "notes": list(report.notes),
        "stages": [
            {"stage": each.stage, "outcome": each.outcome, "seconds": each.seconds, **each.summary}
            for each in report.stages
        ],
    }
