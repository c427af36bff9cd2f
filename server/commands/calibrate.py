"""`ram calibrate`: the gate and the number of candidates that an aligner should be served with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ram_core.errors import RamError
from server.commands.failing import fail
from server.commands.numbers import parse_numbers
from server.commands.tables import AsJson, add_row, finite, make_console, new_table

if TYPE_CHECKING:
    from ram_core.aligners.files import Snapshot
    from ram_core.evaluation.calibration import Calibration
    from ram_core.evaluation.recommendation import Point

DEFAULT_CANDIDATES = "5,10,20,50"
DEFAULT_MAX_TOKENS = 256

_HEADINGS = ("setting", "quality", "± error", "fallbacks", "KL(p‖q)", "KL(π‖p)", "ESS", "tokens/s")
_SHORT_DIGITS = 12


def calibrate(
    aligner: Annotated[Path, typer.Argument(metavar="DIR", help="The aligner's directory.")],
    proposal: Annotated[str, typer.Option(help="Directory or hub id of the frozen model.")],
    data: Annotated[
        str, typer.Option(help="Prompts that it was not trained on: JSONL, or hf:NAME[:CONFIG].")
    ],
    split: Annotated[str, typer.Option(help="Of an hf: source.")] = "test",
    max_prompts: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    judge: Annotated[
        str, typer.Option(metavar="MODULE:ATTRIBUTE", help="Without one: how probable wanted answers are.")
    ] = "",
    thresholds: Annotated[
        str,
        typer.Option(metavar="LIST", help="Gates in nats, such as 0.1,1. Default: of the KL that is seen."),
    ] = "",
    candidates: Annotated[
        str, typer.Option(metavar="LIST", help='Numbers of candidates; none: "".')
    ] = DEFAULT_CANDIDATES,
    temperature: Annotated[float, typer.Option(help="Of every answer.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=0, help="Of an answer; 0: as many as fit.")] = (
        DEFAULT_MAX_TOKENS
    ),
    seed: Annotated[int, typer.Option(help="The same seed, the same answers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    write: Annotated[
        bool, typer.Option("--write", help="Put what is recommended into aligner.json.")
    ] = False,
    is_json: AsJson = False,
) -> None:
    """Sweep an aligner's gate and number of candidates, and recommend both by a stated rule."""
    from ram_core.evaluation.answering import Bench
    from ram_core.evaluation.calibration import calibrate as sweep
    from ram_core.evaluation.calibration import write_recommendation
    from ram_core.evaluation.judges import load_judge
    from ram_core.params import SamplingParams
    from ram_core.progress import terminal_progress
    from ram_core.training.records import fingerprint, read_records

    try:
        records = read_records(data, split=split, max_records=max_prompts)
        chosen_judge = load_judge(judge) if judge else None
        gates = parse_numbers("thresholds", thresholds, float)
        counts = parse_numbers("candidates", candidates, int)
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        snapshot = _verified(aligner, proposal)
        with terminal_progress() as show:
            found = sweep(
                Bench(proposal, {_NAME: str(aligner)}, records, device=device, dtype=dtype),
                _NAME,
                judge=chosen_judge,
                thresholds=gates,
                candidates=counts,
                sampling=sampling,
                on_progress=show,
            )
        written = ""
        if write:
            source = f"{Path(data).name}, SHA-256 {fingerprint(records)[:_SHORT_DIGITS]}"
            manifest = write_recommendation(aligner, found, snapshot, data=source)
            written = (
                f"Wrote {aligner}/aligner.json: gate {_named(manifest.kl_threshold)}, candidates "
                f"{_named(manifest.candidates)}; version {manifest.version}."
            )
    except (RamError, OSError) as error:
        fail(error)
    if is_json:
        typer.echo(json.dumps(_as_json(found, is_written=write), indent=2))
    else:
        _print(found, written)


_NAME = "aligner"
"""What the bench calls it; its own name may be anything."""


def _verified(aligner: Path, proposal: str) -> Snapshot:
    """The aligner's files as they are verified: what is written later must be of these."""
    from ram_core.aligners.verification import verify
    from ram_core.models.vocabulary import load_tokenizer

    report = verify(aligner, proposal=load_tokenizer(proposal))
    report.require_sound()
    assert report.snapshot is not None
    return report.snapshot


def _print(found: Calibration, written: str) -> None:
    console = make_console()
    console.print(f"Quality: {found.judge}, over {found.num_prompts} prompts.", markup=False)
    table = new_table(*_HEADINGS)
    for point in (found.proposal, *found.gates, *found.candidates):
        add_row(table, *_row(point))
    console.print(table)
    for line in (*found.recommendation.reasons, *filter(None, [written])):
        console.print(line, markup=False)


def _row(point: Point) -> tuple[str, ...]:
    quality = point.quality
    return (
        point.label,
        "–" if quality is None else f"{quality.mean:.3f}",
        "–" if quality is None else f"{quality.error:.3f}",
        *(_of_aligner(point) if point.is_aligned else ("–",) * 4),
        f"{point.tokens_per_s:,.0f}",
    )


def _of_aligner(point: Point) -> tuple[str, ...]:
    return (
        f"{point.fallback_rate:.1%}",
        f"{point.kl_p_q:.3f}",
        f"{point.kl_pi_p:.3f}",
        f"{point.ess:.2f}",
    )


def _named(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _as_json(found: Calibration, *, is_written: bool) -> dict[str, Any]:
    recommended = found.recommendation
    return {
        "quality": found.judge,
        "num_prompts": found.num_prompts,
        "points": [_point_as_json(point) for point in (found.proposal, *found.gates, *found.candidates)],
        "recommended": {
            "kl_threshold": finite(recommended.kl_threshold),
            "candidates": recommended.num_candidates,
            "reasons": recommended.reasons,
        },
        "is_written": is_written,
    }


def _point_as_json(point: Point) -> dict[str, Any]:
    return {
        "label": point.label,
        "kl_threshold": None if math.isinf(point.kl_threshold) else point.kl_threshold,
        "candidates": point.num_candidates,
        "quality": None if point.quality is None else finite(point.quality.mean),
        "quality_error": None if point.quality is None else finite(point.quality.error),
        "fallback_rate": point.fallback_rate,
        "kl_p_q": finite(point.kl_p_q),
        "kl_pi_p": finite(point.kl_pi_p),
        "ess": point.ess,
        "tokens_per_s": point.tokens_per_s,
    }
