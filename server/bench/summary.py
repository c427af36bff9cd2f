"""Figures of a run: percentiles, rates, goodput, failures by kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ram_core.errors import RamError
from server.bench.record import Record
from server.bench.run import Run

TokensFrom = Literal["usage", "chunks", "usage and chunks"]


@dataclass(frozen=True)
class Distribution:
    """What a sample looks like; percentiles are interpolated linearly between order statistics."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def describe(values: Iterable[float]) -> Distribution | None:
    """None where there is nothing to describe."""
    sample = np.fromiter(values, dtype=np.float64)
    if not sample.size:
        return None
    p50, p90, p95, p99 = np.percentile(sample, [50, 90, 95, 99]).tolist()
    return Distribution(int(sample.size), float(sample.mean()), p50, p90, p95, p99, float(sample.max()))


@dataclass(frozen=True)
class Objective:
    """A time that a request shall not exceed."""

    measure: str
    limit_s: float

    def is_met(self, record: Record) -> bool:
        """A failed request meets nothing; one that has no such time, such as a gap, has not exceeded it."""
        if not record.is_ok:
            return False
        value = MEASURES[self.measure](record)
        return value is None or value <= self.limit_s


def _mean_gap(record: Record) -> float | None:
    gaps = record.gaps_s
    return math.fsum(gaps) / len(gaps) if gaps else None


MEASURES: dict[str, Callable[[Record], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "itl": _mean_gap,
    "tpot": lambda record: record.tpot_s,
    "e2e": lambda record: record.e2e_s,
}
_OBJECTIVE = re.compile(rf"({'|'.join(MEASURES)})=(\d+(?:\.\d+)?)(ms|s)")


def parse_objective(text: str) -> Objective:
    """Read `ttft=500ms`; raises `RamError`."""
    match = _OBJECTIVE.fullmatch(text.strip())
    if match is None:
        raise RamError(f"An SLO is one of {', '.join(MEASURES)}, `=`, and a time in ms or s; got `{text}`.")
    measure, number, unit = match.groups()
    return Objective(measure, float(number) / (1000 if unit == "ms" else 1))


@dataclass(frozen=True)
class Goodput:
    """Requests that met every objective, among all that were sent."""

    num_good: int
    share: float
    requests_per_s: float


@dataclass(frozen=True)
class Summary:
    """Figures of a run, or of one model in it; times in seconds, of answered requests alone."""

    num_requests: int
    num_ok: int
    failures: dict[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    tokens_from: TokensFrom
    tokens_per_chunk: float | None
    mean_asked_tokens: float | None
    mean_output_tokens: float | None
    mean_prompt_tokens: float | None
    mean_cached_tokens: float | None
    goodput: Goodput | None

    @property
    def num_failed(self) -> int:
        return self.num_requests - self.num_ok


@dataclass(frozen=True)
class Schedule:
    """How well an open loop kept its times."""

    asked_per_s: float
    drawn_per_s: float | None
    sent_per_s: float | None
    lag_s: Distribution | None


def summarise(records: Sequence[Record], wall_s: float, objectives: Sequence[Objective] = ()) -> Summary:
    """Figures of `records`, whose rates are over `wall_s`."""
    answered = [record for record in records if record.is_ok]
    num_tokens = sum(record.num_output_tokens for record in answered)
    prompts = [record.prompt_tokens for record in answered if record.prompt_tokens is not None]
    num_chunks = sum(len(record.chunk_times_s) for record in answered)
    span_s = wall_s or math.inf
    return Summary(
        num_requests=len(records),
        num_ok=len(answered),
        failures=dict(Counter(record.failure.label for record in records if record.failure).most_common()),
        requests_per_s=len(answered) / span_s,
        output_tokens_per_s=num_tokens / span_s,
        total_tokens_per_s=(num_tokens + sum(prompts)) / span_s if len(prompts) == len(answered) else None,
        ttft_s=describe(record.ttft_s for record in answered),
        itl_s=describe(gap for record in answered for gap in record.gaps_s),
        tpot_s=describe(tpot_s for record in answered if (tpot_s := record.tpot_s) is not None),
        e2e_s=describe(record.e2e_s for record in answered),
        tokens_from=_tokens_from(answered),
        tokens_per_chunk=num_tokens / num_chunks if num_chunks else None,
        mean_asked_tokens=_mean([record.num_asked_tokens for record in answered]),
        mean_output_tokens=num_tokens / len(answered) if answered else None,
        mean_prompt_tokens=_mean(prompts),
        mean_cached_tokens=_mean([r.cached_tokens for r in answered if r.cached_tokens is not None]),
        goodput=_goodput(records, span_s, objectives),
    )


def summarise_models(run: Run, objectives: Sequence[Objective] = ()) -> dict[str, Summary]:
    """A summary for each model, over the whole run's time."""
    names = sorted({record.model for record in run.records})
    return {
        name: summarise([record for record in run.records if record.model == name], run.wall_s, objectives)
        for name in names
    }


def summarise_schedule(records: Sequence[Record], asked_per_s: float) -> Schedule:
    """Of the records of an open loop, in the order in which they were sent."""
    planned = [record.planned_s for record in records if record.planned_s is not None]
    lags = (lag_s for record in records if (lag_s := record.lag_s) is not None)
    return Schedule(
        asked_per_s=asked_per_s,
        drawn_per_s=_rate(planned),
        sent_per_s=_rate([record.sent_s for record in records]),
        lag_s=describe(lags),
    )


def _goodput(records: Sequence[Record], span_s: float, objectives: Sequence[Objective]) -> Goodput | None:
    if not objectives or not records:
        return None
    num_good = sum(all(objective.is_met(record) for objective in objectives) for record in records)
    return Goodput(num_good, num_good / len(records), num_good / span_s)


def _tokens_from(answered: Sequence[Record]) -> TokensFrom:
    has_usage = {record.output_tokens is not None for record in answered}
    if has_usage == {True, False}:
        return "usage and chunks"
    return "chunks" if has_usage == {False} else "usage"


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _rate(times: Sequence[float]) -> float | None:
    """Events a second, from the first event to the last."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
