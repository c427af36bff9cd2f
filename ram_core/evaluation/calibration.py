"""Which gate, and how many candidates, an aligner is to be served with: swept, chosen, and written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, quantiles

from ram_core.aligners.files import Snapshot
from ram_core.aligners.manifest import Manifest
from ram_core.aligners.pack import Wishes, pack
from ram_core.engine.messages import StepTelemetry
from ram_core.evaluation.answering import ALONE, Answers, Bench, Setting, alone
from ram_core.evaluation.held_out import HeldOut, score_held_out
from ram_core.evaluation.judges import Case, Judge, JudgeError
from ram_core.evaluation.recommendation import NO_GATE, Point, Quality, Recommendation, recommend
from ram_core.evaluation.wanted import wanted_examples
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams, require_range
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.errors import DataError

PAPER_THRESHOLDS = (0.05, 0.1, 0.2)
CANDIDATES = (5, 10, 20, 50)
PERPLEXITY = "−log perplexity of the wanted answers"
"""What quality is without a judge: nats a token, so that more is better, as with a judge."""

_KL_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
# Without a judge there is one figure for many answers: so many of them give the error.
_MAX_BLOCKS = 32
_WARM_UP_PROMPTS = 4
_WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found: the proposal alone, the aligner without a gate and with each, candidates."""

    aligner: str
    judge: str
    num_prompts: int
    proposal: Point
    gates: tuple[Point, ...]
    candidates: tuple[Point, ...]
    recommendation: Recommendation


def calibrate(
    bench: Bench,
    aligner: str,
    *,
    judge: Judge | None = None,
    thresholds: Sequence[float] = (),
    candidates: Sequence[int] = CANDIDATES,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    on_progress: OnProgress = ignore_progress,
) -> Calibration:
    """Sweep the gate and the number of candidates of one of the bench's aligners.

    It acts as its manifest says, but for what is swept. Without `thresholds`, quantiles of the KL(p‖q) that
    is seen and those of the paper are tried. Without a judge, quality is how probable the wanted answers are;
    the law of candidates has no closed form, so then none is recommended.

    Raises:
        DataError: there is no judge, and no wanted answers, or the aligner's own mode is `candidates`.
        InvalidRequest: a threshold or a number of candidates that cannot be.
        JudgeError: the judge failed, or has no verdict on any answer.
        RamError: what the bench raises.
    """
    for value in thresholds:
        require_range("thresholds", value, 0, math.inf)
    sweep = _Sweep(bench, aligner, judge, sampling, on_progress)
    sweep.warm_up()
    proposal = sweep.measure(alone(sampling, sweep.alignment))
    free = sweep.measure(sweep.setting(NO_GATE))
    grid = sorted(set(thresholds)) or default_thresholds(sweep.last.telemetry)
    gates = [sweep.measure(sweep.setting(f"gate {value:g}", kl_threshold=value)) for value in grid]
    counts = [
        sweep.measure(
            sweep.setting(f"{count} candidates", resampling=Resampling.CANDIDATES, num_candidates=count)
        )
        for count in sorted(set(candidates))
    ]
    if judge is None:
        proposal, free, *gates = sweep.read_wanted([proposal, free, *gates])
    return Calibration(
        aligner=aligner,
        judge=PERPLEXITY if judge is None else judge.name,
        num_prompts=len(bench.prompts),
        proposal=proposal,
        gates=(free, *gates),
        candidates=tuple(counts),
        recommendation=recommend(proposal, (free, *gates), counts),
    )


def write_recommendation(
    directory: Path, calibration: Calibration, snapshot: Snapshot, *, data: str
) -> Manifest:
    """Put a recommendation into the manifest of the aligner in a directory: wholly, or nothing changes.

    `snapshot` is of when the aligner was verified; `data` names what it was calibrated on. The version stays,
    since the files do; where there was no manifest, there is one then.

    Raises:
        CheckpointError: a file has changed since, or the manifest cannot be written.
    """
    snapshot.require_unchanged()
    found = calibration.recommendation
    words = f"{calibration.num_prompts} prompts of {data}; {calibration.judge}; {' '.join(found.reasons)}"
    wishes = Wishes(
        kl_threshold=found.kl_threshold, candidates=found.num_candidates, provenance={"calibration": words}
    )
    return pack(directory, wishes)


def default_thresholds(telemetry: Sequence[StepTelemetry]) -> list[float]:
    """The paper's thresholds, and quantiles of the KL(p‖q) that an aligner shows without a gate."""
    seen = [step.kl_p_q for step in telemetry if math.isfinite(step.kl_p_q)]
    grid = set(PAPER_THRESHOLDS)
    if len(seen) > 1:
        percentiles = quantiles(seen, n=100, method="inclusive")
        grid |= {float(f"{percentiles[round(share * 100) - 1]:.3g}") for share in _KL_QUANTILES}
    return sorted(grid)


