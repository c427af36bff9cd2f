"""The training loops: supervised warm-up, and residual alignment of an aligner.

Both run one epoch or more over examples in memory, on the CPU, in fp32. A loop reports every step to a
callback and holds no opinion about how progress is shown.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ram_core.training.examples import Batch, Example, collate, length_grouped
from ram_core.training.objectives import answer_log_probs, mean_token_loss, residual_alignment_loss

_ADAM_BETAS = (0.9, 0.98)


class RunawayAscentError(RuntimeError):
    """The ascent term of the residual-alignment loss has left its range: the aligner is being torn apart."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a loop runs.

    `optimizer` "muon" (torch 2.9 or later) learns facts by heart in about half the steps of "adamw"; the
    paper trains aligners with "rmsprop". `max_ascent_nats` bounds the mean `-log Q(y')` *per token*; beyond
    it training stops.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "rmsprop", "muon"] = "adamw"
    weight_decay: float = 0.0
    warm_up_fraction: float = 0.1
    final_rate_fraction: float = 0.05
    max_gradient_norm: float = 1.0
    ascent_weight: float = 1e-4
    max_ascent_nats: float = 20.0
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """One finished step (counted from 1). `loss` is in nats per token; `wanted` and `proposed` are the two
    terms of the residual-alignment loss in nats per answer, `proposed` without its weight and None in a
    warm-up.
    """

    step: int
    steps: int
    loss: float
    proposed: float | None = None


OnStep = Callable[[StepReport], None]


def warm_up(
    model: PreTrainedModel, examples: Sequence[Example], settings: TrainingSettings, on_step: OnStep
) -> None:
    """Train `model` in place on the answers of `examples` (supervised, mean loss per answer token)."""
    loop = _Loop(model, settings)
    lengths = [example.num_tokens for example in examples]
    for step, indices in loop.batches(lengths):
        batch = collate([examples[index] for index in indices])
        loss = mean_token_loss(_answer_logits(model, batch), batch.targets)
        loop.update(loss)
        on_step(StepReport(step, settings.steps, loss.item()))


def train_aligner(
    model: PreTrainedModel,
    wanted: Sequence[Example],
    proposed: Sequence[Example],
    settings: TrainingSettings,
    on_step: OnStep,
) -> None:
    """Train `model` in place with the residual-alignment loss (arXiv 2505.19700, Eq. 8).

    `wanted[i]` and `proposed[i]` answer the same prompt: as it should be answered, and as the proposal did.
    Raises `RunawayAscentError` when the ascent term grows beyond `settings.max_ascent_nats` per token.
    """
    if len(wanted) != len(proposed):
        raise ValueError(
            f"`wanted` and `proposed` must pair up, got {len(wanted)} and {len(proposed)} examples"
        )
    loop = _Loop(model, settings)
    lengths = [max(pair[0].num_tokens, pair[1].num_tokens) for pair in zip(wanted, proposed, strict=True)]
    for step, indices in loop.batches(lengths):
        wanted_batch = collate([wanted[index] for index in indices])
        proposed_batch = collate([proposed[index] for index in indices])
        loss = residual_alignment_loss(
            _sequence_log_probs(model, wanted_batch),
            _sequence_log_probs(model, proposed_batch),
            ascent_weight=settings.ascent_weight,
        )
        _stop_runaway(loss.proposed, proposed_batch, settings, step)
        loop.update(loss.total)
        per_token = loss.wanted.item() * wanted_batch.num_rows / len(wanted_batch.targets)
        on_step(StepReport(step, settings.steps, per_token, loss.proposed.item()))


def _answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits where answer tokens are predicted, [answer token, vocab]; the head never runs on prompts."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.positions])
    return logits


def _sequence_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    return answer_log_probs(_answer_logits(model, batch), batch.targets, batch.rows, batch.num_rows)


def _stop_runaway(proposed: Tensor, batch: Batch, settings: TrainingSettings, step: int) -> None:
    nats = -proposed.item() * batch.num_rows / len(batch.targets)
    if not nats <= settings.max_ascent_nats:
        raise RunawayAscentError(
            f"at step {step} the proposal's answers cost {nats:.1f} nats per token, above `max_ascent_nats` "
            f"{settings.max_ascent_nats:g}; lower `ascent_weight` ({settings.ascent_weight:g}) "
            "or `learning_rate`"
        )


class _Loop:
    """What both trainings share: order of examples, optimisers, schedule, clipping."""

    def __init__(self, model: PreTrainedModel, settings: TrainingSettings) -> None:
        self._settings = settings
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizers = _optimizers(model, settings)
        self._schedules = [LambdaLR(optimizer, self._rate_factor) for optimizer in self._optimizers]
        model.train()

    def batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Step numbers from 1 and the example indices of each, epoch after epoch."""
        noise = random.Random(self._settings.seed)
        epochs = (length_grouped(lengths, self._settings.batch_size, noise) for _ in itertools.count())
        return zip(range(1, self._settings.steps + 1), itertools.chain.from_iterable(epochs), strict=False)

    def update(self, loss: Tensor) -> None:
        """Step the optimisers down `loss` and advance the learning rate."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_gradient_norm)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def _rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_rate_fraction`."""
        warm_up_steps = max(1, round(self._settings.steps * self._settings.warm_up_fraction))
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        progress = (step - warm_up_steps) / max(1, self._settings.steps - warm_up_steps)
        floor = self._settings.final_rate_fraction
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _optimizers(model: PreTrainedModel, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """The optimisers that share the parameters: one, or for Muon, which is for matrices, AdamW beside it."""
    rate, decay = settings.learning_rate, settings.weight_decay
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "rmsprop":
        return [torch.optim.RMSprop(parameters, lr=rate, weight_decay=decay)]
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=rate, betas=_ADAM_BETAS, weight_decay=decay)]
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [
        parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in embeddings
    ]
    others = [parameter for parameter in parameters if parameter.ndim != 2 or id(parameter) in embeddings]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=_ADAM_BETAS, weight_decay=0.0),
    ]
