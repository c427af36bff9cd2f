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
    """What a forward reads of `examples`, in order: prompts end, and all answers begin, in the same column.

    Prompts are padded on the left, answers on the right. The last token of an answer is never read, so the
    last `answer` columns of [row, column] predict the answers:

    - `input_ids`, int64 [row, column];
    - `attention_mask` (int64, 1 for tokens) and `position_ids` (int64), [row, column]: left out where no
      prompt is padded, since causal attention then never sees padding, and is faster unmasked;
    - `targets`, int64 [row, answer], and `is_answer`, bool [row, answer], false on padding.
    """
    num_rows = len(examples)
    num_prompt = max(len(example.prompt) for example in examples)
    num_answer = max(len(example.answer) for example in examples)
    num_columns = num_prompt + num_answer - 1
    input_ids = np.zeros((num_rows, num_columns), dtype=np.int64)
    targets = np.zeros((num_rows, num_answer), dtype=np.int64)
    starts = np.array([num_prompt - len(example.prompt) for example in examples])[:, None]
    lengths = np.array([len(example.answer) for example in examples])[:, None]
    for row, example in enumerate(examples):
        begin = num_prompt - len(example.prompt)
        input_ids[row, begin : begin + example.num_tokens - 1] = (*example.prompt, *example.answer)[:-1]
        targets[row, : len(example.answer)] = example.answer
    arrays = {
        "input_ids": input_ids,
        "targets": targets,
        "is_answer": np.arange(num_answer) < lengths,
    }
    if starts.any():
        columns = np.arange(num_columns)
        ends = num_prompt + lengths - 1
        arrays["attention_mask"] = ((columns >= starts) & (columns < ends)).astype(np.int64)
        arrays["position_ids"] = np.clip(columns - starts, 0, ends - starts - 1)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
