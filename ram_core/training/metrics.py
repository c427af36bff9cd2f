"""What a run tells as it goes: a line of JSON every few updates, and TensorBoard if it is installed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from ram_core.training.saves import write_aside

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Update:
    """Sums over an update's pairs: `wanted` and `proposed` are nats, `-log Q(y|x)` and `-log Q(y'|x)`.

    `num_wanted` and `num_proposed` are answer tokens, `num_tokens` all that are read.
    """

    loss: float
    gradient_norm: float
    wanted: float
    proposed: float
    num_pairs: int
    num_wanted: int
    num_proposed: int
    num_tokens: int

    @property
    def proposed_a_token(self) -> float:
        """Nats per token of the proposal's answers; 0 without any."""
        return self.proposed / max(1, self.num_proposed)


class Window:
    """The updates since the last line of metrics."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def means(self, *, reads_proposed: bool) -> dict[str, float]:
        """Means over the updates: Eq. 8's terms in nats an answer and a token, and what a second brings."""
        updates = self._updates
        num_pairs = sum(each.num_pairs for each in updates)
        wanted = sum(each.wanted for each in updates)
        means = {
            "loss": sum(each.loss for each in updates) / len(updates),
            "wanted_nats": wanted / num_pairs,
            "wanted_nats_per_token": wanted / sum(each.num_wanted for each in updates),
        }
        if reads_proposed:
            proposed = sum(each.proposed for each in updates)
            means |= {
                "proposed_nats": proposed / num_pairs,
                "proposed_nats_per_token": proposed / sum(each.num_proposed for each in updates),
                "margin_nats": (proposed - wanted) / num_pairs,
            }
        seconds = time.perf_counter() - self._began_s
        return means | {
            "gradient_norm": updates[-1].gradient_norm,
            "tokens_per_second": sum(each.num_tokens for each in updates) / seconds,
        }


class MetricsLog:
    """Appends to `metrics.jsonl` below a directory, each line on the disk's way at once."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Go on after update `first_step`: lines of later ones, which a resume repeats, are taken out."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        write_aside(path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))
        self._file = path.open("ab")
        self._board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """One line; `metrics` has the update's number as "step"."""
        self._file.write(msgspec.json.encode(metrics) + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """No more lines."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file, without one that was cut off while it was written."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            lines.append(msgspec.json.decode(line, type=dict[str, float]))
        except msgspec.DecodeError:
            break
    return lines
