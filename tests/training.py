"""A tiny model, pairs for it, and a config to fit it with: shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ram_core.training.config import FitConfig, LoraConfig, TrainConfig, WarmupConfig
from ram_core.training.examples import TrainingPair
from tests.models import save_model

VOCAB = 300
PAIRS = [
    TrainingPair(
        tuple(range(10, 12 + index % 5)),
        (30 + index % 7, *range(50, 51 + index % 3), 1),
        (*range(90, 92 + index % 4), 1),
    )
    for index in range(13)
]


def save_small(directory: Path, **options: Any) -> Path:
    """A checkpoint that is quick to train: not as wide open as those that are decoded greedily."""
    return save_model(directory, "llama", **({"std": 0.1} | options))


def fit_config(
    output: Path, model: Path, *, proposal: Path | None = None, lora: LoraConfig | None = None, **fit: Any
) -> TrainConfig:
    """A config that fits `model` in little steps of eight pairs; `fit` goes into its section."""
    defaults = {"batch_size": 8, "learning_rate": 3e-3, "log_steps": 1, "max_ascent_nats": 500.0}
    return TrainConfig(
        output=str(output),
        proposal=str(proposal or ""),
        fit=FitConfig(model=str(model), lora=lora or LoraConfig(), **(defaults | fit)),
        warmup=WarmupConfig(),
    )


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def log_probs_alone(directory: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """A model's next-token log-probabilities at every answer token, [answer, vocab], without any batching."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def log_prob(directory: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Log-probability of an answer, summed over its tokens."""
    log_probs = log_probs_alone(directory, prompt, answer)
    return log_probs.gather(-1, torch.tensor(answer)[:, None]).sum().item()
