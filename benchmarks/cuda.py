"""Everything that one card has to show, in one call of at most ten minutes.

The card's own speed comes first, then decoding against what reading both models takes, against the proposal
alone and against the authors' way, the first token, many aligners at once, aligners that are swapped, how
long the device waits for the host, and whether compiled layers pay. What the time does not allow for is left
out, and said to be.

    python -m benchmarks.cuda                # 8B + 1B shapes, bfloat16; writes results/bars-cuda.json
    python -m benchmarks.cuda --quick        # tiny shapes on this CPU: does it run at all?
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from benchmarks.adapters import save_adapter
from benchmarks.aligners import spread
from benchmarks.common import Benchmark, Options, Pair, checkpoints, random_prompts, say
from benchmarks.decode import slope_ms
from benchmarks.device_way import DeviceWay
from benchmarks.engine_way import Job
from benchmarks.limits import Machine, Speed, step_cost
from benchmarks.peers import AuthorsWay
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import Worker, worker

RESULTS = Path(__file__).parent / "results" / "bars-cuda.json"
FIRST = "alone: first token, aligned ÷ identity"
SWAPPED = "longest step while aligners are swapped ÷ median step"
GAP = "share of a step in which the device waits for the host"
COPY = "copy, GB/s"
IDENTITY = "identity"
ONE = "one aligner"


def claims(options: argparse.Namespace) -> list[Claim]:
    """What an H200 was expected to show, beforehand, and what it must.

    The many full aligners must be read, each of them: at 64 rows of 1k tokens that alone is 2.3 × the bytes.
    """
    one, many = options.batches
    return [
        Claim(COPY, 4200.0),
        Claim(_share(one), 0.78, at_least=0.75),
        Claim(_aligned(one), 1.2, at_most=1.25),
        Claim(_aligned(many), 1.22, at_most=1.25),
        Claim(_authors(one), 9.0, at_least=5.0),
        Claim(_authors(many), 300.0, at_least=100.0),
        Claim(FIRST, 1.16, at_most=1.2),
        Claim(_several(many, options.full, "full"), 2.2, at_most=2.2),
        Claim(_several(many, options.lora, "LoRA"), 1.12, at_most=1.3),
        Claim(SWAPPED, 1.3, at_most=2.0),
        Claim(GAP, 0.02, at_most=0.05),
        Claim(_compiled(one), 0.97),
        Claim(_compiled(many), 0.97),
    ]


def _share(batch: int) -> str:
    return f"batch {batch}: limit ÷ step, aligned"


def _aligned(batch: int) -> str:
    return f"batch {batch}: step, aligned ÷ identity"


def _authors(batch: int) -> str:
    return f"batch {batch}: tokens/s, aligned ÷ authors"


def _several(batch: int, count: int, kind: str) -> str:
    return f"batch {batch}: step, {count} {kind} aligners ÷ 1"


def _compiled(batch: int) -> str:
    return f"batch {batch}: step, layers compiled ÷ as they are"


def add_options(options: Options) -> None:
    quick = {"pair": "tiny", "device": "cpu", "dtype": "float32", "json": None}
    options.otherwise(quick, pair="llama", device="cuda", dtype="bfloat16", json=RESULTS)
    options.add("--batches", [1, 64], "a lone stream, and many", quick=[1, 4])
    options.add("--prompt", 1024, "tokens in each prompt", quick=16)
    options.add("--full", 16, "full aligners at once", quick=2)
    options.add("--lora", 64, "LoRA aligners at once", quick=3)
    options.add("--rank", 16, "of the LoRA aligners", quick=4)
    options.add("--steps", 24, "steps in a turn", quick=3)
    options.add("--rounds", 3, "turns of every way", quick=1)
    options.add("--swaps", 6, "how often an aligner is swapped", quick=2)
    options.add("--seconds", 560.0, "after which what is left is left out")


@dataclass(slots=True)
class Found:
    """What is known so far; whatever happens later, this is told."""

    figures: dict[str, float] = field(default_factory=dict)
    machine: list[list[Cell]] = field(default_factory=list)
    steps: list[list[Cell]] = field(default_factory=list)
    others: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def outcome(self, options: argparse.Namespace) -> Outcome:
        proposal, aligner = PAIRS[options.pair]
        sizes = f"{proposal.num_parameters / 1e6:.0f} M + {aligner.num_parameters / 1e6:.0f} M parameters"
        title = f"Decode, {sizes}, {options.dtype}, prompts of {options.prompt} tokens"
        columns = [
            "batch",
            "aligners",
            "ms a step",
            "tokens/s",
            "limit, ms",
            "share of the limit",
            "peak MiB",
        ]
        rates = ["copy (read + write), GB/s", "sum (read), GB/s", "matrix product, GFLOP/s"]
        tables = [
            Table("The machine, in the same run", rates, self.machine),
            Table(title, columns, self.steps),
            Table("Besides", ["what", "ms"], self.others),
        ]
        return Outcome([table for table in tables if table.rows], self.figures, self.notes)


@dataclass(frozen=True, slots=True)
class Run:
    """What all parts of a run need."""

    options: argparse.Namespace
    pair: Pair
    scratch: Path
    found: Found

    def job(self, aligners: tuple[str, ...], *, aligner_slots: int = 0, is_compiled: bool = False) -> Job:
        """Room for the larger batch through all that is asked of it."""
        options, batch = self.options, max(self.options.batches)
        num_turns = 3 * options.rounds + 4
        num_tokens = options.prompt + num_turns * (options.steps + 2) + 40 * options.swaps
        room = self.pair.kv_bytes(batch + 1, num_tokens, options.dtype)
        models = (self.pair.proposal, aligners, options.device, options.dtype)
        return Job(*models, batch + 1, room, aligner_slots=aligner_slots, compile=is_compiled)

    def step_ms(self, way: Worker, batch: int, aligners: list[int]) -> float:
        """Milliseconds a step of so many streams, each with its aligner; the best turn of all."""
        options = self.options
        way.ask("hold", random_prompts(options, batch, options.prompt, seed=0), aligners)
        way.ask("steps", 4)
        turns = [way.ask("steps", options.steps).steps_s for _ in range(options.rounds)]
        way.ask("release")
        return min(sum(took) / len(took) for took in turns) * 1e3

    def note_step(self, way: Worker, batch: int, name: str, num_read: int, ms: float) -> None:
        """A line of the table; so many aligners of full size are read in a step."""
        options, (proposal, aligner) = self.options, PAIRS[self.options.pair]
        cost = step_cost(proposal, [aligner] * num_read, batch, options.prompt, options.dtype)
        limit = self.speed.limit_ms(cost)
        cells: list[Cell] = [batch, name, ms, batch / ms * 1e3, limit, limit / ms, way.peak_mib]
        self.found.steps.append(cells)

    @property
    def speed(self) -> Speed:
        """What the machine can do, as it was measured."""
        copy, read, flops = (float(str(rate)) * 1e9 for rate in self.found.machine[0])
        return Speed(copy, read, flops)


def measure_machine(run: Run) -> None:
    """The card's own speed: all limits are made of it."""
    options = run.options
    with worker(Machine, options.device, options.dtype, options.quick) as machine:
        speed: Speed = machine.ask("measure")
    run.found.machine.append([speed.copy / 1e9, speed.read / 1e9, speed.flops / 1e9])
    run.found.figures[COPY] = speed.copy / 1e9
    say(f"cuda: copies {speed.copy / 1e9:.0f} GB/s")


