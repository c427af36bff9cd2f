"""An evaluation: every setting answers every prompt, a judge compares, and what was found becomes rows."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ram_core.engine.messages import StepTelemetry
from ram_core.evaluation.answering import Answers, Bench, Setting, alone
from ram_core.evaluation.held_out import HeldOut, score_held_out
from ram_core.evaluation.judges import Case, Comparisons, Judge, JudgeError, prefer_scores
from ram_core.evaluation.measures import TextMeasures, measure_texts
from ram_core.evaluation.preferences import (
    Interval,
    LengthControl,
    control_length,
    mean_interval,
    win_rate,
)
from ram_core.evaluation.wanted import wanted_examples
from ram_core.params import Resampling
from ram_core.progress import OnProgress, ignore_progress
from ram_core.training.errors import DataError


@dataclass(frozen=True)
class Steps:
    """What an aligner did, means over all tokens drawn: divergences in nats, the rest fractions.

    `fallback_rate` is the share of tokens that the gate gave back to the proposal. `kl_p_q_at` and
    `kl_pi_p_at` are means over the answers that have a token at that place, `num_at` so many.
    """

    kl_p_q: float
    kl_pi_p: float
    ess: float
    aligner_mass: float
    fallback_rate: float
    kl_p_q_at: tuple[float, ...]
    kl_pi_p_at: tuple[float, ...]
    num_at: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """What a judge said of a row's answers; None is what it does not do, or could not.

    `win_rate` is against the proposal's answers, ties half. `scores` and `preferences` are those of each
    prompt, None where the judge said nothing.
    """

    win_rate: Interval | None = None
    length_control: LengthControl | None = None
    score: Interval | None = None
    num_unreadable: int = 0
    first_preferred: float | None = None
    agreement: float | None = None
    scores: tuple[float | None, ...] = ()
    preferences: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Row:
    """One setting. `steps` is None for the proposal alone, `judged` without a judge, `held_out` without data.

    `mean_tokens` are those of an answer; `tokens_per_s` is of all answers together, as they ran in a batch.
    """

    setting: Setting
    num_tokens: int
    mean_tokens: float
    tokens_per_s: float
    text: TextMeasures
    steps: Steps | None
    held_out: HeldOut | None = None
    judged: Judged | None = None

    @property
    def label(self) -> str:
        return self.setting.label

    @property
    def aligner(self) -> str:
        """The aligners' names, with a plus between them; "" for the proposal alone."""
        return "+".join(term.aligner for term in self.setting.alignment.terms)

    @property
    def strength(self) -> float:
        """What all strengths add up to."""
        return math.fsum(term.strength for term in self.setting.alignment.terms)


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found. The first row is the proposal alone. `failure` is why judging ended early."""

    rows: tuple[Row, ...]
    num_prompts: int
    judge: str = ""
    notes: tuple[str, ...] = ()
    failure: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it in lists, tables, texts and numbers; what is no finite number is None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        for row, table in zip(self.rows, plain["rows"], strict=True):
            table |= {"label": row.label, "aligner": row.aligner, "strength": row.strength}
        return plain


def evaluate(
    bench: Bench,
    settings: Sequence[Setting],
    judge: Judge | None = None,
    *,
    on_answers: Callable[[Answers], None] = lambda answers: None,
    on_progress: OnProgress = ignore_progress,
) -> EvaluationReport:
    """Answer the bench's prompts under each of `settings`, the proposal alone first, and measure.

    The proposal is cut to the nucleus of the first setting and draws as that does. `on_answers` hears of
    every setting as soon as it has answered, long before a judge is asked. A judge that fails ends nothing
    but its own work: the report has what it said until then, and why it stopped.

    Raises:
        RamError: an aligner that is not there, or a model that failed.
    """
    if not settings:
        raise DataError("there is no setting to evaluate")
    settings = [alone(settings[0].sampling, settings[0].alignment), *settings]
    held_out, notes = _score_held_out(bench, settings, on_progress)
    answers = []
    for setting in settings:
        answers.append(bench.answer(setting, on_progress))
        on_answers(answers[-1])
    rows = [_measure(each, fit) for each, fit in zip(answers, held_out, strict=True)]
    failure = ""
    if judge is not None:
        try:
            for index, row in enumerate(rows):
                told = _telling(row.label, on_progress)
                rows[index] = replace(row, judged=_judge(bench, judge, answers, index, rows[0], told))
        except JudgeError as error:
            failure = str(error)
        notes += _notes_on(judge, rows)
    name = "" if judge is None else judge.name
    return EvaluationReport(tuple(rows), len(bench.prompts), name, tuple(notes), failure)


def summarise_steps(telemetry: Sequence[Sequence[StepTelemetry]]) -> Steps | None:
    """What an aligner did to some answers, each a sequence of steps; None if there is nothing to tell."""
    steps = [step for answer in telemetry for step in answer]
    if not steps:
        return None
    longest = max(len(answer) for answer in telemetry)
    columns = [[answer[place] for answer in telemetry if len(answer) > place] for place in range(longest)]
    return Steps(
        kl_p_q=fmean(step.kl_p_q for step in steps),
        kl_pi_p=fmean(step.kl_pi_p for step in steps),
        ess=fmean(step.ess for step in steps),
        aligner_mass=fmean(step.aligner_mass for step in steps),
        fallback_rate=fmean(step.is_fallback for step in steps),
        kl_p_q_at=tuple(fmean(step.kl_p_q for step in column) for column in columns),
        kl_pi_p_at=tuple(fmean(step.kl_pi_p for step in column) for column in columns),
        num_at=tuple(len(column) for column in columns),
    )


def _telling(label: str, on_progress: OnProgress) -> OnProgress:
    """Progress of one row's judge."""
    return lambda progress: on_progress(replace(progress, stage=f"{progress.stage}, {label}"))


