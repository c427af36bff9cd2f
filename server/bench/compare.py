"""Two results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ram_core.errors import RamError
from server.bench.report import Table
from server.bench.result import FORMAT

_TIMES = [
    ("TTFT", "ttft_s", ("mean", "p50", "p99")),
    ("ITL", "itl_s", ("mean", "p50", "p99")),
    ("TPOT", "tpot_s", ("mean", "p50", "p99")),
    ("E2E", "e2e_s", ("mean", "p50", "p99")),
]
_COUNTS = [
    ("Requests answered", "num_ok"),
    ("Requests a second", "requests_per_s"),
    ("Output tokens a second", "output_tokens_per_s"),
    ("Output tokens, mean", "mean_output_tokens"),
    ("Prompt tokens, mean", "mean_prompt_tokens"),
]


def read_result(path: Path) -> dict[str, Any]:
    """A file that `ram bench --json` wrote; raises `RamError` for any other."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RamError(f"Cannot read {path}: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise RamError(f"{path} is no result of `ram bench --json`.")
    return result


def compare(first: Path, second: Path) -> tuple[Table, list[str]]:
    """A table of figures with their ratios, second ÷ first, and a remark for each setting that differs."""
    results = [read_result(first), read_result(second)]
    a, b = (result["summary"] for result in results)
    rows = [_row(name, a[key], b[key]) for name, key in _COUNTS]
    for name, key, statistics in _TIMES:
        for statistic in statistics:
            values = [summary[key][statistic] * 1000 if summary[key] else None for summary in (a, b)]
            rows.append(_row(f"{name} {statistic}, ms", *values))
    shares = [summary["goodput"]["share"] if summary["goodput"] else None for summary in (a, b)]
    if shares != [None, None]:
        rows.append(_row("Goodput, share", *shares))
    rows.append(_row("Client's CPU, share of a core", *(result["client_cpu_share"] for result in results)))
    table = Table("Side by side", ["", first.name, second.name, "ratio"], rows)
    return table, _differences(results[0]["settings"], results[1]["settings"])


def _row(name: str, a: float | None, b: float | None) -> list[str]:
    ratio = f"{b / a:.3f}" if a and b is not None else "–"
    return [name, *("–" if value is None else f"{value:.2f}" for value in (a, b)), ratio]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [
        f"Settings differ: {name} is {json.dumps(a.get(name))}, then {json.dumps(b.get(name))}."
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
