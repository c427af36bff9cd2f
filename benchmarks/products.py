"""The matrix products of a step, against oneDNN's on weights laid out for it, and PyTorch's plain ones.

All of a proposal's weights are multiplied one after the other: each comes from memory, as in a step. The
three ways take turns.

    python -m benchmarks.products
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common import Benchmark, Options, say
from benchmarks.shapes import PAIRS, Shape
from benchmarks.tables import Cell, Claim, Outcome, Table
from ram_core.engine.memory import keep_freed_memory
from ram_core.models.matrix_product import lay_out, lay_out_bias, multiply

# What oneDNN is told to expect.
TYPICAL_ROWS = 32
PREDICTED = {1: 0.65, 8: 0.75, 32: 0.9, 512: 1.0}

Product = Callable[[Tensor], Tensor]


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(_name(rows), PREDICTED.get(rows), at_most=1.05) for rows in options.rows]


def _name(rows: int) -> str:
    return f"{rows} rows: time, ours ÷ oneDNN's"


def add_options(options: Options) -> None:
    options.add("--rows", [1, 8, 32, 512], "rows of the other factor", quick=[1, 4])
    options.add("--rounds", 15, "turns of every way", quick=2)
    options.otherwise({"pair": "tiny"})


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """[out, in] of every linear layer, in the order in which a token meets them."""
    kv = shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return layer * shape.layers + [(shape.vocab_size, hidden)]


def ways(shapes: Sequence[tuple[int, int]]) -> dict[str, list[Product]]:
    """Every matrix as each way's product."""
    found: dict[str, list[Product]] = {"ours": [], "oneDNN": [], "plain": []}
    for num_out, num_in in shapes:
        weight = torch.randn(num_out, num_in)
        panels, bias = lay_out([weight], *weight.shape), lay_out_bias(None, num_out)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        found["ours"].append(lambda x, panels=panels, bias=bias: multiply(x, panels, bias))
        found["oneDNN"].append(
            lambda x, packed=packed: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        )
        found["plain"].append(lambda x, weight=weight: linear(x, weight))
    return found


@torch.inference_mode()
def run(options: argparse.Namespace) -> Outcome:
    keep_freed_memory()
    shapes = matrices(PAIRS[options.pair][0])
    products = ways(shapes)
    num_numbers = sum(num_out * num_in for num_out, num_in in shapes)
    rows_of_table: list[list[Cell]] = []
    figures = {}
    for rows in options.rows:
        say(f"products: {rows} rows")
        inputs = {num_in: torch.randn(rows, num_in) for _, num_in in shapes}
        took: dict[str, list[float]] = {way: [] for way in products}
        # The first round warms up.
        for turn in range(options.rounds + 1):
            for way, each in products.items():
                began = time.perf_counter()
                for product, (_, num_in) in zip(each, shapes, strict=True):
                    product(inputs[num_in])
                if turn:
                    took[way].append(time.perf_counter() - began)
        best = {way: min(times) for way, times in took.items()}
        gflops = [2 * rows * num_numbers / best[way] / 1e9 for way in best]
        rows_of_table.append([rows, *(best[way] * 1e3 for way in best), *gflops[:2]])
        figures[_name(rows)] = best["ours"] / best["oneDNN"]
    columns = ["rows", "ours, ms", "oneDNN, ms", "plain, ms", "ours, GFLOP/s", "oneDNN, GFLOP/s"]
    title = f"All {len(shapes)} matrices of a proposal, {num_numbers / 1e6:.0f} M numbers, float32"
    return Outcome([Table(title, columns, rows_of_table)], figures)


BENCHMARK = Benchmark("products", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])
