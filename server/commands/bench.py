"""`ram bench`: load any OpenAI-compatible server and measure it. What it does is in `server.bench`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ram_core.errors import RamError
from server.commands.failing import fail

if TYPE_CHECKING:
    from server.bench.client import Target
    from server.bench.load import Load
    from server.bench.result import Result
    from server.bench.summary import Objective

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 8
DEFAULT_NUM_REQUESTS = 100
SERVER, LOAD, TEXT, OUTPUT = "Where", "When requests leave", "What they say", "What is told"

bench_app = typer.Typer()


class ArrivalKind(StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    url: Annotated[
        str,
        typer.Option(help="The server; /v1 is added where the URL has no path.", rich_help_panel=SERVER),
    ] = DEFAULT_URL,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="A model; repeated, a mix by weight. Default: the first that the server lists.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.", rich_help_panel=SERVER)
    ] = "",
    header: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME: VALUE'", help="One more header; may be repeated.", rich_help_panel=SERVER
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take.", rich_help_panel=SERVER)
    ] = 600,
    needs_done: Annotated[
        bool,
        typer.Option(
            "--need-done/--no-need-done",
            help="Whether a stream without [DONE] at its end has failed.",
            rich_help_panel=SERVER,
        ),
    ] = True,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, whatever the server does (open loop).", rich_help_panel=LOAD),
    ] = None,
    arrivals: Annotated[
        ArrivalKind, typer.Option(help="How they are spaced with --rate.", rich_help_panel=LOAD)
    ] = ArrivalKind.POISSON,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Streams that send one request after the other (closed loop; default 8). "
            "With --rate: at most so many at once.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Measured requests; default 100 unless --duration is given.", rich_help_panel=LOAD),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds after which no new request is sent.", rich_help_panel=LOAD),
    ] = None,
    warmup: Annotated[
        int, typer.Option(help="Requests sent before, and not counted.", rich_help_panel=LOAD)
    ] = 8,
    seed: Annotated[int, typer.Option(help="The same seed makes the same load.", rich_help_panel=LOAD)] = 0,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LENGTH",
            help="N, uniform:LOW:HIGH, normal:MEAN:SD[:MAX] or lognormal:MEAN:SD[:MAX].",
            rich_help_panel=TEXT,
        ),
    ] = "64",
    output_tokens: Annotated[
        str, typer.Option(metavar="LENGTH", help="The same, for `max_tokens`.", rich_help_panel=TEXT)
    ] = "64",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Directory with the model's tokenizer.json, for exact prompt lengths; else words count.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of conversations (messages, ShareGPT or prompt) to send in place of random words.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    shared_prefix: Annotated[
        int,
        typer.Option(
            help="Tokens that all prompts begin with, before their own; 0 keeps prefix caches out.",
            rich_help_panel=TEXT,
        ),
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask that answers run to `max_tokens`; strict servers refuse the field.",
            rich_help_panel=TEXT,
        ),
    ] = True,
    extra_body: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="Fields for every request; null takes ours back.",
            rich_help_panel=TEXT,
        ),
    ] = "{}",
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEASURE=TIME",
            help="For the goodput: ttft=500ms, itl=50ms, tpot=40ms, e2e=5s; may be repeated.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    allow_failures: Annotated[
        float,
        typer.Option(help="Share that may fail before the exit code is 1.", rich_help_panel=OUTPUT),
    ] = 0.0,
    is_markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables as Markdown.", rich_help_panel=OUTPUT)
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write settings, environment, figures and every request here.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plot_path: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Write a picture here, .png or .svg (needs the extra `bench`).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Load any OpenAI-compatible server with streamed chats, and measure what its clients see.

    Closed loop: ram bench --url URL --concurrency 16 --requests 200

    Open loop: ram bench --url URL --rate 5 --duration 60 --slo ttft=500ms --slo tpot=50ms

    Then: ram bench compare a.json b.json
    """
    if context.invoked_subcommand is not None:
        return
    from server.bench.client import Target
    from server.bench.load import Load, parse_models
    from server.bench.summary import parse_objective

    if concurrency is None and rate is None:
        concurrency = DEFAULT_CONCURRENCY
    if requests is None and duration is None:
        requests = DEFAULT_NUM_REQUESTS
    try:
        target = Target(
            url, api_key=api_key, headers=_headers(header or []), timeout_s=timeout, needs_done=needs_done
        )
        objectives = [parse_objective(text) for text in slo or []]
        _check_outputs(allow_failures, json_path, plot_path)
        load = Load(
            models=parse_models(model or []),
            rate_per_s=rate,
            arrivals=arrivals.value,
            concurrency=concurrency,
            num_requests=requests,
            duration_s=duration,
            num_warmup=warmup,
            seed=seed,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            shared_prefix_tokens=shared_prefix,
            data=data,
            tokenizer=tokenizer,
            ignores_eos=ignore_eos,
            extra_body=_json_object(extra_body),
        )
        result = asyncio.run(_measure(target, load, objectives))
        _tell(result, is_markdown=is_markdown, json_path=json_path, plot_path=plot_path)
    except (RamError, OSError) as error:
        fail(error)
    raise typer.Exit(1 if result.summary.num_failed > allow_failures * result.summary.num_requests else 0)


@bench_app.command("compare")
def compare_results(
    first: Annotated[Path, typer.Argument(help="A file that `ram bench --json` wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    is_markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
) -> None:
    """Two results side by side, with ratios, and the settings in which they differ."""
    from server.bench.compare import compare
    from server.bench.report import print_tables

    try:
        table, remarks = compare(first, second)
    except RamError as error:
        fail(error)
    print_tables([table], remarks, is_markdown=is_markdown)


async def _measure(target: Target, load: Load, objectives: Sequence[Objective]) -> Result:
    """Send the load, with a bar on stderr for a person who waits."""
    from rich.console import Console
    from rich.progress import Progress

    from server.bench.client import list_models
    from server.bench.record import Record
    from server.bench.result import judge
    from server.bench.run import run_load

    if not load.models:
        load = dataclasses.replace(load, models=(((await list_models(target))[0], 1.0),))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Requests answered", total=load.num_requests)

        def show(_record: Record) -> None:
            progress.advance(bar)

        run = await run_load(target, load, show)
    return judge(target, load, run, objectives)


def _tell(result: Result, *, is_markdown: bool, json_path: Path | None, plot_path: Path | None) -> None:
    from server.bench.report import print_tables, tables_of

    print_tables(tables_of(result), result.remarks, is_markdown=is_markdown)
    if json_path:
        result.write_json(json_path)
    if plot_path:
        from server.bench.plot import plot

        plot(result, plot_path)


def _headers(texts: list[str]) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not value.strip():
            raise RamError(f"A header is `NAME: VALUE`; got `{text}`.")
        headers[name.strip()] = value.strip()
    return headers


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RamError(f"`extra-body` is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise RamError(f"`extra-body` is a JSON object; got `{text}`.")
    return fields


def _check_outputs(allowed_share: float, json_path: Path | None, plot_path: Path | None) -> None:
    """What would fail after the run had better fail before it."""
    from server.bench.plot import check_can_plot

    if not 0 <= allowed_share <= 1:
        raise RamError(f"`allow-failures` is a share from 0 to 1; got {allowed_share:g}.")
    for path in (json_path, plot_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise RamError(f"There is no directory to write {path} into.")
    if plot_path:
        check_can_plot(plot_path)
