"""The optimizers and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ram_core.training.config import LoopConfig

_ADAM_BETAS = (0.9, 0.98)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices and AdamW, without weight decay, for the rest: one optimizer with one state.

    Embeddings and the head belong to the rest. Both have the same learning rate, since Muon's steps are
    scaled to AdamW's.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, lr: float, weight_decay: float
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=_ADAM_BETAS, weight_decay=0.0))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def _share(self) -> None:
        """Let both parts work on the groups and the state of the whole."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state


def make_optimizer(model: nn.Module, loop: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer that `loop` names, for the parameters of `model` that have gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = loop.learning_rate, loop.weight_decay
    if loop.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=rate, weight_decay=decay)
    if loop.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=_ADAM_BETAS, weight_decay=decay)
    apart = {id(layer.weight) for layer in _ends(model)}
    is_matrix = [parameter.ndim == 2 and id(parameter) not in apart for parameter in parameters]
    return MuonAndAdamW(
        [parameter for parameter, yes in zip(parameters, is_matrix, strict=True) if yes],
        [parameter for parameter, yes in zip(parameters, is_matrix, strict=True) if not yes],
        lr=rate,
        weight_decay=decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, loop: LoopConfig, num_steps: int) -> LambdaLR:
    """The learning rate's course over `num_steps` updates."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, num_steps, loop))


def rate_factor(step: int, num_steps: int, loop: LoopConfig) -> float:
    """The learning rate at update `step` (from 0), over its highest: a linear rise, then the schedule."""
    rise = max(1, round(num_steps * loop.warmup_fraction))
    if step < rise:
        return (step + 1) / rise
    if loop.schedule == "constant":
        return 1.0
    done = min(1.0, (step - rise) / max(1, num_steps - rise))
    floor = loop.final_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _ends(model: nn.Module) -> list[nn.Module]:
    """The layers where tokens come in and go out."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    return [layer for layer in layers if layer is not None]
