"""Tokenised prompt and answer pairs, and the batches that a training step reads."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WINDOW_BATCHES = (
    32  # shuffled examples are sorted by length within windows, so that batches carry little padding
)


@dataclass(frozen=True)
class Example:
    """Token ids of a rendered prompt and of the answer to learn, end-of-text token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Length of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right; causal attention never looks there, so no attention mask is needed.

    `input_ids` is int64 [row, token]. The other three are int64 [answer token]: `positions` index the
    flattened `input_ids` where an answer token is predicted, `targets` are those answer tokens, `rows`
    their examples.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor

    @property
    def num_rows(self) -> int:
        """How many examples the batch holds."""
        return self.input_ids.shape[0]


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of `examples`, in order."""
    width = max(example.num_tokens for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, example in enumerate(examples):
        input_ids[row, : example.num_tokens] = torch.tensor(example.prompt + example.answer)
        first = row * width + len(example.prompt) - 1
        positions += range(first, first + len(example.answer))
        targets += example.answer
        rows += [row] * len(example.answer)
    return Batch(input_ids, torch.tensor(positions), torch.tensor(targets), torch.tensor(rows))


def length_grouped(lengths: Sequence[int], batch_size: int, noise: random.Random) -> Iterator[list[int]]:
    """Indices of one epoch in batches of similar length, at random; the last short batch is kept."""
    order = list(range(len(lengths)))
    noise.shuffle(order)
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(order), window):
        indices = sorted(order[start : start + window], key=lengths.__getitem__)
        batches = [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)]
        noise.shuffle(batches)
        yield from batches