def measure_pair(run: Run) -> None:
    """One proposal and one aligner: steps, the first token, the device's gaps, the authors' way."""
    options, found = run.options, run.found
    with ExitStack() as stack:
        way = stack.enter_context(worker(DeviceWay, run.job(run.pair.aligners)))
        aligned = {}
        for batch in options.batches:
            say(f"cuda: batch {batch}, aligned and alone")
            aligned[batch] = run.step_ms(way, batch, [0] * batch)
            run.note_step(way, batch, ONE, 1, aligned[batch])
            alone = run.step_ms(way, batch, [-1] * batch)
            run.note_step(way, batch, IDENTITY, 0, alone)
            found.figures[_aligned(batch)] = aligned[batch] / alone
        one = options.batches[0]
        limits = [row[5] for row in found.steps if row[:2] == [one, ONE]]
        found.figures[_share(one)] = float(str(limits[0]))
        _measure_first_token(run, way)
        _measure_gap(run, way)
        authors = stack.enter_context(worker(AuthorsWay, run.job(run.pair.aligners)))
        _measure_authors(run, authors, aligned)


def _measure_first_token(run: Run, way: Worker) -> None:
    say("cuda: first token")
    options = run.options
    first_s: dict[str, float] = {}
    for name, aligner in ((ONE, 0), (IDENTITY, -1)):
        took = []
        for turn in range(options.rounds + 2):
            [prompt] = random_prompts(options, 1, options.prompt, seed=100 + 2 * turn + aligner)
            took.append(way.ask("first_token", prompt, aligner)[0])
        # The first two warm up.
        first_s[name] = min(took[2:])
        run.found.others.append([f"first token of {options.prompt}, {name}", first_s[name] * 1e3])
    run.found.figures[FIRST] = first_s[ONE] / first_s[IDENTITY]


