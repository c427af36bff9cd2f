"""A picture of a run: how long answers took, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ram_core.errors import RamError
from server.bench.record import Record
from server.bench.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
NUM_BINS = 100
MIN_BIN_S = 0.1


def check_can_plot(path: Path) -> None:
    """Raises `RamError` where `plot` would: told before the load is sent."""
    if path.suffix.lower() not in SUFFIXES:
        raise RamError(f"A plot's file ends with {' or '.join(SUFFIXES)}; got `{path}`.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RamError("Plots need matplotlib: pip install 'ram-server[bench]'.") from None


def plot(result: Result, path: Path) -> None:
    """Write distributions of TTFT and ITL, and a timeline of requests and tokens, as PNG or SVG."""
    check_can_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (ttft_axes, itl_axes), (running_axes, rate_axes) = figure.subplots(2, 2)
    by_model = {
        name: [record for record in result.run.records if record.model == name and record.is_ok]
        for name in result.models
    }
    for name, records in by_model.items():
        _draw_ecdf(ttft_axes, [record.ttft_s for record in records], name)
        _draw_ecdf(itl_axes, [gap for record in records for gap in record.gaps_s], name)
    for axes, title in ((ttft_axes, "Time to first token"), (itl_axes, "Inter-token latency")):
        axes.set(title=title, xlabel="ms", ylabel="share at most so long", ylim=(0, 1))
        axes.grid(alpha=0.3)
    if len(by_model) > 1:
        ttft_axes.legend(fontsize="small")
    _draw_running(running_axes, result.run.records)
    _draw_rates(rate_axes, result.run.records, result.run.wall_s)
    figure.suptitle(f"{', '.join(result.models)} at {result.settings['url']}", parse_math=False)
    figure.savefig(path)


def _draw_ecdf(axes: Axes, values_s: Sequence[float], label: str) -> None:
    if values_s:
        axes.ecdf(np.array(values_s) * 1000, label=label)


def count_running(records: Sequence[Record]) -> tuple[list[float], list[int]]:
    """Times at which a request was sent or ended, and how many were running from then on."""
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.ended_s, -1) for r in records])
    times = [time_s for time_s, _ in changes]
    return times, np.cumsum([change for _, change in changes], dtype=np.int64).tolist()


def _draw_running(axes: Axes, records: Sequence[Record]) -> None:
    axes.step(*count_running(records), where="post", linewidth=1)
    failed = [record.ended_s for record in records if not record.is_ok]
    if failed:
        axes.plot(failed, [0] * len(failed), "rx", label="failed", clip_on=False)
        axes.legend(fontsize="small")
    axes.set(title="Requests running", xlabel="s", ylim=(0, None))
    axes.grid(alpha=0.3)


def _draw_rates(axes: Axes, records: Sequence[Record], wall_s: float) -> None:
    """Chunks and ended requests a second, in bins of equal width."""
    width_s = max(wall_s / NUM_BINS, MIN_BIN_S)
    edges = np.arange(0, wall_s + width_s, width_s)
    chunks, _ = np.histogram([t for record in records for t in record.chunk_times_s], edges)
    ends, _ = np.histogram([record.ended_s for record in records if record.is_ok], edges)
    axes.stairs(chunks / width_s, edges, label="chunks with content a second")
    axes.set(title="Throughput", xlabel="s", ylabel="chunks a second", ylim=(0, None))
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(edges[1:], np.cumsum(ends), color="tab:orange", linewidth=1)
    right.set(ylabel="requests answered so far (orange)", ylim=(0, None))
