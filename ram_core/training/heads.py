"""A model's head, run where answers are predicted and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class AnswerHead:
    """Predicts a batch's answers through a model's own forward, wrapped for several devices or not.

    The head is most of a small model's work, and its logits most of the memory. It is handed only the
    positions that predict an answer token; neither padding nor prompts get logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._positions: Tensor | None = None
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._select)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the batch's `targets`, [answer token, vocab]; `model` holds the head, or wraps it."""
        self._positions = batch["positions"]
        try:
            logits: Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits
        finally:
            self._positions = None
        return logits

    def remove(self) -> None:
        """Give the model its head back."""
        self._hook.remove()

    def _select(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._positions is None:
            return inputs
        return (inputs[0].flatten(0, 1)[self._positions], *inputs[1:])
