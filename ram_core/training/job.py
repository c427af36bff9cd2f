"""What a training loop is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ram_core.training.config import LoopConfig
from ram_core.training.examples import TrainingPair
from ram_core.training.objectives import Objective


class RowSource(Protocol):
    """More of what a batch needs: tensors for its wanted answers."""

    def rows(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """What to put into a batch of the pairs `indices`, in that order."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how it is called.

    `vocab_size` is the tokenizer's: logits beyond it are left out, as when the model is served.
    `fingerprint` tells runs apart: a save is only taken up by the run that made it. `max_ascent_nats` is a
    limit for the mean `-log Q` of the proposal's answers, a token.
    """

    stage: str
    pairs: Sequence[TrainingPair]
    objective: Objective
    loop: LoopConfig
    seed: int
    vocab_size: int
    fingerprint: str
    max_ascent_nats: float = math.inf
    extra: RowSource | None = None
