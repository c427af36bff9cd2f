"""What all commands share: their options, their checkpoints, where they run, what they print and write."""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.shapes import PAIRS, Shape, save_checkpoint
from benchmarks.tables import Claim, Outcome, document, markdown, write
from benchmarks.workers import worker

ITEMSIZE = {"float32": 4, "bfloat16": 2}
PAGE_SIZE = 16


class Options(argparse.ArgumentParser):
    """The options of a command; each may have a smaller default for `--quick`."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawTextHelpFormatter)
        self._quick: dict[str, Any] = {}
        self.add_argument("--pair", choices=sorted(PAIRS), default="small")
        self.add_argument("--device", default="cpu")
        self.add_argument("--dtype", choices=sorted(ITEMSIZE), default="float32")
        self.add_argument("--quick", action="store_true", help="smaller settings: does it run at all?")
        self.add_argument("--models", type=Path, help="keep the checkpoints here, and find them here")
        self.add_argument("--json", type=Path, help="also write the results here")

    def add(self, flag: str, default: Any, help: str, *, quick: Any = None) -> None:
        """A number, or with a list as its default several."""
        sample = default[0] if isinstance(default, list) else default
        nargs = "+" if isinstance(default, list) else None
        action = self.add_argument(flag, type=type(sample), default=default, help=help, nargs=nargs)
        if quick is not None:
            self._quick[action.dest] = quick

    def otherwise(self, quick: dict[str, Any], **usual: Any) -> None:
        """Other defaults for what all commands share."""
        self.set_defaults(**usual)
        self._quick |= quick

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, with the smaller defaults if they are wanted."""
        if self.parse_args(arguments).quick:
            self.set_defaults(**self._quick)
        return self.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command: its claims with what is expected of them, its options, and what it does."""

    name: str
    description: str | None
    claims: Callable[[argparse.Namespace], Sequence[Claim]]
    add_options: Callable[[Options], None]
    run: Callable[[argparse.Namespace], Outcome]

    def main(self, arguments: Sequence[str]) -> None:
        """Measure, print, and write what was asked for."""
        parser = Options(self.description)
        self.add_options(parser)
        options = parser.read(arguments)
        facts, began = environment(), time.perf_counter()
        found = self.run(options)
        facts["seconds"] = f"{time.perf_counter() - began:.0f}"
        run = document(self.name, facts, vars(options), self.claims(options), found)
        print(markdown(run))
        if options.json:
            write(run, options.json)


@dataclass(frozen=True, slots=True)
class Pair:
    """A proposal and aligners on disk, with their shapes."""

    proposal: str
    aligners: tuple[str, ...]
    shapes: tuple[Shape, Shape]

    def kv_bytes(self, num_sequences: int, num_tokens: int, dtype: str, *, is_aligned: bool = True) -> int:
        """KV memory for so many sequences of so many tokens, whole pages and the trash page counted."""
        kept = sum(shape.num_kept for shape in (self.shapes if is_aligned else self.shapes[:1]))
        num_pages = num_sequences * (num_tokens // PAGE_SIZE + 2) + 2
        return num_pages * PAGE_SIZE * kept * ITEMSIZE[dtype]


@contextmanager
def checkpoints(options: argparse.Namespace, num_aligners: int = 1) -> Iterator[Pair]:
    """The pair that is asked for, made where it is not there yet."""
    shapes = PAIRS[options.pair]
    with tempfile.TemporaryDirectory() as scratch:
        root = (options.models or Path(scratch)) / f"{options.pair}-{options.dtype}"
        wanted = [("proposal", shapes[0])] + [(f"aligner-{at}", shapes[1]) for at in range(num_aligners)]
        missing = [(name, shape, at) for at, (name, shape) in enumerate(wanted) if not _is_made(root / name)]
        if missing:
            # Made elsewhere, as what this process holds on a device would be missing there.
            with worker(CheckpointMaker, root, options.dtype, options.device) as maker:
                for name, shape, seed in missing:
                    maker.ask("make", name, shape, seed)
        yield Pair(str(root / "proposal"), tuple(str(root / name) for name, _ in wanted[1:]), shapes)


def _is_made(directory: Path) -> bool:
    # The tokenizer is saved last.
    return (directory / "tokenizer.json").is_file()


class CheckpointMaker:
    """Makes checkpoints in its process."""

    def __init__(self, root: Path, dtype: str, device: str) -> None:
        self._root, self._dtype, self._device = root, dtype, device

    def make(self, name: str, shape: Shape, seed: int) -> None:
        save_checkpoint(shape, self._root / name, self._dtype, self._device, seed)


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "CPU": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "GiB": f"{memory:.0f}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return facts | ({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu_name() -> str:
    """The processor's name, and the widest arithmetic that torch uses on it."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return f"{platform.processor() or platform.machine()} ({capability})"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({capability})"


def random_prompts(options: argparse.Namespace, batch: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Prompts of made-up words, none of them special; the same for the same seed."""
    noise = random.Random(f"{seed} {batch} {num_tokens}")
    vocab_size = PAIRS[options.pair][0].vocab_size
    return [[noise.randrange(4, vocab_size) for _ in range(num_tokens)] for _ in range(batch)]


def say(line: str) -> None:
    """Tell how far a run is, beside its results."""
    print(line, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
