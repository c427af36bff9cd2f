"""Where support breaks: targets further and further from the proposal, one rung after the other.

An aligner can only choose among what the proposal offers. Every rung is measured, and the first one is named
where the proposal hardly offers any more what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ram_core.engine.messages import StepTelemetry
from ram_core.evaluation.answering import Answers, Bench, Setting, alone
from ram_core.evaluation.held_out import HeldOut, score_held_out
from ram_core.evaluation.judges import Case, Judge
from ram_core.evaluation.ladders import Target
from ram_core.evaluation.wanted import wanted_examples
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from ram_core.progress import OnProgress, ignore_progress
from ram_core.training.errors import DataError


@dataclass(frozen=True, slots=True)
class Criterion:
    """When support has broken: one of these means, or shares, is below its bar."""

    min_aligner_mass: float = 0.5
    min_supported: float = 0.9
    min_ess: float = 0.1

    def __str__(self) -> str:
        return (
            f"mean aligner mass in the nucleus below {self.min_aligner_mass:g}, "
            f"supported share of wanted tokens below {self.min_supported:g}, "
            f"or mean ESS below {self.min_ess:g}"
        )

    def failures(self, found: RungResult) -> tuple[str, ...]:
        """What is below its bar, in words."""
        bars = (
            ("aligner mass in the nucleus", found.aligner_mass, self.min_aligner_mass),
            ("supported share of wanted tokens", found.supported, self.min_supported),
            ("ESS", found.ess, self.min_ess),
        )
        return tuple(
            f"{what} {value:.3f} < {bar:g}" for what, value, bar in bars if value is not None and value < bar
        )


@dataclass(frozen=True, slots=True)
class RungResult:
    """What a rung showed; None is what could not be measured: without an aligner, wanted answers, or a judge.

    `aligner_mass`, `ess` and the KLs (nats) are means over drawn tokens. `supported` is the share of wanted
    tokens that can be drawn at all. Perplexities are of the wanted answers, `…_alone` under the proposal.
    """

    name: str
    strength: float | None
    num_prompts: int
    aligner_mass: float | None = None
    ess: float | None = None
    kl_p_q: float | None = None
    kl_pi_p: float | None = None
    supported: float | None = None
    perplexity: float | None = None
    perplexity_alone: float | None = None
    quality: float | None = None
    quality_alone: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def has_broken(self) -> bool:
        """Whether support has broken here."""
        return bool(self.failures)


@dataclass(frozen=True, slots=True)
class StressReport:
    """All rungs in their order."""

    criterion: Criterion
    rungs: tuple[RungResult, ...]

    @property
    def first_broken(self) -> RungResult | None:
        """The first rung where support has broken; None if it holds on all."""
        return next((rung for rung in self.rungs if rung.has_broken), None)


def climb(
    bench: Bench,
    targets: Sequence[Target],
    *,
    criterion: Criterion = Criterion(),
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    on_progress: OnProgress = ignore_progress,
) -> StressReport:
    """Measure every rung, broken ones too: what lies behind the first one is worth seeing.

    Raises:
        DataError: a rung with neither an aligner nor a wanted answer: there is nothing to measure.
        RamError: what the bench and the judges raise.
    """
    results = []
    for target in targets:
        result = _Climber(bench.with_records(target.records), target, sampling, on_progress).measure()
        results.append(replace(result, failures=criterion.failures(result)))
    return StressReport(criterion, tuple(results))


class _Climber:
    """One rung."""

    def __init__(
        self, bench: Bench, target: Target, sampling: SamplingParams, on_progress: OnProgress
    ) -> None:
        self._bench = bench
        self._target = target
        self._on_progress = on_progress
        self._strength = target.rung.strength
        alignment = AlignmentParams()
        if target.aligner:
            manifest = bench.manifests[target.aligner]
            self._strength = manifest.strength if self._strength is None else self._strength
            alignment = AlignmentParams(terms=(AlignerTerm(target.aligner, self._strength),))
        self._aligned = Setting(target.rung.name, alignment, sampling)
        self._alone = replace(alone(sampling, alignment), label=f"{target.rung.name}, proposal alone")

    def measure(self) -> RungResult:
        result = RungResult(
            name=self._target.rung.name,
            strength=self._strength if self._target.aligner else None,
            num_prompts=len(self._bench.prompts),
        )
        if all(record.wanted for record in self._target.records):
            result = self._read_wanted(result)
        elif not self._target.aligner:
            raise DataError(f"rung `{result.name}` has no aligner, and a record of its data no wanted answer")
        answers = None
        if self._target.aligner:
            answers = self._bench.answer(self._aligned, self._on_progress)
            result = _with_telemetry(result, answers.telemetry)
        judge = self._target.judge
        if judge is None or not judge.can_score:
            return result
        proposal = self._bench.answer(self._alone, self._on_progress)
        return replace(
            result,
            quality=None if answers is None else self._score(judge, answers, proposal),
            quality_alone=self._score(judge, proposal, proposal),
        )

    def _read_wanted(self, result: RungResult) -> RungResult:
        settings = [self._alone] + [self._aligned] * bool(self._target.aligner)
        held: list[HeldOut] = score_held_out(
            self._bench, wanted_examples(self._bench), settings, self._on_progress
        )
        return replace(
            result,
            supported=held[-1].supported,
            perplexity=held[-1].perplexity if self._target.aligner else None,
            perplexity_alone=held[0].perplexity,
        )

    def _score(self, judge: Judge, answers: Answers, baseline: Answers) -> float | None:
        cases = [
            Case(record.messages, text, other, record.wanted)
            for record, text, other in zip(self._bench.records, answers.texts, baseline.texts, strict=True)
        ]
        scores = [score for score in judge.score(cases, self._on_progress) if score is not None]
        return fmean(scores) if scores else None


def _with_telemetry(result: RungResult, steps: Sequence[StepTelemetry]) -> RungResult:
    if not steps:
        return result
    return replace(
        result,
        aligner_mass=fmean(step.aligner_mass for step in steps),
        ess=fmean(step.ess for step in steps),
        kl_p_q=fmean(step.kl_p_q for step in steps),
        kl_pi_p=fmean(step.kl_pi_p for step in steps),
    )
