"""What was measured of an aligner's version, so that versions can be compared before one is promoted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram

from server.metrics import OUTCOMES, Metrics

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """Counts since the server began, and means over aligned tokens, in nats; None is a mean of nothing.

    `fallbacks` are aligned tokens at which the gate fell back to the proposal.
    """

    requests: int
    errors: int
    tokens: int
    aligned_tokens: int
    fallbacks: int
    mean_kl_p_q: float | None
    mean_kl_pi_p: float | None
    mean_ess: float | None


def figures_of(metrics: Metrics, aligner: str, version: str) -> VersionFigures:
    """The figures of requests that this version answered alone, not together with other aligners."""
    labels = aligner, version
    return VersionFigures(
        requests=sum(_count(metrics.requests, (*labels, outcome)) for outcome in OUTCOMES),
        errors=_count(metrics.requests, (*labels, "error")),
        tokens=_count(metrics.generation_tokens, labels),
        aligned_tokens=_count(metrics.aligned_tokens, labels),
        fallbacks=_count(metrics.fallbacks, labels),
        mean_kl_p_q=_mean(metrics.kl_p_q, labels),
        mean_kl_pi_p=_mean(metrics.kl_pi_p, labels),
        mean_ess=_mean(metrics.ess, labels),
    )


# `labels(...)` would create a child where there is none, and `collect` would go through all of them.


def _count(counter: Counter, labels: Labels) -> int:
    child: Any = counter._metrics.get(labels)
    return 0 if child is None else int(child._value.get())


def _mean(histogram: Histogram, labels: Labels) -> float | None:
    child: Any = histogram._metrics.get(labels)
    count = 0 if child is None else sum(bucket.get() for bucket in child._buckets)
    if child is None or not count:
        return None
    mean = float(child._sum.get()) / count
    return mean if math.isfinite(mean) else None
