"""What alignment costs: the quality that a setting reaches against how far it moves from the proposal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ram_core.evaluation.preferences import Interval
from ram_core.evaluation.report import EvaluationReport, Row
from ram_core.params import Resampling


@dataclass(frozen=True)
class Point:
    """One setting: the mean `KL(π‖p)` of its tokens in nats, its quality and its share of fallbacks."""

    label: str
    strength: float
    kl_threshold: float
    kl_pi_p: float
    quality: Interval
    fallback_rate: float


@dataclass(frozen=True)
class Curve:
    """Settings that differ in one thing alone, in its order. `name` says what they have in common."""

    name: str
    points: tuple[Point, ...]


def quality_name(report: EvaluationReport) -> str:
    """What `quality_of` means in a report, "" if nothing judged it: a mean score, else a win rate."""
    if any(row.judged is not None and row.judged.score is not None for row in report.rows):
        return "mean score"
    if any(row.judged is not None and row.judged.win_rate is not None for row in report.rows):
        return "win rate"
    return ""


def quality_of(report: EvaluationReport, row: Row) -> Interval | None:
    """How good a row is, in what `quality_name` says; None if it was not judged. The proposal wins half."""
    if quality_name(report) == "mean score":
        return row.judged.score if row.judged else None
    if row.steps is None and quality_name(report):
        return Interval(0.5, 0.5, 0.5)
    return row.judged.win_rate if row.judged else None


def strength_curves(report: EvaluationReport) -> list[Curve]:
    """Quality against divergence as strength grows: a curve for each aligner and all else that is set.

    Each begins at the proposal, which is strength 0 and divergence 0. Rows without a judgement are left out.
    """
    origin = _points(report, report.rows[:1])
    curves = _curves(report, key=_but_strength, order=lambda point: point.strength)
    return [Curve(curve.name, (*origin, *curve.points)) for curve in curves]


def threshold_curves(report: EvaluationReport) -> list[Curve]:
    """Quality and fallbacks against the gate's threshold; no gate is the largest one.

    Only settings that were tried with two thresholds or more.
    """
    curves = _curves(report, key=_but_threshold, order=lambda point: point.kl_threshold)
    return [curve for curve in curves if len(curve.points) > 1]


def undominated(points: Iterable[Point]) -> tuple[Point, ...]:
    """The frontier: points that no other reaches in quality with as little divergence, by divergence."""
    kept: list[Point] = []
    best = -math.inf
    for point in sorted(points, key=lambda point: (point.kl_pi_p, -point.quality.value)):
        if point.quality.value > best:
            kept.append(point)
            best = point.quality.value
    return tuple(kept)


def _curves(
    report: EvaluationReport, *, key: Callable[[Row], str], order: Callable[[Point], float]
) -> list[Curve]:
    rows: dict[str, list[Row]] = {}
    for row in report.rows[1:]:
        rows.setdefault(key(row), []).append(row)
    curves = [Curve(name, tuple(sorted(_points(report, own), key=order))) for name, own in rows.items()]
    return [curve for curve in curves if curve.points]


def _points(report: EvaluationReport, rows: Sequence[Row]) -> list[Point]:
    points = []
    for row in rows:
        quality = quality_of(report, row)
        if quality is not None:
            kl_pi_p = row.steps.kl_pi_p if row.steps else 0.0
            fallback_rate = row.steps.fallback_rate if row.steps else 0.0
            threshold = row.setting.alignment.kl_threshold
            points.append(Point(row.label, row.strength, threshold, kl_pi_p, quality, fallback_rate))
    return points


def _but_strength(row: Row) -> str:
    return " ".join([row.aligner, *_mode(row), *_gate(row)])


def _but_threshold(row: Row) -> str:
    return " ".join([f"{row.aligner} × {row.strength:g}", *_mode(row)])


def _mode(row: Row) -> Iterable[str]:
    alignment = row.setting.alignment
    if alignment.resampling is Resampling.CANDIDATES:
        yield f"candidates {alignment.num_candidates}"
    elif alignment.resampling is not Resampling.PRODUCT:
        yield str(alignment.resampling)


def _gate(row: Row) -> Iterable[str]:
    threshold = row.setting.alignment.kl_threshold
    if threshold < math.inf:
        yield f"gate {threshold:g}"
