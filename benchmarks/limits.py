"""How fast a step could be at most: bytes to read and numbers to multiply, over what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import ITEMSIZE
from benchmarks.shapes import Shape
from ram_core.models.packed_linear import pack_linears


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step must read and compute."""

    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What a machine can do: bytes and floating-point operations a second."""

    copy: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        """The faster of a large copy and a large sum: a step reads more than it writes."""
        return max(self.copy, self.read)

    def limit_ms(self, cost: Cost) -> float:
        """No step can be faster, however it is written."""
        return max(cost.num_bytes / self.bandwidth, cost.flops / self.flops) * 1e3

    def kind(self, cost: Cost) -> str:
        """Which of the two it is."""
        is_bytes = cost.num_bytes / self.bandwidth >= cost.flops / self.flops
        return "bandwidth" if is_bytes else "arithmetic"


def step_cost(proposal: Shape, aligners: list[Shape], batch: int, context: int, dtype: str) -> Cost:
    """A decode step of `batch` rows behind `context` tokens each, every row with one of the aligners.

    All weights that are used are read once, and each row's keys and values.
    """
    itemsize = ITEMSIZE[dtype]
    weights = sum(shape.num_read for shape in [proposal, *aligners])
    used = [proposal, *aligners[:1]]
    kept = sum(shape.num_kept for shape in used) * context * batch
    return Cost((weights + kept) * itemsize, sum(shape.token_flops(context) for shape in used) * batch)


class Machine:
    """Measures what the machine can do, between the turns of the others."""

    def __init__(self, device: str, dtype: str, is_quick: bool) -> None:
        self._device = torch.device(device)
        self._dtype = getattr(torch, dtype)
        is_large = self._device.type == "cuda"
        self._num_bytes = (1 << 32 if is_large else 1 << 28) >> (4 if is_quick else 0)
        self._side = (8192 if is_large else 2048) >> (2 if is_quick else 0)

    @torch.inference_mode()
    def measure(self, rounds: int = 5) -> Speed:
        """The best of some rounds."""
        source = torch.ones(self._num_bytes // 4, dtype=torch.float32, device=self._device)
        target = torch.empty_like(source)
        a = torch.ones(self._side, self._side, dtype=self._dtype, device=self._device)
        copy_s = self._best(lambda: target.copy_(source), rounds)
        read_s = self._best(source.sum, rounds)
        multiply_s = min(self._best(product, rounds) for product in self._products(a))
        return Speed(2 * self._num_bytes / copy_s, self._num_bytes / read_s, 2 * self._side**3 / multiply_s)

    def _products(self, a: Tensor) -> list[Callable[[], object]]:
        """The library's plain product, and on CPU the one that our layers use: which is faster depends."""
        layer = nn.Sequential(nn.Linear(self._side, self._side, bias=False, device=a.device, dtype=a.dtype))
        pack_linears(layer.requires_grad_(False))
        return [lambda: a @ a, lambda: layer(a)]

    def _best(self, work: Callable[[], object], rounds: int) -> float:
        took = []
        for _ in range(rounds + 1):
            self._settle()
            began = time.perf_counter()
            work()
            self._settle()
            took.append(time.perf_counter() - began)
        return min(took[1:])

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
