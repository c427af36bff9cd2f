"""An evaluation as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ram_core.evaluation.preferences import Interval
from ram_core.evaluation.report import EvaluationReport, Row
from server.commands.tables import add_row, make_console, new_table

NOTHING = "–"
_MAX_COLUMNS = 1000

Column = tuple[str, Callable[[Row], str]]


def print_report(report: EvaluationReport) -> None:
    """What the judge said, fit and divergence, and the texts: a table each; then what a reader must know."""
    console = make_console()
    for columns in (_said_of(report), _FIT, _TEXT):
        if not columns:
            continue
        table = new_table("setting", *(heading for heading, _ in columns))
        for column in table.columns:
            column.no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for row in report.rows:
            add_row(table, row.label, *(cell(row) for _, cell in columns))
        # Cells that are cut say something wrong.
        wide = console.options.update(width=_MAX_COLUMNS)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
        console.print(table)
    judge = f", judged by {report.judge}" if report.judge else ""
    console.print(f"{report.num_prompts} prompts{judge}. Intervals are of 95 %.", markup=False)
    for note in report.notes:
        console.print(f"- {note}", markup=False)


def _said_of(report: EvaluationReport) -> Sequence[Column]:
    """What a judge may say, without what it did not say of any row."""
    return [column for column in _JUDGED if any(column[1](row) != NOTHING for row in report.rows)]


def _win_rate(row: Row) -> str:
    return _interval(row.judged.win_rate if row.judged else None, "{:.1%}")


def _controlled(row: Row) -> str:
    control = row.judged.length_control if row.judged else None
    return NOTHING if control is None else f"{control.win_rate:.1%}" + "*" * control.is_extrapolated


def _score(row: Row) -> str:
    return _interval(row.judged.score if row.judged else None, "{:.3f}")


def _perplexity(row: Row) -> str:
    perplexity = row.held_out.perplexity if row.held_out else None
    return NOTHING if perplexity is None else f"{perplexity:.4g}"


def _supported(row: Row) -> str:
    return f"{row.held_out.supported:.1%}" if row.held_out else NOTHING


def _step(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: form.format(getattr(row.steps, name)) if row.steps else NOTHING


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: f"{getattr(row.text, name):.3f}"


def _interval(interval: Interval | None, form: str) -> str:
    if interval is None:
        return NOTHING
    return f"{form.format(interval.value)} ({form.format(interval.low)}–{form.format(interval.high)})"


_JUDGED: Sequence[Column] = (
    ("win rate", _win_rate),
    ("win rate at\nequal length", _controlled),
    ("score", _score),
)
_FIT: Sequence[Column] = (
    ("perplexity", _perplexity),
    ("wanted\nin nucleus", _supported),
    ("KL(p‖q)", _step("kl_p_q", "{:.3f}")),
    ("KL(π‖p)", _step("kl_pi_p", "{:.3f}")),
    ("ESS", _step("ess", "{:.3f}")),
    ("aligner\nmass", _step("aligner_mass", "{:.3f}")),
    ("fallbacks", _step("fallback_rate", "{:.1%}")),
)
_TEXT: Sequence[Column] = (
    ("tokens", lambda row: f"{row.mean_tokens:.1f}"),
    ("distinct-1", _text("distinct_1")),
    ("distinct-2", _text("distinct_2")),
    ("self-BLEU", _text("self_bleu")),
    ("repetition", _text("repetition")),
    ("tokens/s", lambda row: f"{row.tokens_per_s:,.0f}"),
)
