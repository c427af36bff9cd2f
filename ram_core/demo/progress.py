"""How long work tells where it is: frozen reports to a callback, and a terminal display of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` of a named stage is done; `note` is what is worth seeing, such as the loss."""

    stage: str
    step: int
    steps: int
    note: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The silent callback."""


@contextmanager
def terminal_progress() -> Iterator[OnProgress]:
    """A callback that shows stages as bars with the time they took and still take, on the standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, note="")
            bars.update(
                tasks[progress.stage], completed=progress.step, total=progress.steps, note=progress.note
            )

        yield show
