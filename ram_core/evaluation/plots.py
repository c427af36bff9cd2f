"""Pictures of an evaluation: the alignment frontier, divergence along answers, and the gate's threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ram_core.evaluation.frontier import Curve, quality_name, strength_curves, threshold_curves, undominated
from ram_core.evaluation.report import EvaluationReport, Row
from ram_core.training.errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = ("png", "svg")
# Beyond this place so few answers are left that their mean says nothing.
_MIN_SHARE_AT = 0.1
_MAX_LINES = 12
_MAX_INSIDE = 6


def check_can_plot(suffix: str = "png") -> None:
    """Raises `TrainingError` where `write_plots` would: told before the work is done."""
    if suffix not in SUFFIXES:
        raise TrainingError(f"plots are {' or '.join(SUFFIXES)}, got `{suffix}`")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError("plots need the package `matplotlib`: pip install 'ram-server[train]'") from None


def write_plots(report: EvaluationReport, directory: Path, suffix: str = "png") -> list[Path]:
    """Write what there is to see of `frontier`, `kl_by_position` and `thresholds` into `directory`.

    The frontier needs a judge, the thresholds more than one of them.

    Raises:
        TrainingError: matplotlib is missing, or `suffix` is neither "png" nor "svg".
        OSError: a file cannot be written.
    """
    check_can_plot(suffix)
    figures = {
        "frontier": plot_frontier(report) if quality_name(report) else None,
        "kl_by_position": plot_positions(report) if any(row.steps for row in report.rows) else None,
        "thresholds": plot_thresholds(report) if threshold_curves(report) else None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(directory / f"{name}.{suffix}")
            figure.savefig(written[-1])
    return written


def plot_frontier(report: EvaluationReport) -> Figure:
    """Quality against mean `KL(π‖p)` as strength grows, and which points no other one beats."""
    figure, (axes,) = _figure(1)
    curves = strength_curves(report)
    for curve in curves:
        _draw_curve(axes, curve, [point.kl_pi_p for point in curve.points])
        for point in curve.points[1:]:
            at = (point.kl_pi_p, point.quality.value)
            axes.annotate(f"{point.strength:g}", at, (4, 4), textcoords="offset points", fontsize="x-small")
    best = undominated(point for curve in curves for point in curve.points)
    axes.plot(
        [point.kl_pi_p for point in best],
        [point.quality.value for point in best],
        color="black",
        alpha=0.2,
        linewidth=6,
        solid_capstyle="round",
        label="frontier",
        zorder=0,
    )
    axes.set(title="What alignment costs", xlabel="mean KL(π‖p), nats a token", ylabel=quality_name(report))
    _finish(axes)
    return figure


def plot_positions(report: EvaluationReport) -> Figure:
    """Both divergences along the answers, where there are enough answers left to average."""
    from matplotlib.ticker import MaxNLocator

    figure, (p_q_axes, pi_p_axes) = _figure(2)
    for row in [row for row in report.rows if row.steps is not None][:_MAX_LINES]:
        assert row.steps is not None
        num_places = _places(row)
        p_q_axes.plot(range(1, num_places + 1), row.steps.kl_p_q_at[:num_places], label=row.label)
        pi_p_axes.plot(range(1, num_places + 1), row.steps.kl_pi_p_at[:num_places], label=row.label)
    p_q_axes.set(title="How far the aligner is from the proposal", ylabel="mean KL(p‖q), nats")
    pi_p_axes.set(title="How far it moves the answer", ylabel="mean KL(π‖p), nats")
    for axes in (p_q_axes, pi_p_axes):
        axes.set(xlabel="token of the answer", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes)
    return figure


def plot_thresholds(report: EvaluationReport) -> Figure:
    """Quality, and the share of tokens given back to the proposal, against the gate's threshold."""
    figure, (quality_axes, fallback_axes) = _figure(2)
    curves = threshold_curves(report)
    thresholds = sorted({point.kl_threshold for curve in curves for point in curve.points})
    places = {threshold: place for place, threshold in enumerate(thresholds)}
    for curve in curves:
        x = [float(places[point.kl_threshold]) for point in curve.points]
        _draw_curve(quality_axes, curve, x)
        fallback_axes.plot(x, [point.fallback_rate for point in curve.points], marker="o", label=curve.name)
    quality_axes.set(title="Quality", ylabel=quality_name(report))
    fallback_axes.set(title="Fallbacks to the proposal", ylabel="share of tokens", ylim=(0, 1))
    names = ["off" if math.isinf(threshold) else f"{threshold:g}" for threshold in thresholds]
    for axes in (quality_axes, fallback_axes):
        axes.set_xticks(range(len(names)), names)
        axes.set(xlabel="KL(p‖q) above which the gate falls back, nats")
        _finish(axes)
    return figure


def _figure(num_axes: int) -> tuple[Figure, tuple[Axes, ...]]:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    figure = Figure(figsize=(6.5 * num_axes, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    all_axes = tuple(figure.add_subplot(1, num_axes, place + 1) for place in range(num_axes))
    for axes in all_axes:
        # Curves beyond the tenth would have the colour of another one.
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"])
    return figure, all_axes


def _draw_curve(axes: Axes, curve: Curve, x: list[float]) -> None:
    qualities = [point.quality for point in curve.points]
    errors = [
        [quality.value - quality.low for quality in qualities],
        [quality.high - quality.value for quality in qualities],
    ]
    values = [quality.value for quality in qualities]
    axes.errorbar(x, values, errors, marker="o", capsize=2, label=curve.name)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    # Many names would hide what they name.
    is_crowded = len(axes.get_legend_handles_labels()[1]) > _MAX_INSIDE
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if is_crowded else {}
    legend = axes.legend(fontsize="small", **beside)
    for text in legend.get_texts():
        # Names are no formulas.
        text.set_parse_math(False)


def _places(row: Row) -> int:
    """How many places of the answers have enough of them."""
    assert row.steps is not None
    needed = max(1.0, _MIN_SHARE_AT * row.steps.num_at[0])
    return sum(count >= needed for count in row.steps.num_at)
