"""All that is kept of a run: settings, environment, figures, remarks, every request."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ram_core import __version__
from server.bench.client import Target
from server.bench.load import Load
from server.bench.run import Run
from server.bench.summary import (
    Objective,
    Schedule,
    Summary,
    summarise,
    summarise_models,
    summarise_schedule,
)

FORMAT = "ram-bench-1"
BUSY_CLIENT_SHARE = 0.7
LATE_LAG_S = 0.01
LATE_LAG_SHARE = 0.05
"""Of the mean time between requests."""
SHORT_ANSWER_SHARE = 0.95
CACHED_SHARE = 0.2


@dataclass(frozen=True)
class Result:
    """A run and what it says."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    run: Run
    summary: Summary
    models: dict[str, Summary]
    schedule: Schedule | None
    remarks: tuple[str, ...]

    @property
    def client_cpu_share(self) -> float:
        """Of one core; Python runs on one."""
        return self.run.cpu_s / self.run.wall_s if self.run.wall_s else 0.0

    def as_json(self) -> dict[str, Any]:
        """The result as plain data; times of requests are in seconds since the first was sent."""
        return {
            "format": FORMAT,
            "began_at": datetime.datetime.fromtimestamp(self.run.began_at, datetime.UTC).isoformat(),
            "settings": self.settings,
            "environment": self.environment,
            "wall_s": self.run.wall_s,
            "client_cpu_s": self.run.cpu_s,
            "client_cpu_share": self.client_cpu_share,
            "remarks": self.remarks,
            "summary": dataclasses.asdict(self.summary),
            "models": {name: dataclasses.asdict(summary) for name, summary in self.models.items()},
            "schedule": dataclasses.asdict(self.schedule) if self.schedule else None,
            "requests": [dataclasses.asdict(record) for record in self.run.records],
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def judge(target: Target, load: Load, run: Run, objectives: Sequence[Objective] = ()) -> Result:
    """Everything that can be said about a run."""
    summary = summarise(run.records, run.wall_s, objectives)
    schedule = summarise_schedule(run.records, load.rate_per_s) if load.rate_per_s is not None else None
    is_unique = load.data is None and not load.shared_prefix_tokens
    return Result(
        settings=_settings(target, load, objectives),
        environment=_environment(),
        run=run,
        summary=summary,
        models=summarise_models(run, objectives),
        schedule=schedule,
        remarks=tuple(_remarks(run, summary, schedule, is_unique=is_unique)),
    )


def _settings(target: Target, load: Load, objectives: Sequence[Objective]) -> dict[str, Any]:
    """All flags, but no secrets: of headers the names alone."""
    fields = {
        field.name: str(value) if isinstance(value := getattr(load, field.name), Path) else value
        for field in dataclasses.fields(load)
    }
    return {
        "url": target.base_url,
        "timeout_s": target.timeout_s,
        "needs_done": target.needs_done,
        "headers": sorted(target.headers),
        **fields,
        "models": dict(load.models),
        "extra_body": dict(load.extra_body),
        "objectives_s": {objective.measure: objective.limit_s for objective in objectives},
    }


def _environment() -> dict[str, Any]:
    return {
        "ram": __version__,
        "python": platform.python_version(),
        "aiohttp": aiohttp.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def _tolerated_lag_s(schedule: Schedule) -> float:
    return max(LATE_LAG_S, LATE_LAG_SHARE / schedule.asked_per_s)


def _remarks(run: Run, summary: Summary, schedule: Schedule | None, *, is_unique: bool) -> list[str]:
    """What a reader must know before trusting the figures."""
    remarks = []
    if run.wall_s and run.cpu_s / run.wall_s > BUSY_CLIENT_SHARE:
        remarks.append(
            f"The client itself was busy for {run.cpu_s / run.wall_s:.0%} of the time: it may be the limit."
        )
    if schedule and schedule.lag_s and schedule.lag_s.p99 > _tolerated_lag_s(schedule):
        remarks.append(
            f"Requests left up to {schedule.lag_s.max * 1000:.0f} ms late: the load was not quite as asked."
        )
    asked, got = summary.mean_asked_tokens, summary.mean_output_tokens
    if asked and got and got < SHORT_ANSWER_SHARE * asked:
        remarks.append(f"Answers were shorter than asked: {got:.1f} tokens of {asked:.1f} on average.")
    cached, prompt = summary.mean_cached_tokens, summary.mean_prompt_tokens
    if is_unique and cached and prompt and cached > CACHED_SHARE * prompt:
        remarks.append(
            f"{cached:.1f} of {prompt:.1f} prompt tokens were cached, though every prompt is new: "
            "the head of a chat template, or words that the model does not know (give its --tokenizer)."
        )
    if summary.num_ok and summary.tokens_from != "usage":
        remarks.append(
            "The server did not tell its usage in all answers: there a chunk is counted as a token."
        )
    return remarks
