"""Steps recorded before serving, and replayed on the numbers of others of the same layout.

On CUDA a recording is a graph: the device runs it without the host's launching every operation anew. A
recording reads its numbers from memory of its own, which `replay` fills, and knows nothing else of a step
than its layout, by which it is found. A layout that nobody recorded runs as it always did.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

from ram_core.engine.layout import PackedStep, Served, Shapes, StepLayout, StepPacker, buckets
from ram_core.params import MAX_TOP_LOG_PROBS
from ram_core.resampling import StepFeatures

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""So many steps are recorded at most, if nobody says otherwise."""
_MIN_PAGES = 8
_FEATURES = (
    StepFeatures(has_greedy=True),
    StepFeatures(
        has_greedy=True,
        has_top_k=True,
        has_top_p=True,
        has_min_p=True,
        max_top_log_probs=MAX_TOP_LOG_PROBS,
    ),
    StepFeatures(is_aligned=True, has_greedy=True, has_proposal_top_p=True),
    StepFeatures(
        is_aligned=True,
        has_proposal_temperature=True,
        has_proposal_top_k=True,
        has_proposal_top_p=True,
        has_nucleus_mode=True,
        has_greedy=True,
        has_top_k=True,
        has_top_p=True,
        has_min_p=True,
        has_eos_priority=True,
        max_top_log_probs=MAX_TOP_LOG_PROBS,
    ),
)
"""What rows mostly ask for, and nearly all that they can: for the proposal alone, and with an aligner."""


def graph_shapes(max_batch: int, max_pages: int, num_kinds: int, max_graphs: int = MAX_GRAPHS) -> Shapes:
    """What steps are padded to, so that about `max_graphs` recordings hold all that is common.

    `num_kinds` counts the sets of models that steps use. Page tables may be wide, as a kernel reads of them
    only what a context has: the narrower widths are a luxury, and the first to go.
    """
    rows, pages = buckets(max_batch), [max_pages]
    while len(pages) < 3 and pages[0] // 4 >= _MIN_PAGES:
        pages.insert(0, pages[0] // 4)
    num_features = len(_FEATURES) // 2
    while len(pages) > 1 and num_kinds * num_features * len(rows) * len(pages) > max_graphs:
        del pages[0]
    return Shapes(rows, tuple(pages), _FEATURES)


def common_steps(
    packer: StepPacker, kinds: Sequence[Sequence[Served]], max_graphs: int = MAX_GRAPHS
) -> list[PackedStep]:
    """Steps of padding alone, of the layouts that `packer` gives to what is common; the most common first.

    A kind is a set of models, the proposal first.
    """
    return list(itertools.islice(_all_steps(packer, kinds), max_graphs))


def _all_steps(packer: StepPacker, kinds: Sequence[Sequence[Served]]) -> Iterator[PackedStep]:
    shapes = packer.shapes
    assert shapes is not None, "only padded steps have layouts in common"
    # Plain requests before those that ask for more; large steps first, in whose memory small ones fit.
    for is_plain in (True, False):
        for num_pages, models in itertools.product(reversed(shapes.pages), kinds):
            offered = [f for f in shapes.features if f.is_aligned == (len(models) > 1)]
            features = offered[0] if is_plain else offered[-1]
            for num_rows in reversed(shapes.rows):
                yield packer.blank(models, num_rows, num_pages, features)


Step = Callable[[StepLayout, Int64[Tensor, " number"]], Tensor]
"""What a step does on the device, of nothing but its layout and its numbers; returns its results."""


class Recording(Protocol):
    """A step that can run again on other numbers."""

    def replay(self, numbers: Int64[Tensor, " number"]) -> Tensor:
        """Run it; what it returns is overwritten by the next replay of this or another recording."""


class Recorder(Protocol):
    """Makes recordings."""

    def record(self, step: Callable[[Tensor], Tensor], numbers: Int64[Tensor, " number"]) -> Recording:
        """Record a step on numbers that may be used for it without harm, more than once."""


@dataclass(frozen=True, slots=True)
class _Rerun:
    """Runs the step itself on memory of its own."""

    step: Callable[[Tensor], Tensor]
    numbers: Tensor
    results: Tensor

    def replay(self, numbers: Tensor) -> Tensor:
        self.numbers.copy_(numbers)
        return self.results.copy_(self.step(self.numbers))


class EagerRecorder:
    """Records nothing: a replay runs the step anew, on memory like a graph's: the reference."""

    def record(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> Recording:
        own = numbers.clone()
        return _Rerun(step, own, step(own).clone())


@dataclass(frozen=True, slots=True)
class _Graph:
    """A CUDA graph, the memory it reads its numbers from, and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    results: Tensor

    def replay(self, numbers: Tensor) -> Tensor:
        self.numbers.copy_(numbers, non_blocking=True)
        self.graph.replay()
        return self.results


class CudaRecorder:
    """Captures CUDA graphs. They share one pool of memory, as one runs after the other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> Recording:
        own = numbers.to(self._device)
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            # Kernels are compiled, and libraries take their workspace, before anything is captured.
            for _ in range(2):
                step(own)
        main.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: what other threads do on the device meanwhile, as loading an aligner, is no fault.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = step(own)
        return _Graph(graph, own, results)


class StepGraphs:
    """Recordings by layout. `trouble` says why there are fewer than were wanted, if so."""

    trouble = ""

    def __init__(self, recorder: Recorder, step: Step) -> None:
        self._recorder = recorder
        self._step = step
        self._recordings: dict[StepLayout, Recording] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def record(self, steps: Sequence[PackedStep], progress: Callable[[str], None]) -> None:
        """Record steps that do no harm; if one cannot be recorded, those after it are left out too."""
        began = time.perf_counter()
        for index, packed in enumerate(steps, start=1):
            progress(f"capturing {index}/{len(steps)}")
            try:
                self._record(packed)
            except RuntimeError as error:
                # Out of memory, or a model looks at the device's numbers, which no graph can do.
                self.trouble = str(error).partition("\n")[0]
                logger.warning("No more than %d steps were captured: %s", len(self), self.trouble)
                break
        logger.info("captured %d steps in %.1f s", len(self), time.perf_counter() - began)

    def _record(self, packed: PackedStep) -> None:
        layout, step = packed.layout, self._step

        def run(numbers: Tensor) -> Tensor:
            return step(layout, numbers)

        self._recordings[layout] = self._recorder.record(run, torch.from_numpy(packed.numbers))

    def forget(self, model: str) -> None:
        """Let go of all recordings that a model takes part in: its weights are going."""
        gone = [layout for layout in self._recordings if any(use.model == model for use in layout.uses)]
        for layout in gone:
            del self._recordings[layout]

    def replay(self, layout: StepLayout, numbers: Int64[Tensor, " number"]) -> Tensor | None:
        """The results of a step, to be copied before the next replay; None if its layout is unknown."""
        recording = self._recordings.get(layout)
        return None if recording is None else recording.replay(numbers)
