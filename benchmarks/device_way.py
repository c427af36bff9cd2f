"""Our engine in this process, with what only its insides tell: the device's gaps, and aligners swapped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.engine_way import EngineWay, Job
from ram_core.models.stacked import plain_weights


class DeviceWay(EngineWay):
    """An engine whose steps can be looked into."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._job = job

    def gap_share(self, num_steps: int) -> float:
        """The part of some steps of the held streams in which the device waited for the host.

        A gap is between the last work of a step, its results' copy, and the first of the next.
        """
        runner: Any = self.engine._runner
        graphs = runner._graphs
        begins: list[Any] = []
        ends: list[Any] = []

        def marked(work: Callable[..., Any], marks: list[Any], *, is_before: bool) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if is_before:
                    marks.append(self._mark())
                found = work(*args, **kwargs)
                if not is_before:
                    marks.append(self._mark())
                return found

            return run

        runner.launch = marked(type(runner).launch.__get__(runner), ends, is_before=False)
        compute = type(runner)._compute.__get__(runner)
        runner._compute = marked(compute, begins, is_before=True)
        if graphs is not None:
            # A step that nobody recorded is computed after it was looked for: the later mark counts.
            graphs.replay = marked(type(graphs).replay.__get__(graphs), begins, is_before=True)
        try:
            self.steps(num_steps)
        finally:
            del runner.launch, runner._compute
            if graphs is not None:
                del graphs.replay
        return self._share(begins, ends)

    def _mark(self) -> Any:
        if not self._job.device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _share(self, begins: list[Any], ends: list[Any]) -> float:
        if self._job.device.startswith("cuda"):
            torch.cuda.synchronize()
            passed = [begins[0].elapsed_time(mark) for mark in ends]
            began = [begins[0].elapsed_time(mark) for mark in begins]
        else:
            passed, began = ends, begins
        gaps = 0.0
        for before, after in itertools.pairwise(passed):
            gaps += next(mark for mark in reversed(began) if mark <= after) - before
        return gaps / (passed[-1] - passed[0])

    def swap_steps(self, name: str, source: str, num_swaps: int) -> tuple[list[float], list[float]]:
        """Seconds of the held streams' steps at rest, and while `name`, which none of them uses, is changed.

        Its weights come from pinned memory; `source` is a checkpoint of the same shape.
        """
        group = self.engine.bank.group_of[name]
        weights = _weights_of(source, self._job)
        rest_s = list(self.steps(2 * num_swaps).steps_s)
        took_s: list[float] = []
        for _ in range(num_swaps):
            began = time.perf_counter()
            slot = group.stage(weights)
            assert slot is not None
            # To begin a copy is part of the step before which it is done.
            first_s = time.perf_counter() - began
            took_s.append(first_s + self.steps(1).steps_s[0])
            while not group.is_settled(slot):
                took_s += self.steps(1).steps_s
            left = group.remove(name)
            group.add(name, slot)
            group.free(left)
            took_s += self.steps(1).steps_s
        return rest_s, took_s


def _weights_of(source: str, job: Job) -> dict[str, Tensor]:
    """A model's weights on the host, pinned where there is a device to copy them to."""
    model = AutoModelForCausalLM.from_pretrained(Path(source), dtype=getattr(torch, job.dtype))
    weights = plain_weights(model)
    if not job.device.startswith("cuda"):
        return weights
    return {name: weight.pin_memory() for name, weight in weights.items()}
