"""Milliseconds of the resampling step: ours, in tensor operations and with a full sort; its share of a step.

The ways take turns on the same logits, each after a product of matrices, so that it finds the cache and
torch's threads as a forward pass leaves them. Ours is compiled code on the host, tensor operations elsewhere.
The share is measured inside the engine's loop.

    python -m benchmarks.resampling
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.overhead import TimedEngine, timed_job
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import worker
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from ram_core.resampling import AlignerLogits, StepFeatures, StepParams, draw_tokens, warm_up
from ram_core.resampling.nucleus import keep_top_p
from ram_core.resampling.step import draw_with_tensors

# Milliseconds of an aligned step on two cores, before the first run; and its share of an engine's step.
PREDICTED = {1: (0.3, 0.01), 8: (1.0, 0.025), 32: (3.0, 0.05)}
# Standard deviations of normal logits: about those of random weights, and of a trained model.
LAWS = {"flat": 0.3, "peaked": 4.0}
TOP_P = 0.95
ASKED = {
    "aligned": AlignmentParams((AlignerTerm("aligner"),), proposal_top_p=TOP_P),
    "identity": AlignmentParams(),
}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached at the largest batch."""
    largest = max(options.batches)
    found = []
    for batch in options.batches:
        ms, share = PREDICTED.get(batch, (None, None))
        found.append(Claim(_time(batch), ms))
        found.append(Claim(_share(batch), share, at_most=0.06 if batch == largest else None))
    return found


def _time(batch: int) -> str:
    return f"batch {batch}: ms, aligned, flat"


def _share(batch: int) -> str:
    return f"batch {batch}: share of an aligned step"


def add_options(options: Options) -> None:
    options.add("--batches", [1, 8, 32], "rows at once", quick=[1, 4])
    options.add("--rounds", 30, "turns of every way", quick=2)
    options.add("--prompt", 32, "tokens in each prompt of the engine's part", quick=8)
    options.add("--steps", 48, "steps of the engine's part", quick=8)


def draw_by_sorting(logits: Tensor, terms: list[AlignerLogits], *_: object, **__: object) -> Tensor:
    """The least that the step can be with a sort: nucleus, product, KL and a draw, in plain torch."""
    log_p = logits.log_softmax(-1)
    scores = log_p
    if terms:
        log_q = terms[0].logits.log_softmax(-1)
        p, order = log_p.exp().sort(-1, descending=True)
        is_beyond = p.cumsum(-1) - p >= TOP_P
        scores = (log_p + log_q).masked_fill(is_beyond.scatter(-1, order, is_beyond), -torch.inf)
        (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.multinomial(scores.softmax(-1), 1)


WAYS: dict[str, Callable[..., object]] = {
    "ours": draw_tokens,
    "tensors": draw_with_tensors,
    "sort": draw_by_sorting,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One batch: its logits, and what its rows ask for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: int, scale: float, rows: str, vocab_size: int, device: str) -> Case:
        generator = torch.Generator().manual_seed(batch)
        logits, other = (torch.randn(2, batch, vocab_size, generator=generator) * scale).to(device)
        asked = [(SamplingParams(), ASKED[rows])] * batch
        term = AlignerLogits(torch.arange(batch, device=device), other, torch.ones(batch, device=device))
        params = StepParams.of(asked, seeds=range(batch), positions=[0] * batch).to(device)
        terms = [term] if rows == "aligned" else []
        return cls(
            (logits, terms, params, StepFeatures.of(asked)),
            {"vocab_size": vocab_size, "eos_ids": torch.tensor([1], device=device)},
        )

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Milliseconds of every way, round after round."""
        device, batch = self.args[0].device, len(self.args[0])
        weights, hidden = torch.randn(2048, 2048, device=device), torch.randn(batch, 2048, device=device)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds + 1):
            for way, draw in WAYS.items():
                torch.mm(hidden, weights)
                _settle()
                began = time.perf_counter()
                draw(*self.args, **self.kwargs)
                _settle()
                found[way].append((time.perf_counter() - began) * 1e3)
        return {way: all_ms[1:] for way, all_ms in found.items()}


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def nucleus_sizes(vocab_size: int) -> str:
    """How many tokens each law's nucleus holds."""
    sizes = []
    for law, scale in LAWS.items():
        logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * scale
        kept = keep_top_p(logits.softmax(-1), torch.tensor([TOP_P]))
        sizes.append(f"{law} {int(kept.sum())}")
    return f"Tokens in the nucleus, of {vocab_size}: {', '.join(sizes)}."


@torch.inference_mode()
def _alone(options: argparse.Namespace, figures: dict[str, float]) -> Table:
    """The step by itself; the best of all rounds, as noise only adds, and how much there was."""
    vocab_size = PAIRS[options.pair][0].vocab_size
    cells: list[list[Cell]] = []
    for batch in options.batches:
        say(f"resampling: batch {batch}")
        for law, scale in LAWS.items():
            for rows in ASKED:
                ms = Case.of(batch, scale, rows, vocab_size, options.device).measure(options.rounds)
                ours, tensors, by_sort = (min(ms[way]) for way in WAYS)
                median = statistics.median(ms["ours"])
                ratios = [tensors / ours, by_sort / ours]
                cells.append([batch, law, rows, ours, median, tensors, by_sort, *ratios])
                if (law, rows) == ("flat", "aligned"):
                    figures[_time(batch)] = ours
    columns = ["batch", "law", "rows", "ours, ms", "median", "tensors, ms", "sort, ms"]
    return Table("The step alone", [*columns, "tensors ÷ ours", "sort ÷ ours"], cells)


def _in_engine(options: argparse.Namespace, figures: dict[str, float]) -> Table:
    """Its part of the engine's steps, every row aligned."""
    cells: list[list[Cell]] = []
    with checkpoints(options) as pair, worker(TimedEngine, timed_job(pair, options)) as engine:
        for batch in options.batches:
            say(f"resampling: engine, batch {batch}")
            engine.ask("hold", random_prompts(options, batch, options.prompt, seed=0), [0] * batch)
            engine.ask("steps", 4)
            parts = engine.ask("parts", options.steps)
            engine.ask("release")
            figures[_share(batch)] = parts.resampling_s / parts.steps_s
            each = [s / options.steps * 1e3 for s in (parts.steps_s, parts.resampling_s)]
            cells.append([batch, *each, figures[_share(batch)]])
    return Table("Inside the engine", ["batch", "step, ms", "resampling, ms", "resampling ÷ step"], cells)


def run(options: argparse.Namespace) -> Outcome:
    began = time.perf_counter()
    warm_up(options.device)
    warmed_s = time.perf_counter() - began
    figures: dict[str, float] = {}
    tables = [_alone(options, figures), _in_engine(options, figures)]
    notes = [
        nucleus_sizes(PAIRS[options.pair][0].vocab_size),
        f"Warm-up: {warmed_s:.1f} s. Compiling takes most of it, once: the code is kept on disk.",
    ]
    return Outcome(tables, figures, notes)


BENCHMARK = Benchmark("resampling", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])
