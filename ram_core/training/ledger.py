"""What is known of a run's stages: with which inputs each was begun, whether it is done, what came of it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ram_core.models.source import one_line
from ram_core.training.config import Stage
from ram_core.training.errors import TrainingError
from ram_core.training.saves import write_aside


class StageRecord(msgspec.Struct, frozen=True):
    """A stage that was begun with `inputs`; `summary` is what came of it, once it is done."""

    inputs: dict[str, Any]
    is_done: bool = False
    summary: dict[str, Any] = {}


class Ledger:
    """The records of the stages in `directory`, a small JSON file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, stage: Stage) -> StageRecord | None:
        """The stage's record; None if it never began.

        Raises:
            TrainingError: the file is broken.
        """
        path = self._path(stage)
        try:
            return msgspec.json.decode(path.read_bytes(), type=StageRecord)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError) as error:
            raise TrainingError(f"`{path}` is broken ({one_line(error)}); remove it") from None

    def write(self, stage: Stage, record: StageRecord) -> None:
        """Replace the stage's record: wholly or not at all. Raises OSError if it cannot be written."""
        path = self._path(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        write_aside(path, text)

    def forget(self, stage: Stage) -> None:
        """Make it a stage that never began."""
        self._path(stage).unlink(missing_ok=True)

    def _path(self, stage: Stage) -> Path:
        return self._directory / f"{stage}.json"


def plain_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs as they are read back from a file, so that they can be compared with those."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(inputs))
    return plain


@contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Hold a run's directory against another run in it.

    Raises:
        TrainingError: another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"`{output}` is in use by another run of `ram train`") from None
        yield
