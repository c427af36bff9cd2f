"""`ram coverage`: whether synthetic answers cover what is wanted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ram_core.errors import RamError
from server.commands.failing import fail
from server.commands.tables import AsJson, add_row, make_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from ram_core.evaluation.coverage import Comparison, CoverageReport
    from ram_core.evaluation.measures import TextMeasures


def coverage(
    synthesis: Annotated[
        Path, typer.Argument(metavar="SYNTHESIS", help="synthesis.jsonl of a training run.")
    ],
    data: Annotated[
        str, typer.Option(help="What it was made from, with wanted answers: JSONL, or hf:NAME[:CONFIG].")
    ] = "",
    split: Annotated[str, typer.Option(help="Of an hf: source.")] = "train",
    max_compared: Annotated[
        int, typer.Option(min=2, help="Answers that self-BLEU compares, drawn by the seed.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    is_json: AsJson = False,
) -> None:
    """Measure the proposal's own answers, and compare them with the wanted ones."""
    from ram_core.evaluation.coverage import measure_coverage
    from ram_core.training.records import read_records
    from ram_core.training.synthesis import read_answers

    try:
        answers = list(read_answers(synthesis).values())
        if not answers:
            raise RamError(f"`{synthesis}` has no answers.")
        records = read_records(data, split=split) if data else []
        report = measure_coverage(answers, records, max_compared=max_compared, seed=seed)
    except (RamError, OSError) as error:
        fail(error)
    if is_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print(report)


def _print(report: CoverageReport) -> None:
    console = make_console()
    wanted = report.comparison.wanted if report.comparison is not None else None
    table = new_table("", "synthetic", *(["wanted"] if wanted else []))
    columns = [_cells(report.synthetic), *([_cells(wanted)] if wanted else [])]
    for name in columns[0]:
        add_row(table, name, *(column[name] for column in columns))
    add_row(table, "cut off at the limit", f"{report.cut_off:.1%}", *(["–"] if wanted else []))
    tokens = report.tokens
    spread = f"{tokens.mean:.1f} ({tokens.shortest}, {tokens.median:g}, {tokens.p95}, {tokens.longest})"
    add_row(table, "tokens: mean (least, median, 95 %, most)", spread, *(["–"] if wanted else []))
    console.print(table)
    if report.comparison is not None:
        _print_comparison(console, report.comparison)
    for warning in report.warnings:
        console.print(f"! {warning}", style="yellow", markup=False)
    if not report.warnings:
        console.print(
            "✓ nothing is thin" if report.comparison else "✓ nothing is wrong with the answers alone"
        )


def _cells(measures: TextMeasures) -> dict[str, str]:
    words = measures.lengths
    return {
        "answers": f"{measures.num_texts:,}",
        "distinct-1": f"{measures.distinct_1:.4f}",
        "distinct-2": f"{measures.distinct_2:.4f}",
        "self-BLEU": f"{measures.self_bleu:.3f}",
        "repetition": f"{measures.repetition:.2%}",
        "duplicates": f"{measures.duplicates:.1%}",
        "empty": f"{measures.empty:.1%}",
        "words: mean (least, median, 95 %, most)": (
            f"{words.mean:.1f} ({words.shortest}, {words.median:g}, {words.p95}, {words.longest})"
        ),
    }


def _print_comparison(console: Console, comparison: Comparison) -> None:
    console.print(
        f"{comparison.prompts_answered:.1%} of the prompts with a wanted answer have a synthetic one."
    )
    held = new_table(
        "of the wanted answers", "held, each once", "held, as often as wanted", "in another wanted"
    )
    for each in comparison.held:
        name = "words" if each.order == 1 else f"runs of {each.order} words"
        shares = (each.different, each.occurrences, each.among_wanted)
        add_row(held, name, *(f"{share:.1%}" for share in shares))
    console.print(held)
    buckets = new_table(
        "prompts of", "wanted", "synthetic", "distinct-2", "words (wanted)", "wanted words held"
    )
    for bucket in comparison.buckets:
        add_row(
            buckets,
            f"{bucket.min_words}–{bucket.max_words} words",
            f"{bucket.num_wanted:,}",
            f"{bucket.num_synthetic:,}",
            f"{bucket.distinct_2:.4f}",
            f"{bucket.mean_synthetic_words:.1f} ({bucket.mean_wanted_words:.1f})",
            f"{bucket.held_words:.1%}",
        )
    console.print(buckets)
