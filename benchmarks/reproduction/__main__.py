"""The paper's comparisons at the demo's scale, with several seeds: quality, divergence, cost, first token.

    python -m benchmarks.reproduction --work DIR --json benchmarks/results/reproduction-cpu.json

A seed draws training prompts, wanted answers, the order of training, the questions and the noise of answers
of its own. The proposal and the models that aligners begin as are the demo's, the same for all seeds. What is
done in DIR is kept: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import environment, say
from benchmarks.reproduction.lines import ALONE, FULL_SFT, Line, Seed
from benchmarks.reproduction.measures import Exam, Figures
from benchmarks.reproduction.models import STYLE, Cost, Models
from benchmarks.tables import Cell, Outcome, Table, document, markdown, write
from ram_core.demo import bundle_path
from ram_core.progress import terminal_progress

_COLUMNS = (
    "", "style, %", "facts, %", "KL(π‖p)", "KL(p‖q)", "ESS", "fallback, %", "FLOPs ÷ full SFT",
    "CPU time ÷ full SFT", "with synthesis", "first token ÷ alone",
)  # fmt: skip
# Student's t for a two-sided interval of 95 %, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, up to 10")
    parser.add_argument("--prompts", type=int, default=4000, help="training prompts of a seed")
    parser.add_argument("--questions", type=int, default=400, help="held-out prompts of a seed")
    parser.add_argument("--base-steps", type=int, default=1200, help="warm-up of small and large bases")
    parser.add_argument("--threads", type=int, default=1, help="of each forward")
    parser.add_argument("--bundle", type=Path, default=bundle_path(), help="the demo's models")
    parser.add_argument("--work", type=Path, help="keep data, models and lines here")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = [_lines_of(seed, options, work) for seed in range(options.seeds)]
    found = Outcome(_tables(lines), {}, _notes(options))
    run = document("reproduction", environment(), vars(options), [], found)
    # No figure here has a bar: the table of claims would be empty.
    run["tables"].pop()
    say(markdown(run))
    if options.json:
        write(run, options.json)


def _lines_of(seed: int, options: argparse.Namespace, work: Path) -> list[Line]:
    """All lines of a seed; those that an earlier run wrote down are not measured again."""
    path = work / f"seed-{seed}" / "lines.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (known := _read(path)) and path.with_suffix(".complete").exists():
        return known
    with terminal_progress() as tell, path.open("w", encoding="utf-8") as file:
        models = Models(work, options.bundle, seed, options.prompts, options.base_steps, tell)
        exam = Exam(options.questions, seed, tell)
        lines = []
        for line in Seed(models, exam).lines():
            lines.append(line)
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            say(f"seed {seed}: {line.name}: style {line.figures.style:.1%}, facts {line.figures.facts:.1%}")
    path.with_suffix(".complete").touch()
    return lines


def _read(path: Path) -> list[Line]:
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    return [
        Line(row["group"], row["name"], Figures(**row["figures"]), row["cost"] and Cost(**row["cost"]))
        for row in rows
    ]


def _tables(seeds: Sequence[Sequence[Line]]) -> list[Table]:
    """A table for each group of lines, its cells means over seeds with their intervals."""
    groups = list(dict.fromkeys(line.group for line in seeds[0]))
    return [
        Table(
            f"{group[0].upper()}{group[1:]}",
            _COLUMNS,
            [[line.name, *_cells(seeds, at)] for at, line in enumerate(seeds[0]) if line.group == group],
        )
        for group in groups
    ]


def _cells(seeds: Sequence[Sequence[Line]], at: int) -> list[Cell]:
    def over(value: Callable[[Line, dict[str, Line]], float], scale: float = 1.0) -> str:
        values = []
        for lines in seeds:
            by_name = {line.name: line for line in lines}
            values.append(scale * value(lines[at], by_name))
        return interval(values)

    def cost(line: Line) -> Cost:
        return line.cost or Cost(math.nan, math.nan, math.nan, math.nan)

    def full(by_name: dict[str, Line]) -> Cost:
        return cost(by_name[FULL_SFT])

    return [
        over(lambda line, _: line.figures.style, 100),
        over(lambda line, _: line.figures.facts, 100),
        over(lambda line, _: line.figures.kl_pi_p),
        over(lambda line, _: line.figures.kl_p_q),
        over(lambda line, _: line.figures.ess),
        over(lambda line, _: line.figures.fallback, 100),
        over(lambda line, by_name: cost(line).fit_flops / full(by_name).fit_flops),
        over(lambda line, by_name: cost(line).fit_cpu_s / full(by_name).fit_cpu_s),
        over(lambda line, by_name: cost(line).cpu_s / full(by_name).fit_cpu_s),
        over(lambda line, by_name: line.figures.first_token_s / by_name[ALONE].figures.first_token_s),
    ]


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval of values that are independent; a dash if there are none."""
    if any(math.isnan(value) for value in values):
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    half = _T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    digits = 1 if mean >= 10 else 2 if mean >= 1 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _notes(options: argparse.Namespace) -> list[str]:
    return [
        f"Style {STYLE}; {options.prompts} training prompts, one epoch; {options.questions} questions that "
        f"no training saw; {options.seeds} seeds, means with 95 % intervals over them.",
        "Style: answers that keep to it. Facts: answers to questions of facts that state the fact. KL in "
        "nats a token, over the tokens drawn.",
        "Costs are those of the fit; with synthesis, the proposal's own answers to the training prompts are "
        "added, though one run makes them for all aligners. What the small models had read before (the "
        "demo's corpus, once for all) is not.",
        f"First tokens of one prompt at a time, {options.threads} thread.",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
