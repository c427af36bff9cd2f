"""Tokenised prompts with their answers, and the arrays that a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """Token ids of a rendered prompt and of the answer to learn, end-of-text token included."""

    prompt: TokenIds
    answer: TokenIds

    @property
    def num_tokens(self) -> int:
        """Length of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A prompt, the answer that is wanted, and the one that the proposal gave; all are token ids.

    Answers hold their end-of-text token. `proposed` is empty where an objective reads none.
    """

    prompt: TokenIds
    wanted: TokenIds
    proposed: TokenIds = ()


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """What a forward and a loss read of `examples`, in order; all are int64.

    `input_ids`, [row, column], is padded on the right: causal attention never looks there, so no mask is
    needed. `positions` are where in the flattened `input_ids` an answer token is predicted, `targets` those
    answer tokens and `rows` their examples, [answer token].
    """
    width = max(example.num_tokens for example in examples) - 1
    input_ids = np.zeros((len(examples), width), dtype=np.int64)
    firsts, lengths = [], []
    for row, example in enumerate(examples):
        # Nothing is predicted behind the last token.
        input_ids[row, : example.num_tokens - 1] = (*example.prompt, *example.answer)[:-1]
        firsts.append(row * width + len(example.prompt) - 1)
        lengths.append(len(example.answer))
    positions = np.concatenate(
        [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    )
    targets = np.concatenate([np.array(example.answer, dtype=np.int64) for example in examples])
    rows = np.repeat(np.arange(len(examples)), lengths)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "positions": torch.from_numpy(positions),
        "targets": torch.from_numpy(targets),
        "rows": torch.from_numpy(rows),
    }
