"""DPO of a whole proposal (arXiv 2305.18290), with the proposal itself as the reference: for comparison.

Built from the project's own training loop: log-probabilities are taken relative to the reference's, token by
token, and then compared as `ram-dpo` compares them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.models.vocabulary import load_tokenizer
from ram_core.progress import OnProgress
from ram_core.training.checkpoints import Starting, write_checkpoint
from ram_core.training.config import LoraConfig, TrainConfig
from ram_core.training.examples import Example, TrainingPair, collate
from ram_core.training.flops import PassFlops
from ram_core.training.heads import AnswerHead
from ram_core.training.inputs import read_inputs
from ram_core.training.job import Job
from ram_core.training.loop import train
from ram_core.training.objectives import Objective, preference_losses, token_log_probs
from ram_core.training.saves import Spent
from ram_core.training.synthesis import read_answers

_BATCH = 64


@dataclass(frozen=True)
class ReferencePreference(Objective):
    """`-log sigmoid(beta * (log-ratio of the wanted answer - log-ratio of the proposal's own))`."""

    reads_proposed: ClassVar[bool] = True
    beta: float

    def token_log_probs(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return token_log_probs(logits, batch["targets"]) - batch["reference_log_probs"]

    def losses(self, log_q_wanted: Tensor, log_q_proposed: Tensor) -> Tensor:
        return preference_losses(log_q_wanted, log_q_proposed, self.beta)


class ReferenceLogProbs:
    """What the reference says of each answer token: of the wanted answers, and of the proposal's own."""

    def __init__(self, reference: PreTrainedModel, pairs: Sequence[TrainingPair], vocab_size: int) -> None:
        self.flops = 0.0
        self._wanted = self._of(reference, [Example(pair.prompt, pair.wanted) for pair in pairs], vocab_size)
        self._proposed = self._of(
            reference, [Example(pair.prompt, pair.proposed) for pair in pairs], vocab_size
        )

    def rows(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """Of the pairs' wanted answers, and then of the proposed ones, [answer token]."""
        found = [answers[index] for answers in (self._wanted, self._proposed) for index in indices]
        return {"reference_log_probs": torch.cat(found)}

    def _of(self, reference: PreTrainedModel, examples: list[Example], vocab_size: int) -> list[Tensor]:
        costs, head = PassFlops.of(reference, is_trained=False), AnswerHead(reference)
        order = sorted(range(len(examples)), key=lambda index: examples[index].num_tokens)
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            batch = collate([examples[index] for index in indices])
            self.flops += costs.of_batch(batch["input_ids"].numel(), batch["targets"].numel())
            with torch.no_grad():
                logits = head.logits(reference, batch)[:, :vocab_size]
            log_probs = token_log_probs(logits, batch["targets"])
            lengths = [len(examples[index].answer) for index in indices]
            found |= dict(zip(indices, log_probs.split(lengths), strict=True))
        head.remove()
        return [found[index] for index in range(len(examples))]


def fit_dpo(
    config: TrainConfig, answers: Path, directory: Path, beta: float, on_progress: OnProgress
) -> dict[str, Any]:
    """Train `config.fit.model` at `directory/"model"`; what it took. A fit that is done is kept."""
    summary = directory / "summary.json"
    if not summary.exists():
        spent = _fit(config, answers, directory, beta, on_progress)
        summary.write_bytes(msgspec.json.encode(spent))
    found: dict[str, Any] = msgspec.json.decode(summary.read_bytes())
    return found


def _fit(config: TrainConfig, answers: Path, directory: Path, beta: float, on_progress: OnProgress) -> Spent:
    proposed = read_answers(answers)
    encoded = read_inputs(config, ["fit"], on_progress).encoded
    pairs = [
        TrainingPair(pair.prompt, pair.wanted, proposed[index].token_ids)
        for index, pair in enumerate(encoded.pairs)
    ]
    starting = Starting(config.fit.model, LoraConfig(), False, config.seed)
    vocab_size = len(load_tokenizer(config.fit.model))
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    reference = ReferenceLogProbs(starting.build().eval(), pairs, vocab_size)
    looked = Spent(time.perf_counter() - began_s, time.process_time() - began_cpu_s, reference.flops)
    job = Job(
        "dpo", pairs, ReferencePreference(beta), config.fit, config.seed, vocab_size, "dpo", extra=reference
    )

    def write(trained: PreTrainedModel, state: Mapping[str, Tensor] | None) -> None:
        write_checkpoint(trained, state, starting, directory / "model")

    spent = train(starting.build(), job, directory, on_progress, write).spent
    return Spent(
        spent.seconds + looked.seconds, spent.cpu_seconds + looked.cpu_seconds, spent.flops + looked.flops
    )
