"""What the server counts: `ram_*` is the truth, `vllm:*` the same under the names that dashboards expect."""

from __future__ import annotations

import logging
import math
import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ram_core.engine.client import EngineClient
from ram_core.engine.messages import EngineStats, StepTelemetry
from server.settings import IDENTITY

SEVERAL = "several"
"""The label of requests that combine aligners: combinations are the client's choice, and so unbounded."""

GONE = "(gone)"
"""The label of versions that are not known any more: over time there may be any number of them."""

Outcome = Literal["stop", "length", "abort", "error"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error")

MAX_FIELD_NAMES = 64
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_LATENCY_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_NATS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
_FRACTION_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_TELL_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AlignerFigures:
    """The aligners at one moment. `resident` answer from memory, `coming` are on their way there."""

    states: Mapping[str, int]
    resident: tuple[str, ...]
    coming: tuple[str, ...]
    held_bytes: int
    memory_bytes: int
    num_waiting: int
    num_loads: int
    num_failures: int


class Metrics:
    """All metrics of one app, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._field_names: set[str] = set()
        label = ("aligner", "version")

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"ram_{name}", text, label, registry=self.registry, buckets=tuple(buckets))

        def counter(name: str, text: str, labels: tuple[str, ...] = label) -> Counter:
            return Counter(f"ram_{name}", text, labels, registry=self.registry)

        self.first_token_s = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_BUCKETS_S
        )
        self.inter_token_s = histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", _TOKEN_BUCKETS_S
        )
        self.request_s = histogram(
            "e2e_request_latency_seconds", "From arrival to the end of the answer.", _LATENCY_BUCKETS_S
        )
        self.queue_s = histogram("request_queue_time_seconds", "Waiting for a place.", _LATENCY_BUCKETS_S)
        self.prompt_tokens = counter("prompt_tokens", "Tokens read.")
        self.generation_tokens = counter("generation_tokens", "Tokens drawn.")
        self.requests = counter("requests_finished", "Requests by how they ended.", (*label, "reason"))
        self.kl_p_q = histogram("kl_p_q_nats", "KL(p||q) of each aligned token.", _NATS_BUCKETS)
        self.kl_pi_p = histogram("kl_pi_p_nats", "KL(pi||p) of each aligned token.", _NATS_BUCKETS)
        self.ess = histogram(
            "ess_fraction", "Effective sample size of each aligned token.", _FRACTION_BUCKETS
        )
        self.aligned_tokens = counter("aligned_tokens", "Tokens drawn with an aligner in play.")
        self.fallbacks = counter("fallbacks", "Aligned tokens at which the gate fell back to the proposal.")
        self.http_requests = counter("http_requests", "Answers by route and status.", ("route", "status"))
        self.unknown_fields = counter("unknown_fields", "Request fields that nobody knows.", ("field",))
        by_tenant = ("tenant", "aligner")
        self.tenant_requests = counter("tenant_requests", "Requests of a tenant that ended.", by_tenant)
        self.tenant_prompt_tokens = counter("tenant_prompt_tokens", "Tokens of its prompts.", by_tenant)
        self.tenant_cached_tokens = counter("tenant_cached_tokens", "Of these, found in cache.", by_tenant)
        self.tenant_completion_tokens = counter("tenant_completion_tokens", "Tokens drawn for it.", by_tenant)
        self.tenant_refusals = counter(
            "tenant_refusals", "Requests over a tenant's limit.", ("tenant", "limit")
        )
        self.usage_log_errors = counter("usage_log_errors", "Lines that the usage log has lost.", ())
        self._model_name = model_name
        for aligner in (IDENTITY, SEVERAL):
            self.add_version(aligner, "")
        self.registry.register(_EcosystemNames(self, model_name))

    def open(self, engine: EngineClient, figures: Callable[[], AlignerFigures]) -> None:
        """Follow the engine's and the aligners' figures."""
        self.registry.register(_EngineFigures(engine, self._model_name))
        self.registry.register(_AlignerFigures(figures))

    def add_version(self, aligner: str, version: str) -> None:
        """Create the label children of an aligner's version, so that rates start at 0."""
        for metric, labels in self._children(aligner, version):
            metric.labels(*labels)

    def drop_version(self, aligner: str, version: str) -> None:
        """A version is not known any more: what was counted of it joins all others that are gone."""
        for metric, labels in self._children(aligner, version):
            if (child := metric._metrics.get(labels)) is not None:
                _add_up(child, metric.labels(GONE, "", *labels[2:]))
                metric.remove(*labels)

    def _children(self, aligner: str, version: str) -> list[tuple[Counter | Histogram, tuple[str, ...]]]:
        by_aligner: tuple[Counter | Histogram, ...] = (
            *(self.first_token_s, self.inter_token_s, self.request_s, self.queue_s),
            *(self.prompt_tokens, self.generation_tokens, self.kl_p_q, self.kl_pi_p, self.ess),
            *(self.aligned_tokens, self.fallbacks),
        )
        return [
            *((metric, (aligner, version)) for metric in by_aligner),
            *((self.requests, (aligner, version, outcome)) for outcome in OUTCOMES),
        ]

    def count_unknown_field(self, name: str) -> None:
        """Count a field by its name, log it the first time; after many names, all new ones share a label."""
        if name not in self._field_names:
            if len(self._field_names) >= MAX_FIELD_NAMES or not _FIELD_NAME.fullmatch(name):
                self.unknown_fields.labels("(other)").inc()
                return
            self._field_names.add(name)
            logger.warning("Requests hold the unknown field `%s`; it is ignored.", name)
        self.unknown_fields.labels(name).inc()


class _Observations:
    """What one request adds to a histogram, gathered and told now and then.

    prometheus_client searches buckets in Python and locks twice for each value; here it is 0.3 µs.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._bounds: list[float] = histogram._upper_bounds
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def tell(self) -> None:
        """Hand on what was gathered."""
        for bucket, count in zip(self._histogram._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(self._sum)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0


class _Drawn(Struct, gc=False):
    """A token of a choice, when it came, and what the aligner did to it."""

    choice: int
    at_s: float
    telemetry: StepTelemetry | None


class Meter:
    """Measures one request; `arrived_s` is on `time.perf_counter`'s clock.

    `answered` is the aligner and its version, or a word for none or several and nothing. What is counted for
    each token is told every `_TELL_S` seconds, and at the end.
    """

    def __init__(self, metrics: Metrics, answered: tuple[str, str], arrived_s: float) -> None:
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._has_none = True
        self._last_token_s: dict[int, float] = {}
        self._first_token_s = metrics.first_token_s.labels(*answered)
        self._inter_token_s = _Observations(metrics.inter_token_s.labels(*answered))
        self._queue_s = metrics.queue_s.labels(*answered)
        self._request_s = metrics.request_s.labels(*answered)
        self._prompt_tokens = metrics.prompt_tokens.labels(*answered)
        self._generation_tokens = metrics.generation_tokens.labels(*answered)
        self._kl_p_q = _Observations(metrics.kl_p_q.labels(*answered))
        self._kl_pi_p = _Observations(metrics.kl_pi_p.labels(*answered))
        self._ess = _Observations(metrics.ess.labels(*answered))
        self._aligned_tokens = metrics.aligned_tokens.labels(*answered)
        self._fallbacks = metrics.fallbacks.labels(*answered)
        self._answered = answered
        self._told_s = arrived_s
        self._drawn: list[_Drawn] = []

    def started(self, queue_s: float, num_prompt_tokens: int) -> None:
        self._queue_s.observe(queue_s)
        self._prompt_tokens.inc(num_prompt_tokens)

    def token(self, choice: int, telemetry: StepTelemetry | None) -> None:
        now_s = time.perf_counter()
        if self._has_none:
            self._has_none = False
            self._first_token_s.observe(now_s - self._arrived_s)
        self._drawn.append(_Drawn(choice, now_s, telemetry))
        if now_s - self._told_s > _TELL_S:
            self._told_s = now_s
            self._tell()

    def _tell(self) -> None:
        """Count what was drawn since the last time: all at once, that is a fraction of one by one."""
        drawn, self._drawn = self._drawn, []
        for token in drawn:
            last_s = self._last_token_s.get(token.choice)
            if last_s is not None:
                self._inter_token_s.observe(token.at_s - last_s)
            self._last_token_s[token.choice] = token.at_s
        self._generation_tokens.inc(len(drawn))
        self._tell_aligned([token.telemetry for token in drawn if token.telemetry is not None])
        for observations in (self._inter_token_s, self._kl_p_q, self._kl_pi_p, self._ess):
            observations.tell()

    def _tell_aligned(self, figures: list[StepTelemetry]) -> None:
        self._aligned_tokens.inc(len(figures))
        self._fallbacks.inc(sum(each.is_fallback for each in figures))
        for each in figures:
            for metric, value in (
                (self._kl_p_q, each.kl_p_q),
                (self._kl_pi_p, each.kl_pi_p),
                (self._ess, each.ess),
            ):
                if not math.isnan(value):
                    metric.observe(value)

    def ended(self, outcome: Outcome) -> None:
        self._tell()
        self._metrics.requests.labels(*self._answered, outcome).inc()
        if outcome in ("stop", "length"):
            self._request_s.observe(time.perf_counter() - self._arrived_s)


class _EngineFigures(Collector):
    """The engine's own figures, read when asked for."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        usage = stats.num_pages_used / stats.num_pages if stats.num_pages else 0.0
        yield GaugeMetricFamily("ram_requests_running", "Sequences in the batch.", stats.num_running)
        yield GaugeMetricFamily("ram_requests_waiting", "Sequences in the queue.", stats.num_waiting)
        yield GaugeMetricFamily("ram_kv_pages_used", "Pages of KV memory in use.", stats.num_pages_used)
        yield GaugeMetricFamily("ram_kv_pages_total", "Pages of KV memory.", stats.num_pages)
        yield GaugeMetricFamily("ram_kv_usage_ratio", "Part of KV memory in use.", usage)
        yield CounterMetricFamily("ram_engine_steps", "Steps of the engine.", stats.num_steps)
        restarts = self._engine.num_restarts
        yield CounterMetricFamily("ram_engine_restarts", "Deaths of the engine that were mended.", restarts)
        for name, elsewhere, text, value in _counts(stats):
            yield CounterMetricFamily(f"ram_{name}", text, value)
            if elsewhere:
                counter = CounterMetricFamily(f"vllm:{elsewhere}", text, labels=["model_name"])
                counter.add_metric([self._model_name], value)
                yield counter
        yield self._renamed("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._renamed("num_requests_waiting", "Sequences in the queue.", stats.num_waiting)
        yield self._renamed("kv_cache_usage_perc", "Part of KV memory in use.", usage)

    def _renamed(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge


def _counts(stats: EngineStats) -> list[tuple[str, str, str, int]]:
    """What an engine counts from its start on: our name, vLLM's or none, text and value."""
    queries, hits = "prefix_cache_queries", "prefix_cache_hits"
    return [
        ("preemptions", "num_preemptions", "Sequences that gave way to others.", stats.num_preemptions),
        (queries, queries, "Tokens of prompts that were looked for in the cache.", stats.num_prompt_tokens),
        (hits, hits, "Tokens of prompts that were found in the cache.", stats.num_cached_tokens),
        ("out_of_memory", "", "Sequences that did not fit into memory.", stats.num_out_of_memory),
        ("non_finite_logits", "", "Sequences that ended by non-finite numbers of a model.", stats.num_failed),
    ]


class _AlignerFigures(Collector):
    """What the registry of aligners is at, read when asked for."""

    def __init__(self, figures: Callable[[], AlignerFigures]) -> None:
        self._figures = figures
        self._told: tuple[str, str] | None = None
        self._changed_s = time.time()

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        states = GaugeMetricFamily("ram_aligner_versions", "Versions by their state.", labels=["state"])
        for state, count in figures.states.items():
            states.add_metric([state], count)
        yield states
        held = figures.held_bytes
        yield GaugeMetricFamily("ram_aligner_memory_bytes", "Memory that aligners hold.", held)
        limit = figures.memory_bytes
        yield GaugeMetricFamily("ram_aligner_memory_limit_bytes", "Memory that aligners may hold.", limit)
        waiting = figures.num_waiting
        yield GaugeMetricFamily("ram_aligner_requests_waiting", "Requests that wait for aligners.", waiting)
        yield CounterMetricFamily("ram_aligner_loads", "Aligners brought into memory.", figures.num_loads)
        failures = figures.num_failures
        yield CounterMetricFamily("ram_aligner_load_failures", "Aligners that could not be.", failures)
        yield self._for_gateways(figures)

    def _for_gateways(self, figures: AlignerFigures) -> Metric:
        """What inference gateways read to route a request to where its aligner is; exactly one sample."""
        resident, waiting = ",".join(figures.resident), ",".join(figures.coming)
        if self._told != (resident, waiting):
            self._told, self._changed_s = (resident, waiting), time.time()
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Resident aligners.", labels=labels)
        info.add_metric([str(len(figures.resident)), resident, waiting], self._changed_s)
        return info


class _EcosystemNames(Collector):
    """Our figures, summed over aligners, under vLLM's names."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield self._histogram("time_to_first_token_seconds", metrics.first_token_s)
        yield self._histogram("inter_token_latency_seconds", metrics.inter_token_s)
        yield self._histogram("e2e_request_latency_seconds", metrics.request_s)
        yield self._histogram("request_queue_time_seconds", metrics.queue_s)
        yield self._counter("prompt_tokens", metrics.prompt_tokens)
        yield self._counter("generation_tokens", metrics.generation_tokens)
        yield self._successes()

    def _histogram(self, name: str, source: Histogram) -> Metric:
        buckets: dict[str, float] = defaultdict(float)
        total = 0.0
        for sample in _samples(source):
            if sample[0].endswith("_bucket"):
                buckets[sample[1]["le"]] += sample[2]
            elif sample[0].endswith("_sum"):
                total += sample[2]
        family = HistogramMetricFamily(f"vllm:{name}", source._documentation, labels=["model_name"])
        family.add_metric([self._model_name], list(buckets.items()), total)
        return family

    def _counter(self, name: str, source: Counter) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", source._documentation, labels=["model_name"])
        values = (value for sample_name, _, value in _samples(source) if sample_name.endswith("_total"))
        family.add_metric([self._model_name], sum(values))
        return family

    def _successes(self) -> Metric:
        counts: dict[str, float] = defaultdict(float)
        for name, labels, value in _samples(self._metrics.requests):
            if name.endswith("_total") and labels["reason"] != "error":
                counts[labels["reason"]] += value
        family = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in counts.items():
            family.add_metric([self._model_name, reason], count)
        return family


def _add_up(child: Any, total: Any) -> None:
    """Add what one child of a counter or histogram has to another's."""
    if isinstance(child, Counter):
        total._value.inc(child._value.get())
        return
    for bucket, into in zip(child._buckets, total._buckets, strict=True):
        into.inc(bucket.get())
    total._sum.inc(child._sum.get())


def _samples(source: Counter | Histogram) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in source.collect():
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
