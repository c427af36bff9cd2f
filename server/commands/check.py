"""`ram check`: can this proposal and these aligners be served together?"""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ram_core.models.inspection import ModelReport, PairReport, inspect_pair

_HEADINGS = ("model", "architecture", "dtype", "parameters", "weights", "KV per token", "context")
_MIN_COLUMNS = 120
"""Wide enough for the table, also where the output is a file."""


def check_pair(
    proposal: str, aligners: Mapping[str, str], *, device: str, dtype: str, max_model_len: int
) -> bool:
    """Print what is known without the weights; return whether nothing speaks against serving."""
    report = inspect_pair(proposal, aligners, device=device, dtype=dtype, max_model_len=max_model_len)
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, _MIN_COLUMNS)
    console.print(_table(report))
    console.print(
        f"Memory: weights {_size(report.memory_bytes(0))}; with keys and values of one full context "
        f"({report.max_model_len} tokens), {_size(report.memory_bytes(report.max_model_len))}."
    )
    for problem in report.problems:
        console.print(f"✗ {problem}", style="red", markup=False)
    console.print("✓ can be served" if report.can_serve else "✗ cannot be served", style="bold")
    return report.can_serve


def _table(report: PairReport) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in (*_HEADINGS, "same vocabulary"):
        table.add_column(heading, no_wrap=True)
    table.add_row(*_row(report.proposal), "–")
    for aligner in report.aligners:
        table.add_row(*_row(aligner.model), "yes" if aligner.is_vocabulary_shared else "no")
    return table


def _row(model: ModelReport) -> tuple[str, ...]:
    return (
        model.name,
        model.architecture,
        model.dtype or "–",
        f"{model.num_parameters:,}",
        _size(model.weight_bytes),
        _size(model.kv_bytes_per_token),
        f"{model.context_tokens:,}",
    )


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
