"""`ram stress`: how far from the proposal a target may be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ram_core.errors import RamError
from server.commands.failing import fail
from server.commands.numbers import parse_numbers
from server.commands.tables import AsJson, add_row, finite, make_console, new_table

if TYPE_CHECKING:
    from ram_core.evaluation.ladders import Rung
    from ram_core.evaluation.stress import StressReport

DEFAULT_MAX_TOKENS = 256

_HEADINGS = ("rung", "mass", "ESS", "KL(p‖q)", "KL(π‖p)", "supported", "perplexity", "quality")


def stress(
    aligner: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=PATH…", help="One: it is pulled harder and harder. More: one a rung."),
    ] = None,
    proposal: Annotated[str, typer.Option(help="Directory or hub id of the frozen model.")] = "",
    data: Annotated[str, typer.Option(help="Prompts with wanted answers: JSONL, or hf:NAME[:CONFIG].")] = "",
    ladder: Annotated[
        Path | None, typer.Option(help="Rungs as TOML: names, data and aligners; see docs/calibration.md.")
    ] = None,
    strengths: Annotated[str, typer.Option(metavar="LIST", help="Of one aligner. Default: 0.25 to 8.")] = "",
    split: Annotated[str, typer.Option(help="Of an hf: source.")] = "test",
    max_prompts: Annotated[int, typer.Option(min=0, help="Of each rung; 0: all.")] = 0,
    judge: Annotated[str, typer.Option(metavar="MODULE:ATTRIBUTE", help="Who says what quality is.")] = "",
    temperature: Annotated[float, typer.Option(help="Of every answer.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=0, help="Of an answer; 0: as many as fit.")] = (
        DEFAULT_MAX_TOKENS
    ),
    seed: Annotated[int, typer.Option(help="The same seed, the same answers.")] = 0,
    min_mass: Annotated[float, typer.Option(help="Mean aligner mass in the nucleus.")] = 0.5,
    min_supported: Annotated[float, typer.Option(help="Share of wanted tokens that can be drawn.")] = 0.9,
    min_ess: Annotated[float, typer.Option(help="Mean effective sample size.")] = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="A picture: PNG or SVG.")] = None,
    write_ladder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure nothing: make a ladder of --data.")
    ] = None,
    is_json: AsJson = False,
) -> None:
    """Walk a ladder of targets further and further from the proposal, and name where support breaks."""
    try:
        if write_ladder is not None:
            typer.echo(f"Wrote {_write(write_ladder, data, split, max_prompts)}")
            return
        rungs = _rungs(aligner or [], data, ladder, parse_numbers("strengths", strengths, float))
        report = _run(
            rungs,
            proposal,
            {"judge": judge, "split": split, "max_records": max_prompts},
            {"temperature": temperature, "max_tokens": max_tokens, "seed": seed},
            {"min_aligner_mass": min_mass, "min_supported": min_supported, "min_ess": min_ess},
            {"device": device, "dtype": dtype},
            plot,
        )
    except (RamError, OSError) as error:
        fail(error)
    if is_json:
        typer.echo(json.dumps(_as_json(report), indent=2))
    else:
        _print(report)


def _write(directory: Path, data: str, split: str, max_records: int) -> Path:
    from ram_core.evaluation.ladders import write_ladder
    from ram_core.training.records import read_records

    if not data:
        raise RamError("Name the data to make targets of with --data.")
    return write_ladder(read_records(data, split=split, max_records=max_records), directory)


def _rungs(aligners: list[str], data: str, ladder: Path | None, strengths: list[float]) -> list[Rung]:
    from ram_core.evaluation.ladders import STRENGTHS, Rung, read_ladder, strength_rungs
    from server.settings import aligner_table

    if ladder is not None:
        if aligners or data or strengths:
            raise RamError("A --ladder names its aligners and data itself.")
        return read_ladder(ladder)
    if not aligners or not data:
        raise RamError("Name an aligner as NAME=PATH and --data, or a --ladder.")
    try:
        paths = aligner_table(aligners)
    except ValueError as error:
        raise RamError(str(error)) from None
    if len(paths) == 1:
        [path] = paths.values()
        return strength_rungs(path, data, strengths or STRENGTHS)
    if strengths:
        raise RamError("`--strengths` are of one aligner.")
    return [Rung(name=name, data=data, aligner=path) for name, path in paths.items()]


def _run(
    rungs: list[Rung],
    proposal: str,
    read: dict[str, Any],
    sampling: dict[str, Any],
    bars: dict[str, float],
    device: dict[str, str],
    plot: Path | None,
) -> StressReport:
    from ram_core.evaluation.answering import Bench
    from ram_core.evaluation.ladders import load_targets
    from ram_core.evaluation.stress import Criterion, climb
    from ram_core.evaluation.stress_plot import check_can_plot, plot_ladder
    from ram_core.params import SamplingParams
    from ram_core.progress import terminal_progress

    if not proposal:
        raise RamError("Name the frozen model with --proposal.")
    if plot is not None:
        check_can_plot(plot)
    targets, aligners = load_targets(rungs, **read)
    with terminal_progress() as show:
        bench = Bench(proposal, aligners, targets[0].records, **device)  # type: ignore[arg-type]
        report = climb(
            bench,
            targets,
            criterion=Criterion(**bars),
            sampling=SamplingParams(**sampling),
            on_progress=show,
        )
    if plot is not None:
        plot_ladder(report, plot)
    return report


def _print(report: StressReport) -> None:
    console = make_console()
    table = new_table("", *_HEADINGS)
    for rung in report.rungs:
        add_row(
            table,
            "✗" if rung.has_broken else "✓",
            rung.name,
            *map(_number, (rung.aligner_mass, rung.ess, rung.kl_p_q, rung.kl_pi_p, rung.supported)),
            f"{_number(rung.perplexity)} ({_number(rung.perplexity_alone)})",
            f"{_number(rung.quality)} ({_number(rung.quality_alone)})",
        )
    console.print(table)
    console.print("In brackets: the proposal alone.")
    broken = report.first_broken
    if broken is None:
        console.print(f"Support holds on every rung. It would be broken by {report.criterion}.", markup=False)
    else:
        reasons = "; ".join(broken.failures)
        console.print(f"Support breaks at {broken.name}: {reasons}.", style="bold", markup=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def _as_json(report: StressReport) -> dict[str, Any]:
    rungs = [
        {
            name: finite(value) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(rung).items()
        }
        for rung in report.rungs
    ]
    return {
        "criterion": dataclasses.asdict(report.criterion),
        "rungs": rungs,
        "first_broken": None if report.first_broken is None else report.first_broken.name,
    }
