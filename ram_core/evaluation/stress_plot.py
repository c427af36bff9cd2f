"""A picture of a ladder: where support breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ram_core.evaluation.stress import RungResult, StressReport
from ram_core.training.errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")

_SHARES = {
    "aligner_mass": "aligner mass in the nucleus",
    "supported": "supported share of wanted tokens",
    "ess": "ESS",
    "quality": "quality",
    "quality_alone": "quality of the proposal alone",
}
_NATS = {"kl_p_q": "KL(p‖q)", "kl_pi_p": "KL(π‖p)"}


def check_can_plot(path: Path) -> None:
    """Raises `TrainingError` where `plot_ladder` would: told before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise TrainingError(f"a plot's file ends with {' or '.join(SUFFIXES)}, got `{path}`")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError("plots need matplotlib: pip install 'ram-server[train]'") from None


def plot_ladder(report: StressReport, path: Path) -> None:
    """Write fractions, and below them divergences, rung by rung, as PNG or SVG; the first break is marked.

    Raises:
        TrainingError: no such kind of file, or no matplotlib.
        OSError: it cannot be written.
    """
    check_can_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 1.1 * len(report.rungs)), 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw(above, report.rungs, _SHARES)
    above.set(title="Where support breaks", ylabel="share, or score")
    above.set_ylim(bottom=0)
    _draw(below, report.rungs, _NATS)
    below.set(ylabel="nats a token")
    names = [rung.name for rung in report.rungs]
    below.set_xticks(range(len(names)), names, rotation=20, ha="right", parse_math=False)
    broken = report.first_broken
    if broken is not None:
        for axes in (above, below):
            axes.axvspan(
                report.rungs.index(broken) - 0.5, len(names) - 0.5, color="tab:red", alpha=0.08, linewidth=0
            )
    figure.savefig(path)


def _draw(axes: Axes, rungs: Sequence[RungResult], figures: dict[str, str]) -> None:
    has_any = False
    for name, label in figures.items():
        values = [getattr(rung, name) for rung in rungs]
        known = [math.nan if value is None or not math.isfinite(value) else value for value in values]
        if not all(map(math.isnan, known)):
            axes.plot(range(len(rungs)), known, marker="o", label=label)
            has_any = True
    axes.grid(alpha=0.3)
    if has_any:
        axes.legend(fontsize="small")
