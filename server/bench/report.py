"""A result as tables, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from server.bench.result import Result
from server.bench.summary import Distribution, Schedule, Summary

WIDE = 200
"""Columns of a file or pipe: nothing there has to be cut."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is text, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(result: Result) -> list[Table]:
    """What a person wants to know of a run, in the order in which they ask."""
    tables = [_overview(result), _latencies(result.summary)]
    if len(result.models) > 1:
        tables.append(_models(result.models))
    if result.summary.failures:
        tables.append(_failures(result))
    return tables


def print_tables(tables: Sequence[Table], remarks: Sequence[str], *, is_markdown: bool) -> None:
    """Write to stdout: Markdown, or boxes as wide as a terminal allows."""
    if is_markdown:
        print("\n\n".join([*map(_markdown, tables), *remarks]))  # noqa: T201
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    for table in tables:
        console.print(_boxed(table))
    for remark in remarks:
        console.print(remark, style="yellow", markup=False)


def milliseconds(value_s: float) -> str:
    value_ms = value_s * 1000
    return f"{value_ms:.1f}" if value_ms < 1000 else f"{value_ms:.0f}"


def _overview(result: Result) -> Table:
    summary = result.summary
    rows = [
        ["Requests answered", f"{summary.num_ok} of {summary.num_requests}"],
        ["Duration", f"{result.run.wall_s:.2f} s"],
        ["Requests a second", f"{summary.requests_per_s:.2f}"],
        [f"Output tokens a second (from {summary.tokens_from})", f"{summary.output_tokens_per_s:.1f}"],
    ]
    if summary.total_tokens_per_s is not None:
        rows.append(["Prompt and output tokens a second", f"{summary.total_tokens_per_s:.1f}"])
    if summary.mean_prompt_tokens is not None:
        cached = f", {summary.mean_cached_tokens:.1f} of them cached" if summary.mean_cached_tokens else ""
        rows.append(["Prompt tokens, mean", f"{summary.mean_prompt_tokens:.1f}{cached}"])
    if summary.mean_output_tokens is not None:
        told = f"{summary.mean_output_tokens:.1f} of {summary.mean_asked_tokens:.1f} asked"
        rows.append(["Output tokens, mean", told])
    if summary.tokens_per_chunk is not None:
        rows.append(["Output tokens a chunk", f"{summary.tokens_per_chunk:.2f}"])
    if summary.goodput is not None:
        objectives = ", ".join(
            f"{measure} ≤ {limit_s * 1000:g} ms"
            for measure, limit_s in result.settings["objectives_s"].items()
        )
        good = summary.goodput
        rows.append([f"Goodput ({objectives})", f"{good.share:.1%}, {good.requests_per_s:.2f} requests/s"])
    if result.schedule is not None:
        rows += _schedule_rows(result.schedule)
    rows.append(["Client's CPU", f"{result.run.cpu_s:.2f} s, {result.client_cpu_share:.0%} of a core"])
    return Table("Run", ["", "figure"], rows)


def _schedule_rows(schedule: Schedule) -> list[list[str]]:
    rates = [("asked", schedule.asked_per_s), ("drawn", schedule.drawn_per_s), ("sent", schedule.sent_per_s)]
    told = ", ".join(f"{rate:.2f} {name}" for name, rate in rates if rate is not None)
    rows = [["Requests a second, rate", told]]
    if schedule.lag_s is not None:
        lag = schedule.lag_s
        told = f"mean {milliseconds(lag.mean)}, p99 {milliseconds(lag.p99)}, max {milliseconds(lag.max)}"
        rows.append(["Sent late by, ms", told])
    return rows


def _latencies(summary: Summary) -> Table:
    named = [
        ("TTFT, ms", summary.ttft_s),
        ("ITL, ms", summary.itl_s),
        ("TPOT, ms", summary.tpot_s),
        ("E2E, ms", summary.e2e_s),
    ]
    rows = [[name, *_figures(distribution)] for name, distribution in named if distribution]
    return Table(
        "Latency of answered requests", ["", "mean", "p50", "p90", "p95", "p99", "max", "count"], rows
    )


def _figures(d: Distribution) -> list[str]:
    return [*map(milliseconds, (d.mean, d.p50, d.p90, d.p95, d.p99, d.max)), str(d.count)]


def _models(models: dict[str, Summary]) -> Table:
    header = ["model", "answered", "requests/s", "tokens/s"]
    header += ["TTFT p50", "TTFT p99", "ITL p99", "TPOT p50", "E2E p50", "E2E p99"]
    has_goodput = any(summary.goodput for summary in models.values())
    rows = []
    for name, summary in models.items():
        row = [name, f"{summary.num_ok}/{summary.num_requests}", f"{summary.requests_per_s:.2f}"]
        row.append(f"{summary.output_tokens_per_s:.1f}")
        for distribution, fields in (
            (summary.ttft_s, ("p50", "p99")),
            (summary.itl_s, ("p99",)),
            (summary.tpot_s, ("p50",)),
            (summary.e2e_s, ("p50", "p99")),
        ):
            row += [milliseconds(getattr(distribution, f)) if distribution else "–" for f in fields]
        if has_goodput:
            row.append(f"{summary.goodput.share:.1%}" if summary.goodput else "–")
        rows.append(row)
    return Table("By model, times in ms", [*header, *(["goodput"] if has_goodput else [])], rows)


def _failures(result: Result) -> Table:
    examples: dict[str, str] = {}
    for record in result.run.records:
        if record.failure:
            examples.setdefault(record.failure.label, record.failure.message)
    rows = [[label, str(count), examples[label]] for label, count in result.summary.failures.items()]
    return Table("Failed requests, left out of all latencies", ["kind", "count", "the first one says"], rows)


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.header) - 1)
    return "\n".join([f"**{table.title}**", "", line(table.header), rule, *map(line, table.rows)])


def _boxed(table: Table) -> RichTable:
    boxed = RichTable(title=table.title, title_justify="left", title_style="bold", show_edge=False)
    for position, name in enumerate(table.header):
        boxed.add_column(name, justify="right" if position else "left")
    for row in table.rows:
        boxed.add_row(*(cell.replace("[", "\\[") for cell in row))
    return boxed
