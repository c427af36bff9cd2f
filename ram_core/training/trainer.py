"""The training loops: supervised warm-up, and residual alignment of an aligner.

Both run one epoch or more over examples in memory, on the CPU, in fp32. A loop reports every step to a
callback and holds no opinion about how progress is shown.
"""

from __future__ import annotations

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

from ram_core.training.examples import Example

_ADAM_BETAS = (0.9, 0.98)
_WINDOW_BATCHES = (
    32  # shuffled examples are sorted by length within windows, so that batches carry little padding
)


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


@dataclass(frozen=True)
class ResidualLoss:
    """`total = wanted + ascent_weight * proposed`, each a scalar tensor in nats per answer.

    `wanted` is the negative log-likelihood of the wanted answers, positive and going down; `proposed` is the
    log-likelihood of the proposal's own answers, negative and going down too, without a lower bound.
    """

    total: Tensor
    wanted: Tensor
    proposed: Tensor


def residual_alignment_loss(
    log_q_wanted: Tensor, log_q_proposed: Tensor, *, ascent_weight: float
) -> ResidualLoss:
    """Eq. 8 of arXiv 2505.19700: `-E[log Q(y|x)] + ascent_weight * E[log Q(y'|x)]`.

    `log_q_wanted` (float, [batch]) holds `log Q(y|x)` of the wanted answers, `log_q_proposed` (float,
    [batch]) `log Q(y'|x)` of the answers that the proposal gave to the same prompts. The second term is a
    gradient ascent on the negative log-likelihood of the proposal's answers, hence the small weight (the
    paper's alpha).
    """
    wanted = -log_q_wanted.mean()
    proposed = log_q_proposed.mean()
    return ResidualLoss(wanted + ascent_weight * proposed, wanted, proposed)


def answer_log_probs(logits: Tensor, targets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Summed log-probabilities of answers whose tokens lie packed, [num_rows].

    `logits` ([token, vocab], any float dtype) predict `targets` (int64, [token]); `rows` (int64, [token])
    says which answer each token belongs to, in [0, num_rows). An answer without tokens has log-probability
    0.
    """
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return log_probs.new_zeros(num_rows).index_add(0, rows, log_probs)


def mean_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of packed tokens in nats per token, a scalar; plain supervised training (the warm-up)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets)
