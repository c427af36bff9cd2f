"""Which examples make which update: decided before training begins, for all processes and for a resume."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ram_core.training.config import LoopConfig
from ram_core.training.errors import DataError
from ram_core.training.examples import TrainingPair

# Shuffled examples are sorted by length within windows of so many batches, for little padding.
_WINDOW_BATCHES = 128


@dataclass(frozen=True)
class Share:
    """The examples that one process reads at once: a part of an update, which has `num_pairs` and tokens.

    `indices` never are empty, since every process takes part in every forward; those of a share that has
    nothing to add (`is_counted` false) stand in.
    """

    indices: tuple[int, ...]
    is_counted: bool
    num_pairs: int
    num_wanted_tokens: int
    num_proposed_tokens: int


@dataclass(frozen=True)
class BatchPlan:
    """The examples of each update, by their index; the same however many processes there are."""

    steps: tuple[tuple[int, ...], ...]
    steps_per_epoch: int

    @classmethod
    def of(cls, pairs: Sequence[TrainingPair], loop: LoopConfig, seed: int) -> BatchPlan:
        """Epochs in random order, each in batches of like length; an epoch's last batch may be smaller.

        Raises:
            DataError: there is nothing to train on, or a prompt or a wanted answer has no token.
        """
        if not pairs:
            raise DataError("there is no example to train on")
        for index, pair in enumerate(pairs):
            if not pair.prompt or not pair.wanted:
                part = "wanted answer" if pair.prompt else "prompt"
                raise DataError(f"example {index} has a {part} without tokens")
        lengths = [len(pair.prompt) + max(len(pair.wanted), len(pair.proposed)) for pair in pairs]
        per_epoch = math.ceil(len(pairs) / loop.batch_size)
        num_steps = loop.max_steps or math.ceil(loop.epochs * per_epoch)
        epochs = (
            like_lengths(lengths, loop.batch_size, random.Random(f"{seed}, epoch {epoch}"))
            for epoch in itertools.count()
        )
        return cls(tuple(itertools.islice(itertools.chain.from_iterable(epochs), num_steps)), per_epoch)


@dataclass(frozen=True)
class Sharing:
    """How the examples of an update are dealt out: `num_parts` in turn on each of `num_processes`."""

    process: int
    num_processes: int
    num_parts: int
    part_size: int

    @classmethod
    def of(cls, loop: LoopConfig, process: int, num_processes: int) -> Sharing:
        """What `loop` asks for on this one of so many processes."""
        most = math.ceil(loop.batch_size / num_processes)
        size = min(loop.micro_batch_size or most, most)
        return cls(process, num_processes, math.ceil(most / size), size)

    def share(self, pairs: Sequence[TrainingPair], step: Sequence[int], part: int) -> Share:
        """Part `part` of what this process reads for an update of the examples `step`."""
        own = step[self.process :: self.num_processes]
        indices = tuple(own[part * self.part_size : (part + 1) * self.part_size])
        return Share(
            indices or (step[0],),
            bool(indices),
            len(step),
            sum(len(pairs[index].wanted) for index in step),
            sum(len(pairs[index].proposed) for index in step),
        )


def like_lengths(lengths: Sequence[int], batch_size: int, noise: random.Random) -> Iterator[tuple[int, ...]]:
    """Indices of one epoch in batches of like length, at random; the last, smaller batch is kept."""
    order = list(range(len(lengths)))
    noise.shuffle(order)
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(order), window):
        indices = sorted(order[start : start + window], key=lengths.__getitem__)
        batches = [tuple(indices[at : at + batch_size]) for at in range(0, len(indices), batch_size)]
        noise.shuffle(batches)
        yield from batches
