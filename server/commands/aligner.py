"""`ram aligner`: look at an aligner's directory, verify it, and write its manifest.

What concerns a running server's aligners is in `server.commands.aligner_remote`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ram_core.errors import RamError
from server.commands.aligner_remote import remote_app
from server.commands.failing import fail
from server.commands.tables import AsJson, add_row, make_console, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from ram_core.aligners.files import OnProgress
    from ram_core.aligners.manifest import Manifest, Term
    from ram_core.aligners.report import VerificationReport
    from ram_core.aligners.summary import AlignerSummary

aligner_app = typer.Typer(
    help="Aligners: look, verify and pack on disk; list, load and promote in a running server.",
    no_args_is_help=True,
)
aligner_app.add_typer(remote_app)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The aligner's directory.")]

_MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}


@aligner_app.command()
def inspect(directory: Directory, is_json: AsJson = False) -> None:
    """Show what an aligner says of itself, without judging it."""
    from ram_core.aligners.summary import summarise

    try:
        with _progress(is_json) as show:
            summary = summarise(directory, show)
    except (RamError, OSError) as error:
        fail(error)
    if is_json:
        typer.echo(json.dumps(_summary_as_json(summary), indent=2))
    else:
        _print_summary(summary)


@aligner_app.command()
def verify(
    directory: Directory,
    proposal: Annotated[
        str | None, typer.Option(help="Directory or hub id of the model that it is to follow.")
    ] = None,
    is_json: AsJson = False,
) -> None:
    """Check files, hashes, config, weights and vocabulary; exit code 1 if anything is wrong."""
    from ram_core.aligners.verification import verify as verify_aligner
    from ram_core.models.loading import load_config
    from ram_core.models.vocabulary import load_tokenizer

    try:
        tokenizer, num_rows = None, 0
        if proposal is not None:
            tokenizer = load_tokenizer(proposal)
            num_rows = load_config(proposal).get_text_config(decoder=True).vocab_size
        with _progress(is_json) as show:
            report = verify_aligner(
                directory, proposal=tokenizer, num_proposal_rows=num_rows, on_progress=show
            )
    except RamError as error:
        fail(error)
    if is_json:
        typer.echo(json.dumps(_report_as_json(report), indent=2))
    else:
        _print_report(report)
    raise typer.Exit(0 if report.is_sound else 1)


@aligner_app.command()
def pack(
    directory: Directory,
    name: Annotated[str | None, typer.Option(help="Default: the directory's name.")] = None,
    version: Annotated[str | None, typer.Option(help="Default: a hash of the files.")] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[=WEIGHT]",
            help="A factor: self, ./directory or another aligner's name; may be repeated. Default: self=1.",
        ),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Where a request gives none.")] = None,
    resampling: Annotated[
        str | None, typer.Option(help="product, candidates, nucleus or proposal, where a request gives none.")
    ] = None,
    kl_threshold: Annotated[float | None, typer.Option(help="The gate, in nats; inf for none.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Draws in mode candidates.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="How it may be used.")] = None,
    provenance: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Where it comes from; may be repeated."),
    ] = None,
    is_json: AsJson = False,
) -> None:
    """Write or renew aligner.json, with the files' hashes and the tokenizer's fingerprint."""
    from ram_core.aligners.manifest import manifest_bytes
    from ram_core.aligners.pack import Wishes
    from ram_core.aligners.pack import pack as pack_aligner
    from ram_core.params import Resampling

    try:
        wishes = Wishes(
            name=name,
            version=version,
            terms=_terms(term),
            strength=strength,
            resampling=None if resampling is None else Resampling(resampling),
            kl_threshold=kl_threshold,
            candidates=candidates,
            license=license_,
            provenance=_table(provenance),
        )
        with _progress(is_json) as show:
            manifest = pack_aligner(directory, wishes, show)
    except (RamError, ValueError) as error:
        fail(error)
    if is_json:
        typer.echo(manifest_bytes(manifest).decode(), nl=False)
    else:
        make_console().print(_manifest_table(manifest))


def _terms(items: list[str] | None) -> tuple[Term, ...] | None:
    """Terms of MODEL[=WEIGHT] items; raises ValueError for what is none."""
    from ram_core.aligners.manifest import Term

    terms = []
    for item in items or ():
        model, _, weight = item.partition("=")
        try:
            terms.append(Term(model, float(weight or 1)))
        except ValueError as error:
            raise ValueError(f"`--term {item}`: {error}") from None
    return tuple(terms) or None


def _table(items: list[str] | None) -> dict[str, str]:
    """Pairs of KEY=VALUE items; raises ValueError for what is none."""
    pairs = [item.partition("=") for item in items or ()]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise ValueError(f"`--provenance` is given as KEY=VALUE, not {key!r}")
    return {key: value for key, _, value in pairs}


@contextmanager
def _progress(is_json: bool) -> Iterator[OnProgress]:
    """A bar on stderr while files are read, if somebody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = ("reading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_off = is_json or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_off) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _manifest_table(manifest: Manifest) -> Table:
    gate = "none" if manifest.kl_threshold is None else f"{manifest.kl_threshold:g} nats"
    rows = {
        "name": manifest.name,
        "version": manifest.version,
        "terms": " ".join(f"{term.model}={term.weight:g}" for term in manifest.terms),
        "strength": f"{manifest.strength:g}",
        "resampling": manifest.resampling.value,
        "gate": gate,
        "candidates": "not given" if manifest.candidates is None else str(manifest.candidates),
        "tokenizer": manifest.tokenizer or "not given",
        "license": manifest.license or "not given",
        "files": f"{len(manifest.files)} with hashes" if manifest.files else "not listed",
        **{f"provenance: {key}": value for key, value in sorted(manifest.provenance.items())},
    }
    table = new_table("", "")
    for name, value in rows.items():
        add_row(table, name, value)
    return table


def _print_summary(summary: AlignerSummary) -> None:
    console = make_console()
    if not summary.has_manifest:
        console.print("No aligner.json: these defaults hold. `ram aligner pack` writes one.")
    console.print(_manifest_table(summary.manifest))
    models = new_table("model", "architecture", "parameters", "stored as", "base")
    for part in summary.parts:
        stored = " ".join(sorted(part.dtypes)) or "–"
        add_row(models, part.part, part.architecture, f"{part.num_parameters:,}", stored, part.base or "–")
    files = new_table("file", "bytes")
    for path, num_bytes in summary.files.items():
        add_row(files, path, f"{num_bytes:,}")
    add_row(files, "together", f"{summary.num_bytes:,}")
    if summary.parts:
        console.print(models)
    console.print(files)


def _print_report(report: VerificationReport) -> None:
    console = make_console()
    table = new_table("", "check", "outcome", "seconds")
    for check in report.checks:
        add_row(table, _MARKS[check.outcome], check.name, check.detail, f"{check.seconds:.3f}")
    console.print(table)
    verdict = "✓ sound" if report.is_sound else "✗ not sound"
    console.print(f"{verdict}, in {report.seconds:.2f} s", style="bold")


def _summary_as_json(summary: AlignerSummary) -> dict[str, Any]:
    import dataclasses

    import msgspec

    return {
        "directory": str(summary.directory),
        "has_manifest": summary.has_manifest,
        "manifest": msgspec.to_builtins(summary.manifest),
        "models": [dataclasses.asdict(part) for part in summary.parts],
        "files": dict(summary.files),
        "bytes": summary.num_bytes,
    }


def _report_as_json(report: VerificationReport) -> dict[str, Any]:
    import dataclasses

    return {
        "directory": str(report.directory),
        "is_sound": report.is_sound,
        "has_manifest": report.has_manifest,
        "name": report.manifest.name if report.manifest else None,
        "version": report.manifest.version if report.manifest else None,
        "tokenizer": report.fingerprint or None,
        "bytes": report.snapshot.num_bytes if report.snapshot else None,
        "seconds": report.seconds,
        "checks": [dataclasses.asdict(check) for check in report.checks],
    }
