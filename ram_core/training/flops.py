"""How much arithmetic training takes, estimated from parameters and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class PassFlops:
    """Floating-point operations of a pass, for each token that is read and for each that is predicted.

    Two for a parameter forwards; another two backwards for the gradient of what goes in, and two for the
    parameter's own if it is trained; two more where a forward is computed again. Attention's products, norms
    and the embedding's look-up are left out. Padding counts: it is computed like everything else.
    """

    per_position: float
    per_answer_position: float

    @classmethod
    def of(cls, model: PreTrainedModel, *, is_trained: bool = True, is_recomputed: bool = False) -> PassFlops:
        """Of a model as it is now: a parameter without a gradient is not trained."""
        head = model.get_output_embeddings()
        embeddings = model.get_input_embeddings()
        ends = {id(layer.weight) for layer in (head, embeddings) if layer is not None}
        body = sum(
            _per_parameter(each, is_trained, is_recomputed) * each.numel()
            for each in model.parameters()
            if id(each) not in ends
        )
        # The head is outside of what is computed again.
        at_head = (
            0.0 if head is None else _per_parameter(head.weight, is_trained, False) * head.weight.numel()
        )
        return cls(body, at_head)

    def of_batch(self, num_positions: int, num_answer_positions: int) -> float:
        """Of a batch with so many positions, of which the head sees those that predict an answer."""
        return self.per_position * num_positions + self.per_answer_position * num_answer_positions


def _per_parameter(parameter: nn.Parameter, is_trained: bool, is_recomputed: bool) -> float:
    if not is_trained:
        return 2.0
    return 4.0 + 2.0 * parameter.requires_grad + 2.0 * is_recomputed