def _measure_gap(run: Run, way: Worker) -> None:
    options, batch = run.options, run.options.batches[0]
    way.ask("hold", random_prompts(options, batch, options.prompt, seed=0), [0] * batch)
    way.ask("steps", 4)
    run.found.figures[GAP] = way.ask("gap_share", max(options.steps, 8))
    way.ask("release")


def _measure_authors(run: Run, authors: Worker, aligned: dict[int, float]) -> None:
    say("cuda: the authors' way")
    options = run.options
    prompts = random_prompts(options, 1, options.prompt, seed=0)
    authors.ask("generate", prompts, 4)
    short, long = 4, 4 + options.steps
    took = {length: [authors.ask("generate", prompts, length) for _ in range(2)] for length in (short, long)}
    ms = slope_ms(took[short], took[long], long - short)
    run.found.others.append(["a token of the authors' way", ms])
    for batch, step_ms in aligned.items():
        # It serves one request at a time, however many there are.
        run.found.figures[_authors(batch)] = ms / (step_ms / batch)


def measure_many(run: Run) -> None:
    """Many aligners at once, full ones and LoRA adapters, and full ones swapped while others are used."""
    options, found, batch = run.options, run.found, run.options.batches[1]
    base, shape = run.pair.aligners[0], run.pair.shapes[1]
    adapter = save_adapter(shape, base, run.scratch / "adapter", options.dtype, options.rank)
    say(f"cuda: loading {options.full} full aligners and {options.lora} LoRA aligners")
    aligners = (base,) * options.full + (adapter,) * options.lora
    [one_ms] = [float(str(row[2])) for row in found.steps if row[:2] == [batch, ONE]]
    with worker(DeviceWay, run.job(aligners, aligner_slots=options.full + 1)) as way:
        ms = run.step_ms(way, batch, spread(batch, options.full))
        run.note_step(way, batch, f"{options.full} full", options.full, ms)
        found.figures[_several(batch, options.full, "full")] = ms / one_ms
        ms = run.step_ms(way, batch, [options.full + at for at in spread(batch, options.lora)])
        run.note_step(way, batch, f"{options.lora} LoRA", 1, ms)
        found.figures[_several(batch, options.lora, "LoRA")] = ms / one_ms
        _measure_swaps(run, way)


def _measure_swaps(run: Run, way: Worker) -> None:
    say("cuda: swapping aligners")
    options, batch = run.options, run.options.batches[1]
    prompts = random_prompts(options, batch, options.prompt, seed=0)
    way.ask("hold", prompts, [0] * batch)
    way.ask("steps", 4)
    rest_s, took_s = way.ask("swap_steps", "aligner-1", run.pair.aligners[0], options.swaps)
    way.ask("release")
    median_s = statistics.median(rest_s)
    run.found.figures[SWAPPED] = max(took_s) / median_s
    run.found.others.append(["longest step while aligners are swapped", max(took_s) * 1e3])
    run.found.others.append(["median step at rest", median_s * 1e3])


def measure_compiled(run: Run) -> None:
    """The same steps with compiled layers: whether that pays beside captured steps."""
    plain_ms = {row[0]: float(str(row[2])) for row in run.found.steps if row[1] == ONE}
    say("cuda: compiling layers")
    with worker(DeviceWay, run.job(run.pair.aligners, is_compiled=True)) as way:
        for batch in run.options.batches:
            ms = run.step_ms(way, batch, [0] * batch)
            run.note_step(way, batch, f"{ONE}, compiled", 1, ms)
            run.found.figures[_compiled(batch)] = ms / plain_ms[batch]


PARTS: tuple[Callable[[Run], None], ...] = (measure_machine, measure_pair, measure_many, measure_compiled)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block once its time is up."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the {seconds:.0f} seconds were over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(options: argparse.Namespace) -> Outcome:
    found, began = Found(), time.perf_counter()
    try:
        with deadline(options.seconds), checkpoints(options) as pair:
            scratch = Path(pair.proposal).parent
            say(f"cuda: checkpoints after {time.perf_counter() - began:.0f} s")
            for part in PARTS:
                _try(part, Run(options, pair, scratch, found))
                say(f"cuda: {part.__name__} done after {time.perf_counter() - began:.0f} s")
    except TimeoutError as error:
        found.notes.append(f"Not all was measured: {error}.")
    return found.outcome(options)


def _try(part: Callable[[Run], None], run: Run) -> None:
    """What fails in one part is no reason to leave out the others."""
    try:
        part(run)
    except TimeoutError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        run.found.notes.append(f"`{part.__name__}` failed: {lines[-1]}")
        say(str(error))


BENCHMARK = Benchmark("bars", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])