def _measure(answers: Answers, held_out: HeldOut | None) -> Row:
    return Row(
        setting=answers.setting,
        num_tokens=answers.num_tokens,
        mean_tokens=answers.num_tokens / len(answers.choices),
        tokens_per_s=answers.num_tokens / answers.seconds,
        text=measure_texts(answers.texts),
        steps=summarise_steps([choice.telemetry for choice in answers.choices]),
        held_out=held_out,
    )


def _score_held_out(
    bench: Bench, settings: Sequence[Setting], on_progress: OnProgress
) -> tuple[list[HeldOut | None], list[str]]:
    """How each setting fits the wanted answers that there are and that fit into the context."""
    fitting = wanted_examples(bench)
    num_wanted = sum(bool(record.wanted) for record in bench.records)
    notes = []
    if num_wanted < len(bench.records):
        missing = len(bench.records) - num_wanted
        notes.append(f"{missing} of {len(bench.records)} records have no wanted answer: no perplexity there")
    if len(fitting) < num_wanted:
        notes.append(f"{num_wanted - len(fitting)} wanted answers do not fit into the context: left out")
    if any(_is_drawn(setting) for setting in settings) and fitting:
        notes.append("`candidates` has no law in closed form: no perplexity there")
    if not fitting:
        return [None] * len(settings), notes
    return [*score_held_out(bench, fitting, settings, on_progress)], notes


def _is_drawn(setting: Setting) -> bool:
    alignment = setting.alignment
    return not alignment.is_identity and alignment.resampling is Resampling.CANDIDATES


def _judge(
    bench: Bench, judge: Judge, answers: Sequence[Answers], index: int, first: Row, on_progress: OnProgress
) -> Judged:
    """What the judge says of one row; `first` is the proposal's, judged already unless it is this one."""
    cases = [
        Case(record.messages, answer, baseline, record.wanted)
        for record, answer, baseline in zip(
            bench.records, answers[index].texts, answers[0].texts, strict=True
        )
    ]
    scores = judge.score(cases, on_progress) if judge.can_score else ()
    judged = Judged(score=_mean(scores, mean_interval), scores=scores)
    if index == 0:
        return judged
    if judge.can_compare:
        comparisons = judge.compare(cases, on_progress)
    else:
        assert first.judged is not None, "the proposal's row is judged first"
        comparisons = Comparisons(prefer_scores(scores, first.judged.scores))
    preferences = comparisons.preferences
    differences = [
        float(ours - theirs) for ours, theirs in zip(answers[index].lengths, answers[0].lengths, strict=True)
    ]
    said = [(p, d) for p, d in zip(preferences, differences, strict=True) if p is not None]
    return replace(
        judged,
        win_rate=_mean(preferences, win_rate),
        length_control=control_length([p for p, _ in said], [d for _, d in said]) if said else None,
        num_unreadable=comparisons.num_unreadable,
        first_preferred=comparisons.first_preferred,
        agreement=comparisons.agreement,
        preferences=preferences,
    )


def _mean(values: Sequence[float | None], average: Callable[[Sequence[float]], Interval]) -> Interval | None:
    said = [value for value in values if value is not None]
    return average(said) if said else None


def _notes_on(judge: Judge, rows: Sequence[Row]) -> list[str]:
    """What a reader of win rates must know: once, if it holds for every row that was compared."""
    judged = {row.label: row.judged for row in rows[1:] if row.judged is not None}
    labels: dict[str, list[str]] = defaultdict(list)
    for label, each in judged.items():
        for note in _remarks(judge, each):
            labels[note].append(label)
    return [note if len(of) == len(judged) else f"{', '.join(of)}: {note}" for note, of in labels.items()]


def _remarks(judge: Judge, judged: Judged) -> Iterator[str]:
    if silent := sum(value is None for value in judged.scores):
        yield f"the judge did not score {silent} of {len(judged.scores)} answers"
    if undecided := sum(value is None for value in judged.preferences):
        yield f"{undecided} of {len(judged.preferences)} pairs have no verdict, and are not counted"
    if judged.num_unreadable:
        yield f"{judged.num_unreadable} of {2 * len(judged.preferences)} verdicts could not be read"
    if judge.can_compare and judged.first_preferred is not None:
        yield (
            f"{judged.first_preferred:.0%} of decided verdicts went to the answer shown first, "
            f"{judged.agreement:.0%} of pairs got the same verdict in both orders"
        )
    if judged.length_control is not None and judged.length_control.is_extrapolated:
        yield "one side is always longer, so the win rate at equal length is a guess (*)"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
