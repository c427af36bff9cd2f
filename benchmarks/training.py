"""Training an aligner beside what it replaces: sampling one answer at a time, and tuning the proposal.

python -m benchmarks.training
python -m benchmarks.training --device cuda --dtype bfloat16 --pair llama   # one step at length 2048
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import peak_mib, worker
from ram_core.demo import bundle_path
from ram_core.engine.config import EngineConfig
from ram_core.engine.local import LocalEngine
from ram_core.models.loading import load_model
from ram_core.params import AlignmentParams, SamplingParams
from ram_core.progress import Progress
from ram_core.training.config import FitConfig, TrainConfig
from ram_core.training.examples import TrainingPair

SYNTHESIS = "synthesis: tokens/s of the engine ÷ of `model.generate` at batch 1"
TIME = "time: full SFT of the proposal ÷ a fit step"
MEMORY = "memory: full SFT of the proposal ÷ a fit step"
DEMO_TIME = f"{TIME}, the demo's models"
RECOMPUTED = "a fit step's memory, layers computed again ÷ kept"
_SAMPLING = {"temperature": 0.5, "top_p": 0.95, "top_k": 10}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    if options.device != "cpu":
        return [Claim(RECOMPUTED, 0.5)]
    return [
        Claim(SYNTHESIS, 9.0, at_least=5.0),
        # Two answers a pair: half of what the shapes alone would save.
        Claim(TIME, 5.0, at_least=4.0),
        Claim(MEMORY, 5.0, at_least=4.0),
        Claim(DEMO_TIME, 4.5, at_least=4.0),
    ]


def add_options(options: Options) -> None:
    options.add("--prompts", 64, "prompts that are answered at once", quick=2)
    options.add("--alone", 4, "prompts that are answered one at a time", quick=1)
    options.add("--tokens", 32, "tokens of each answer", quick=4)
    options.add("--pairs", 4, "pairs in an update", quick=2)
    options.add("--length", 128, "tokens of a prompt and its answer, half of them each", quick=16)
    options.add("--steps", 3, "updates that are timed", quick=1)


@dataclass(frozen=True)
class Sampled:
    """Tokens that were drawn, and how long that took."""

    num_tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


class Synthesis:
    """One model, asked by the engine and by the library that it comes from."""

    def __init__(self, source: str, num_tokens: int, max_batch: int) -> None:
        self._num_tokens = num_tokens
        self._engine = LocalEngine.load(EngineConfig(proposal=source, device="cpu", max_batch=max_batch))
        self._model = load_model(
            source, device=torch.device("cpu"), dtype=torch.float32, attn_implementation="sdpa"
        )

    def engine(self, prompts: list[list[int]]) -> Sampled:
        began = time.perf_counter()
        sampling = [
            SamplingParams(seed=seed, max_tokens=self._num_tokens, **_SAMPLING)
            for seed in range(len(prompts))
        ]
        choices = self._engine.generate(prompts, sampling, AlignmentParams())
        return Sampled(sum(len(choice.token_ids) for choice in choices), time.perf_counter() - began)

    def generate(self, prompts: list[list[int]]) -> Sampled:
        began, num_tokens = time.perf_counter(), 0
        for prompt in prompts:
            options = {"do_sample": True, "max_new_tokens": self._num_tokens, **_SAMPLING}
            with torch.inference_mode():
                ids = self._model.generate(torch.tensor([prompt]), **options)
            num_tokens += ids.shape[1] - len(prompt)
        return Sampled(num_tokens, time.perf_counter() - began)


@dataclass(frozen=True)
class Stepped:
    """What an update took; `mib` is what training holds beyond the libraries."""

    seconds: float
    mib: float
    num_tokens: int


class Fit:
    """Updates of one model by the loop that `ram train` runs."""

    def __init__(self, source: str, objective: str, dtype: str, is_recomputed: bool) -> None:
        # Its imports are not what is measured.
        from ram_core.training import fit, loop

        del loop
        self._fit = fit.fit_model
        self._options = {
            "model": source,
            "objective": objective,
            "dtype": dtype,
            "activation_checkpointing": is_recomputed,
            "max_ascent_nats": 1e9,
            "learning_rate": 1e-6,
        }

    def steps(self, pairs: list[TrainingPair], num_pairs: int, num_steps: int) -> Stepped:
        before = peak_mib()
        times: list[float] = []

        def note(_: Progress) -> None:
            times.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as scratch:
            config = TrainConfig(
                output=scratch,
                fit=FitConfig(batch_size=num_pairs, max_steps=num_steps + 1, **self._options),
            )
            self._fit(config, pairs, Path(scratch) / "fit", note)
        # The first one allocates the optimizer's state.
        seconds = statistics.median(end - start for start, end in itertools.pairwise(times[1:]))
        num_answers = 1 if self._options["objective"] == "sft" else 2
        num_tokens = num_answers * num_pairs * (len(pairs[0].prompt) + len(pairs[0].wanted))
        return Stepped(seconds, peak_mib() - (0 if torch.cuda.is_initialized() else before), num_tokens)


def run(options: argparse.Namespace) -> Outcome:
    return _on_device(options) if options.device != "cpu" else _on_cpu(options)


def _on_cpu(options: argparse.Namespace) -> Outcome:
    figures, tables = {}, []
    with checkpoints(options) as pair:
        tables.append(_synthesis(options, pair.proposal, figures))
        shaped = _pairs(options, options.length, options.pairs)
        tables.append(
            _steps(f"the `{options.pair}` pair", (pair.proposal, pair.aligners[0]), shaped, options)
        )
    proposal, aligner = bundle_path() / "proposal", sorted((bundle_path() / "aligners").iterdir())[0]
    like_the_demo = [
        TrainingPair(each.prompt[:18], each.wanted[:12], each.proposed[:12])
        for each in _pairs(options, 60, 32, 1000)
    ]
    tables.append(_steps("the demo's models", (str(proposal), str(aligner)), like_the_demo, options))
    for name, table in ((TIME, tables[1]), (DEMO_TIME, tables[2])):
        figures[name] = _ratio(table, 1)
    figures[MEMORY] = _ratio(tables[1], 3)
    return Outcome(tables, figures)


def _synthesis(options: argparse.Namespace, source: str, figures: dict[str, float]) -> Table:
    say("training: sampling")
    prompts = random_prompts(options, options.prompts, 32, seed=0)
    with worker(Synthesis, source, options.tokens, options.prompts) as at:
        # A first time each, for what is compiled or allocated once.
        at.ask("engine", prompts)
        at.ask("generate", prompts[:1])
        found = {
            f"engine, {options.prompts} at once": at.ask("engine", prompts),
            "`model.generate`, one at a time": at.ask("generate", prompts[: options.alone]),
        }
    ours, theirs = found.values()
    figures[SYNTHESIS] = ours.rate / theirs.rate
    rows: list[list[Cell]] = [[way, each.num_tokens, each.rate] for way, each in found.items()]
    title = (
        f"Answers of {options.tokens} tokens drawn from the proposal, temperature 0.5, top-p 0.95, top-k 10"
    )
    return Table(title, ["way", "tokens", "tokens/s"], rows)


def _steps(
    what: str, models: tuple[str, str], pairs: list[TrainingPair], options: argparse.Namespace
) -> Table:
    """Rows: full SFT of the proposal, and Eq. 8 of the aligner."""
    rows: list[list[Cell]] = []
    for way, source, objective in (
        ("full SFT of the proposal", models[0], "sft"),
        ("`ram` step of the aligner", models[1], "ram"),
    ):
        say(f"training: {way}, {what}")
        with worker(Fit, source, objective, "float32", False) as at:
            found = at.ask("steps", pairs, len(pairs), options.steps)
        rows.append([way, found.seconds * 1e3, found.num_tokens / found.seconds, found.mib])
    first = pairs[0]
    lengths = f"prompts of {len(first.prompt)} tokens, answers of {len(first.wanted)}"
    title = f"An update of {len(pairs)} pairs, {what}, {lengths}"
    return Table(title, ["way", "ms", "tokens/s", "MiB beyond the libraries"], rows)


def _on_device(options: argparse.Namespace) -> Outcome:
    rows: list[list[Cell]] = []
    with checkpoints(options) as pair:
        pairs = _pairs(options, 2048, 2)
        for is_recomputed in (False, True):
            say(f"training: a step, layers {'computed again' if is_recomputed else 'kept'}")
            with worker(Fit, pair.aligners[0], "ram", options.dtype, is_recomputed) as at:
                found = at.ask("steps", pairs, len(pairs), options.steps)
            way = "computed again" if is_recomputed else "kept"
            rows.append([way, found.seconds * 1e3, found.num_tokens / found.seconds, found.mib])
    table = Table(
        f"A `ram` update of {len(pairs)} pairs of 2 × 2048 tokens, {options.dtype}, the aligner's layers",
        ["layers", "ms", "tokens/s", "peak MiB"],
        rows,
    )
    return Outcome([table], {RECOMPUTED: 1 / _ratio(table, 3)})


def _ratio(table: Table, column: int) -> float:
    """The first row's figure over the second's."""
    first, second = (float(row[column] or 0) for row in table.rows)
    return first / second


def _pairs(
    options: argparse.Namespace, length: int, num_pairs: int, vocab_size: int = 0
) -> list[TrainingPair]:
    """Pairs of made-up words, all of one length."""
    half = length // 2
    texts = random_prompts(options, num_pairs, length + half, seed=1)
    if vocab_size:
        texts = [[token % vocab_size for token in text] for text in texts]
    return [
        TrainingPair(tuple(text[:half]), tuple(text[half : 2 * half]), tuple(text[2 * half :]))
        for text in texts
    ]


BENCHMARK = Benchmark("training", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])
