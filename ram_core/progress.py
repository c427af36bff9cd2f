"""How long work tells where it is: frozen reports to a callback, and a terminal display of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO


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


_LINE_EVERY_S = 10.0


@contextmanager
def terminal_progress() -> Iterator[OnProgress]:
    """A callback that shows stages as bars with the time they took and still take, on the standard error.

    Where that is no terminal, a line now and then instead.
    """
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

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_writer(console.file)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console) as bars:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, note="")
            bars.update(
                tasks[progress.stage], completed=progress.step, total=progress.steps, note=progress.note
            )

        yield show


def _line_writer(file: IO[str]) -> OnProgress:
    """A callback that writes each stage's beginning and end, and every few seconds in between."""
    stage = ""
    written_s = 0.0

    def write(progress: Progress) -> None:
        nonlocal stage, written_s
        is_due = time.monotonic() - written_s >= _LINE_EVERY_S
        if is_due or progress.stage != stage or progress.step == progress.steps:
            stage, written_s = progress.stage, time.monotonic()
            file.write(f"{stage}: {progress.step}/{progress.steps} {progress.note}".rstrip() + "\n")
            file.flush()

    return write
