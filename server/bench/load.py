"""What is sent, and when: the same settings make the same load, byte by byte."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ram_core.errors import RamError
from server.bench.lengths import Lengths, parse_lengths
from server.bench.prompts import (
    PLAIN,
    RecordedTalks,
    SyntheticTalks,
    Vocabulary,
    load_vocabulary,
    read_talks,
)

Arrivals = Literal["poisson", "constant"]
Phase = Literal["measured", "warmup"]

_PREFIX_NOISE, _ARRIVAL_NOISE, _ORDER_NOISE, _REQUEST_NOISE = range(4)
_PHASES: dict[Phase, int] = {"measured": 0, "warmup": 1}


@dataclass(frozen=True)
class Load:
    """The settings of a load.

    With a rate the loop is open: requests leave at times drawn beforehand, whatever the server does; a
    concurrency then only caps how many may run at once. Without a rate it is closed: so many streams send
    their next request when the last one has ended. The run ends after `num_requests`, or sends nothing new
    after `duration_s`, whichever comes first.
    """

    models: tuple[tuple[str, float], ...] = ()
    rate_per_s: float | None = None
    arrivals: Arrivals = "poisson"
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 8
    seed: int = 0
    prompt_tokens: str = "64"
    output_tokens: str = "64"
    shared_prefix_tokens: int = 0
    data: Path | None = None
    tokenizer: Path | None = None
    ignores_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate_per_s is None and self.concurrency is None:
            raise RamError("Either a rate or a concurrency is needed.")
        if self.num_requests is None and self.duration_s is None:
            raise RamError("Either a number of requests or a duration is needed.")
        _positive("rate", self.rate_per_s)
        _positive("duration", self.duration_s)
        _positive("concurrency", self.concurrency)
        _positive("requests", self.num_requests)
        for name, value in (("warmup", self.num_warmup), ("shared-prefix", self.shared_prefix_tokens)):
            if value < 0:
                raise RamError(f"`{name}` is at least 0; got {value}.")
        if self.seed < 0:
            raise RamError(f"`seed` is at least 0; got {self.seed}.")
        if self.data is not None and self.shared_prefix_tokens:
            raise RamError("A shared prefix goes with synthetic prompts, not with conversations from a file.")


@dataclass(frozen=True)
class PlannedRequest:
    """One request, ready to be sent."""

    index: int
    model: str
    num_asked_tokens: int
    body: bytes


class RequestSource:
    """Makes the requests of a load; each depends on the settings and its own number alone."""

    def __init__(self, load: Load) -> None:
        if not load.models:
            raise RamError("At least one model is needed.")
        self._load = load
        self._names = [name for name, _ in load.models]
        weights = np.array([weight for _, weight in load.models])
        self._shares = weights / weights.sum()
        self._output_lengths = parse_lengths(load.output_tokens)
        prompt_lengths = parse_lengths(load.prompt_tokens)
        vocabulary = load_vocabulary(load.tokenizer) if load.tokenizer else None
        self._talks = self._make_talks(prompt_lengths, vocabulary)

    def _make_talks(
        self, prompt_lengths: Lengths, vocabulary: Vocabulary | None
    ) -> SyntheticTalks | RecordedTalks:
        load = self._load
        if load.data is not None:
            talks = read_talks(load.data, count=vocabulary.count if vocabulary else None)
            return RecordedTalks(talks, np.random.default_rng([load.seed, _ORDER_NOISE]))
        return SyntheticTalks(
            prompt_lengths,
            vocabulary=vocabulary or PLAIN,
            num_shared_tokens=load.shared_prefix_tokens,
            noise=np.random.default_rng([load.seed, _PREFIX_NOISE]),
        )

    def request(self, index: int, phase: Phase = "measured") -> PlannedRequest:
        """Request number `index`; those of the warm-up are others, so that no cache knows the rest."""
        noise = np.random.default_rng([self._load.seed, _REQUEST_NOISE, _PHASES[phase], index])
        model = self._names[noise.choice(len(self._names), p=self._shares)]
        num_tokens = self._output_lengths.draw(noise)
        talk = self._talks.talk(index, noise)
        num_tokens = talk.num_answer_tokens or num_tokens
        fields: dict[str, Any] = {
            "model": model,
            "messages": talk.messages,
            "max_tokens": num_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._load.ignores_eos:
            fields["ignore_eos"] = True
        fields |= self._load.extra_body
        # A null in the extra body takes a field back that a strict server does not know.
        body = {name: value for name, value in fields.items() if value is not None}
        return PlannedRequest(index, model, num_tokens, json.dumps(body).encode())


def arrival_times(load: Load) -> list[float]:
    """When the requests of an open loop shall leave, in seconds; the first leaves at 0."""
    assert load.rate_per_s is not None
    noise = np.random.default_rng([load.seed, _ARRIVAL_NOISE])
    times: list[float] = []
    for index in itertools.count():
        if load.arrivals == "constant":
            next_s = index / load.rate_per_s
        else:
            next_s = times[-1] + noise.exponential(1 / load.rate_per_s) if times else 0.0
        is_over = load.duration_s is not None and next_s >= load.duration_s
        if is_over or (load.num_requests is not None and index >= load.num_requests):
            break
        times.append(next_s)
    return times


def parse_models(texts: list[str]) -> tuple[tuple[str, float], ...]:
    """Read `NAME` or `NAME=WEIGHT`; raises `RamError`."""
    models: dict[str, float] = {}
    for text in texts:
        name, equals, weight_text = text.rpartition("=")
        try:
            weight = float(weight_text) if equals else 1.0
        except ValueError:
            weight = math.nan
        name = name if equals else text
        if not name or not 0 < weight < math.inf:
            raise RamError(f"A model is NAME or NAME=WEIGHT with a weight above 0; got `{text}`.")
        if name in models:
            raise RamError(f"Model `{name}` is named twice.")
        models[name] = weight
    return tuple(models.items())


def _positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise RamError(f"`{name}` is above 0; got {value:g}.")
