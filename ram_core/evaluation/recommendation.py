"""Which of the settings that were measured an aligner is to be served with.

A gate is the better the less the proposal is moved (KL(π‖p)) while quality stays. So of all settings that are
no worse than the best one by more than a standard error of the difference, that with the least KL(π‖p) is
recommended. All settings answer the same prompts with the same noise, so differences are taken in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ram_core.evaluation.answering import ALONE

NO_GATE = "no gate"


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a setting's answers are: the mean of `values`, and its standard error.

    `values` are of single prompts, or without a judge of blocks of prompts, the same in every setting; None
    where there is none.
    """

    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float:
        return fmean(self.known)

    @property
    def error(self) -> float:
        known = self.known
        return stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0

    def is_matched_by(self, other: Quality) -> bool:
        """Whether the other is no worse than this by more than a standard error of their difference."""
        pairs = zip(self.values, other.values, strict=True)
        lost = [mine - its for mine, its in pairs if mine is not None and its is not None]
        if not lost:
            return False
        error = stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        return fmean(lost) <= error


@dataclass(frozen=True, slots=True)
class Point:
    """A setting that was measured.

    `kl_threshold` infinity is no gate, `num_candidates` is for that mode alone. `quality` is None where it
    cannot be told. KLs are means in nats over drawn tokens, `kl_pi_p` 0 on a fallback; for candidates it is
    that of the law which many of them tend to. `ess` and `fallback_rate` are fractions.
    """

    label: str
    quality: Quality | None
    fallback_rate: float
    kl_p_q: float
    kl_pi_p: float
    ess: float
    tokens_per_s: float
    kl_threshold: float = math.inf
    num_candidates: int | None = None

    @property
    def is_aligned(self) -> bool:
        """Whether it is not the proposal alone, of which no aligner can tell anything."""
        return self.label != ALONE


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What a manifest should say, and why: `kl_threshold` infinity is no gate.

    `num_candidates` None recommends no number. `reasons` are whole sentences.
    """

    kl_threshold: float
    num_candidates: int | None
    reasons: tuple[str, ...]


def recommend(proposal: Point, gates: Sequence[Point], candidates: Sequence[Point]) -> Recommendation:
    """Choose from points that were measured; the first of `gates` is no gate.

    Raises:
        ValueError: a gate without a quality.
    """
    gate, reason = _choose_gate(gates)
    reasons = [reason]
    assert proposal.quality is not None
    assert gates[0].quality is not None
    if gates[0].quality.mean <= proposal.quality.mean:
        reasons.append("The aligner is no better than the proposal alone here: look at its data first.")
    judged = [point for point in candidates if point.quality is not None]
    num_candidates = None
    if judged:
        num_candidates, reason = _choose_candidates(judged, gates[0])
        reasons.append(reason)
    elif candidates:
        reasons.append("No number of candidates: their law has no closed form, so give a judge.")
    return Recommendation(gate.kl_threshold, num_candidates, tuple(reasons))


def _choose_gate(gates: Sequence[Point]) -> tuple[Point, str]:
    best = _best(gates)
    assert best.quality is not None
    # The rule that the head of this module states.
    matching = [gate for gate in gates if gate.quality and best.quality.is_matched_by(gate.quality)]
    # Where a gate changes nothing, it had better not be there.
    chosen = min(matching, key=lambda gate: (gate.kl_pi_p, -gate.kl_threshold))
    if chosen.label == NO_GATE:
        others = len(gates) - 1
        return chosen, (
            f"No gate: each of the {others} gates costs quality beyond the error, or does not lower KL(π‖p)."
            if others
            else "No gate: none was tried."
        )
    return chosen, (
        f"Gate at {chosen.kl_threshold:g} nats: the least KL(π‖p), {chosen.kl_pi_p:.3f}, whose quality is "
        f"within one standard error of the best ({best.label})."
    )


def _choose_candidates(candidates: Sequence[Point], product: Point) -> tuple[int, str]:
    best = _best(candidates)
    assert best.quality is not None
    assert product.quality is not None
    chosen = next(
        point for point in candidates if point.quality and best.quality.is_matched_by(point.quality)
    )
    assert chosen.num_candidates is not None
    assert chosen.quality is not None
    is_as_good = product.quality.is_matched_by(chosen.quality)
    than = "no worse than" if is_as_good else f"worse ({chosen.quality.mean:.3f}) than"
    return chosen.num_candidates, (
        f"{chosen.num_candidates} candidates, where that mode is asked for: the fewest whose quality is "
        f"within one standard error of the best of them ({best.num_candidates}). That is {than} "
        f"the aligner's own mode ({product.quality.mean:.3f})."
    )


def _best(points: Sequence[Point]) -> Point:
    """The point of the highest quality; of equal ones, the first."""

    def mean(point: Point) -> float:
        if point.quality is None:
            raise ValueError(f"`{point.label}` has no quality")
        return point.quality.mean

    return max(points, key=mean)