class _Sweep:
    """What stays the same from one setting to the next; `last` has the last answers."""

    last: Answers

    def __init__(
        self,
        bench: Bench,
        aligner: str,
        judge: Judge | None,
        sampling: SamplingParams,
        on_progress: OnProgress,
    ) -> None:
        manifest = bench.manifests[aligner]
        self.alignment = AlignmentParams(
            terms=(AlignerTerm(aligner, manifest.strength),),
            resampling=(
                Resampling.PRODUCT if manifest.resampling is Resampling.PROPOSAL else manifest.resampling
            ),
            num_candidates=manifest.candidates or AlignmentParams().num_candidates,
        )
        self._bench = bench
        self._judge = judge
        self._examples = wanted_examples(bench) if judge is None else []
        self._sampling = sampling
        self._on_progress = on_progress
        self._settings: dict[str, Setting] = {}
        self._baseline: Answers | None = None
        if judge is None and not self._examples:
            raise DataError("no record has a wanted answer that fits into the context, so give a judge")
        if judge is None and self.alignment.resampling is Resampling.CANDIDATES:
            raise DataError(
                "the law of `candidates`, the aligner's own mode, has no closed form: give a judge"
            )

    def setting(self, label: str, **changes: float | Resampling) -> Setting:
        return Setting(label, replace(self.alignment, **changes), self._sampling)  # type: ignore[arg-type]

    def warm_up(self) -> None:
        """Let no setting pay for what happens once: code that is compiled, memory that is touched first."""
        prompts = self._bench.prompts[:_WARM_UP_PROMPTS]
        sampling = replace(self._sampling, seed=0, max_tokens=_WARM_UP_TOKENS)
        for mode in {self.alignment.resampling, Resampling.CANDIDATES}:
            alignment = self._bench.resolved(replace(self.alignment, resampling=mode))
            self._bench.engine.generate(prompts, sampling, alignment)

    def measure(self, setting: Setting) -> Point:
        answers = self.last = self._bench.answer(setting, self._on_progress)
        self._settings[setting.label] = setting
        if setting.label == ALONE:
            self._baseline = answers
        steps = answers.telemetry
        is_candidates = setting.alignment.resampling is Resampling.CANDIDATES
        return Point(
            label=setting.label,
            quality=self._quality(setting, answers),
            fallback_rate=_mean([step.is_fallback for step in steps]),
            kl_p_q=_mean([step.kl_p_q for step in steps]),
            kl_pi_p=_mean([step.kl_pi_p for step in steps]),
            ess=_mean([step.ess for step in steps], of_none=1.0),
            tokens_per_s=answers.num_tokens / answers.seconds,
            kl_threshold=setting.alignment.kl_threshold,
            num_candidates=setting.alignment.num_candidates if is_candidates else None,
        )

    def _quality(self, setting: Setting, answers: Answers) -> Quality | None:
        if self._judge is None:
            return None
        assert self._baseline is not None
        cases = [
            Case(record.messages, text, baseline, record.wanted)
            for record, text, baseline in zip(
                self._bench.records, answers.texts, self._baseline.texts, strict=True
            )
        ]
        if self._judge.can_score:
            values = self._judge.score(cases, self._on_progress)
        else:
            values = self._judge.compare(cases, self._on_progress).preferences
        if all(value is None for value in values):
            raise JudgeError(
                f"the judge `{self._judge.name}` has no verdict on any answer of {setting.label}"
            )
        return Quality(values)

    def read_wanted(self, points: Sequence[Point]) -> list[Point]:
        """The same points, with the wanted answers' mean log-probability a token as quality."""
        settings = [self._settings[point.label] for point in points]
        size = math.ceil(len(self._examples) / _MAX_BLOCKS)
        blocks = [self._examples[at : at + size] for at in range(0, len(self._examples), size)]
        found = []
        for done, block in enumerate(blocks, 1):
            found.append([_mean_log_prob(held) for held in score_held_out(self._bench, block, settings)])
            self._on_progress(Progress("reading wanted answers", done, len(blocks)))
        values = zip(*found, strict=True)
        return [replace(point, quality=Quality(each)) for point, each in zip(points, values, strict=True)]


def _mean_log_prob(held: HeldOut) -> float:
    assert held.perplexity is not None
    return -math.log(held.perplexity)


def _mean(values: Sequence[float], *, of_none: float = 0.0) -> float:
    return fmean(values) if values else of_none
