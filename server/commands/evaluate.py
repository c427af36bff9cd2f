"""`ram eval`: how good aligners are, and what they cost. What it does is in `ram_core.evaluation`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ram_core.errors import RamError
from server.commands.failing import fail

if TYPE_CHECKING:
    from ram_core.evaluation.answering import Answers
    from ram_core.evaluation.judges import Judge
    from ram_core.evaluation.report import EvaluationReport
    from ram_core.evaluation.sweep import Sweep
    from ram_core.params import SamplingParams
    from ram_core.training.records import Record

Value = TypeVar("Value")

MODELS, SWEEP, ANSWERS, JUDGE, OUTPUT = "Models", "What is tried", "Answers", "Judge", "What is told"
DEFAULT_MAX_TOKENS = 256


class PlotFormat(StrEnum):
    PNG = "png"
    SVG = "svg"


def evaluate(
    aligner: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=PATH…", help="Aligners; with --demo names of its own are enough."),
    ] = None,
    proposal: Annotated[
        str, typer.Option(help="Directory or hub id of the frozen model.", rich_help_panel=MODELS)
    ] = "",
    demo: Annotated[
        bool, typer.Option("--demo", help="The embedded demo's models.", rich_help_panel=MODELS)
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …", rich_help_panel=MODELS)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …", rich_help_panel=MODELS)] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run models' code.", rich_help_panel=MODELS)
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            help="JSONL, or hf:NAME[:CONFIG], of prompts with wanted answers; see docs/evaluation.md.",
            rich_help_panel=ANSWERS,
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Of an hf: source.", rich_help_panel=ANSWERS)] = "test",
    max_prompts: Annotated[int, typer.Option(min=0, help="0: all.", rich_help_panel=ANSWERS)] = 0,
    max_tokens: Annotated[
        int,
        typer.Option(min=0, help="Of an answer; 0: as many as fit.", rich_help_panel=ANSWERS),
    ] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[float, typer.Option(help="Of every answer.", rich_help_panel=ANSWERS)] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same answers.", rich_help_panel=ANSWERS)] = 0,
    strengths: Annotated[
        str, typer.Option(metavar="LIST", help="Such as 0,0.5,1,2.", rich_help_panel=SWEEP)
    ] = "",
    resampling: Annotated[
        str, typer.Option(metavar="LIST", help="product,candidates,nucleus.", rich_help_panel=SWEEP)
    ] = "",
    candidates: Annotated[
        str, typer.Option(metavar="LIST", help="With resampling candidates: 5,10.", rich_help_panel=SWEEP)
    ] = "",
    kl_thresholds: Annotated[
        str, typer.Option(metavar="LIST", help="Gates such as 0.1,1,off.", rich_help_panel=SWEEP)
    ] = "",
    judge: Annotated[
        str, typer.Option(metavar="MODULE:ATTRIBUTE", help="A judge in Python.", rich_help_panel=JUDGE)
    ] = "",
    judge_url: Annotated[str, typer.Option(help="An OpenAI-compatible judge.", rich_help_panel=JUDGE)] = "",
    judge_model: Annotated[str, typer.Option(help="The model to ask there.", rich_help_panel=JUDGE)] = "",
    judge_criteria: Annotated[str, typer.Option(help="What it judges by.", rich_help_panel=JUDGE)] = "",
    judge_concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to it at once.", rich_help_panel=JUDGE)
    ] = 8,
    judge_extra_body: Annotated[
        str,
        typer.Option(
            metavar="JSON", help="Fields for its requests; null takes ours back.", rich_help_panel=JUDGE
        ),
    ] = "{}",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="All of it, as JSON.", rich_help_panel=OUTPUT)
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Every answer, as JSONL, before any is judged.", rich_help_panel=OUTPUT),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Directory for pictures.", rich_help_panel=OUTPUT)
    ] = None,
    plot_format: Annotated[PlotFormat, typer.Option(help="Of pictures.", rich_help_panel=OUTPUT)] = (
        PlotFormat.PNG
    ),
) -> None:
    """Measure aligners against the proposal alone: quality, divergence, fit, text and speed."""
    try:
        _check_outputs(json_path, answers, plots, plot_format)
        models = _models(aligner or [], proposal, is_demo=demo)
        chosen = _judge(
            judge,
            url=judge_url,
            model=judge_model,
            criteria=judge_criteria,
            concurrency=judge_concurrency,
            extra_body=judge_extra_body,
        )
        report = _run(
            models,
            _sweep(strengths, resampling, candidates, kl_thresholds),
            _records(data, split, max_prompts, models if demo else {}, seed),
            _sampling(temperature, seed, max_tokens),
            chosen,
            answers,
            {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
        )
        _tell(report, {"proposal": models.pop(""), "aligners": models, "data": data}, json_path)
        _draw(report, plots, plot_format)
    except (RamError, OSError, ValueError) as error:
        fail(error)
    if report.failure:
        fail(report.failure)


def _models(aligners: Sequence[str], proposal: str, *, is_demo: bool) -> dict[str, str]:
    """The proposal under the name "", and the aligners."""
    from ram_core.demo import ALIGNERS, bundle_path
    from server.settings import aligner_table

    if is_demo == bool(proposal):
        raise RamError("Name the frozen model with --proposal, or take --demo, and not both.")
    if not is_demo:
        if not aligners:
            raise RamError("Name at least one aligner, as NAME=PATH.")
        return {"": proposal, **aligner_table(list(aligners))}
    unknown = [name for name in aligners if "=" not in name and name not in ALIGNERS]
    if unknown:
        raise RamError(f"The demo has no aligner `{unknown[0]}`, but {', '.join(ALIGNERS)}.")
    bundle = bundle_path()
    named = [name if "=" in name else f"{name}={bundle / 'aligners' / name}" for name in aligners or ALIGNERS]
    return {"": str(bundle / "proposal"), **aligner_table(named)}


def _records(
    data: str, split: str, max_prompts: int, demo_models: Mapping[str, str], seed: int
) -> list[Record]:
    from ram_core.training.records import read_records

    if data:
        return read_records(data, split=split, max_records=max_prompts)
    if not demo_models:
        raise RamError("Name prompts to answer with --data.")
    from ram_core.demo import ALIGNERS
    from ram_core.demo.judging import held_out_records

    style = next((name for name in demo_models if name in ALIGNERS), None)
    if style is None:
        raise RamError("Name prompts to answer with --data; the demo has some for its own aligners only.")
    return held_out_records(style, max_records=max_prompts, seed=seed)


def _sampling(temperature: float, seed: int, max_tokens: int) -> SamplingParams:
    from ram_core.params import SamplingParams

    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)


def _sweep(strengths: str, resampling: str, candidates: str, kl_thresholds: str) -> Sweep:
    from ram_core.evaluation.sweep import Sweep
    from ram_core.params import Resampling

    modes = _list("resampling", resampling, Resampling)
    counts = _list("candidates", candidates, int)
    if Resampling.PROPOSAL in modes:
        raise RamError("`resampling` must name modes with an aligner; the proposal alone is always measured.")
    if counts and not modes:
        # Numbers of candidates mean nothing in another mode.
        modes = (Resampling.CANDIDATES,)
    if counts and Resampling.CANDIDATES not in modes:
        raise RamError("`candidates` are for `resampling` candidates, which is not among those to try.")
    return Sweep(
        strengths=_list("strengths", strengths, float),
        resampling=modes,
        candidates=counts,
        kl_thresholds=_list("kl_thresholds", kl_thresholds, _threshold),
    )


def _threshold(word: str) -> float:
    return float("inf" if word == "off" else word)


def _list(name: str, text: str, read: Callable[[str], Value]) -> tuple[Value, ...]:
    try:
        return tuple(dict.fromkeys(read(word.strip()) for word in text.split(",") if word.strip()))
    except ValueError as error:
        raise RamError(f"`{name}`: {error}.") from None


def _judge(
    entry_point: str, *, url: str, model: str, criteria: str, concurrency: int, extra_body: str
) -> Judge | None:
    if entry_point and (url or model):
        raise RamError("Give --judge, or --judge-url and --judge-model, not both.")
    if entry_point:
        from ram_core.evaluation.judges import load_judge

        # A judge is often a file where the command is typed, which an installed command does not look at.
        sys.path.insert(0, str(Path.cwd()))
        return load_judge(entry_point)
    if not model:
        if url:
            raise RamError("Name the judge's model with --judge-model.")
        return None
    from server.judging import DEFAULT_CRITERIA, EndpointJudge

    return EndpointJudge(
        model,
        url,
        criteria=criteria or DEFAULT_CRITERIA,
        concurrency=concurrency,
        extra_body=_json_object(extra_body),
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RamError(f"`judge-extra-body` is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise RamError(f"`judge-extra-body` is a JSON object; got `{text}`.")
    return fields


def _run(
    models: Mapping[str, str],
    sweep: Sweep,
    records: Sequence[Record],
    sampling: SamplingParams,
    judge: Judge | None,
    answers_path: Path | None,
    engine: dict[str, Any],
) -> EvaluationReport:
    from transformers.utils import logging as transformers_logging

    from ram_core.evaluation.answering import Bench
    from ram_core.evaluation.report import evaluate as measure
    from ram_core.evaluation.sweep import settings_of
    from ram_core.progress import terminal_progress

    transformers_logging.disable_progress_bar()
    proposal, aligners = models[""], {name: path for name, path in models.items() if name}
    bench = Bench(proposal, aligners, records, **engine)
    settings = settings_of(bench.manifests, sweep, sampling)
    with ExitStack() as stack:
        show = stack.enter_context(terminal_progress())
        file = stack.enter_context(answers_path.open("w", encoding="utf-8")) if answers_path else None

        def keep(answers: Answers) -> None:
            if file is not None:
                file.writelines(_lines(answers, records))
                file.flush()

        return measure(bench, settings, judge, on_answers=keep, on_progress=show)


def _lines(answers: Answers, records: Sequence[Record]) -> list[str]:
    """Each answer as a line of JSON."""
    return [
        json.dumps(
            {
                "setting": answers.setting.label,
                "record": number,
                "messages": record.messages,
                "wanted": record.wanted,
                "answer": text,
                "num_tokens": len(choice.token_ids),
                "finish_reason": choice.finish_reason,
            },
            ensure_ascii=False,
        )
        + "\n"
        for number, (record, text, choice) in enumerate(
            zip(records, answers.texts, answers.choices, strict=True), 1
        )
    ]


def _check_outputs(
    json_path: Path | None, answers: Path | None, plots: Path | None, plot_format: PlotFormat
) -> None:
    """What would fail after the work had better fail before it."""
    for path in (json_path, answers, plots):
        if path is not None and not path.absolute().parent.is_dir():
            raise RamError(f"There is no directory to write {path} into.")
    if plots is not None:
        from ram_core.evaluation.plots import check_can_plot

        check_can_plot(plot_format)


def _tell(report: EvaluationReport, sources: dict[str, Any], json_path: Path | None) -> None:
    from server.commands.evaluate_tables import print_report

    print_report(report)
    if json_path:
        told = {"sources": sources, **report.to_json()}
        text = json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False)
        json_path.write_text(text + "\n", encoding="utf-8")


def _draw(report: EvaluationReport, plots: Path | None, plot_format: PlotFormat) -> None:
    if plots:
        from ram_core.evaluation.plots import write_plots

        for path in write_plots(report, plots, plot_format):
            typer.echo(f"wrote {path}", err=True)
