"""`x @ weight.T + bias` in compiled code, for weights that were laid out for it. For float32 on CPU.

A decoding step multiplies a few rows by every weight, so weights come from memory, not from a cache, and
libraries made for large matrices wait for them. A weight lies in panels of 16 outputs, each one stream from
its first input to its last, which is asked for before it is needed. With 8 rows and fewer that takes two
thirds to four fifths of oneDNN's time, with more about the same (`python -m
benchmarks.products`).

Every output is a sum of sums over 256 inputs, in their order, each term added by a fused multiplication. So
a row's product is the same, bit for bit, whatever rows are beside it and however many threads there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ram_core.resampling.compiled import F32, ask_for_memory, entry, inner, made_of
from ram_core.resampling.threads import in_parallel

PANEL = 16
"""Outputs side by side."""

_LINE = 64
"""Bytes; PyTorch begins no tensor on CPU elsewhere."""

_plain = inner("contract")
# Numbers of a weight between the one that is multiplied and the one that is asked for.
_AHEAD = 64 * PANEL
# Inputs whose products are added up by themselves: rounding grows with the terms of a sum.
_BLOCK = 256
# Rows that lie so many numbers apart, or a multiple, drive each other out of the first cache.
_COLLIDING, _APART = 512, 16
# Below this many products of two numbers, another thread is not worth it.
_PRODUCTS_A_THREAD = 1 << 15
_HAS_AVX512 = bool(binding.get_host_cpu_features().get("avx512f", False))
# Rows that are multiplied at once: as many sums as there are registers for them.
_HEIGHTS = (16, 8, 4, 2, 1) if _HAS_AVX512 else (6, 4, 2, 1, 1)


def lay_out(
    rows: Iterable[Float[Tensor, "row input"]],
    num_out: int,
    num_in: int,
    room: Float[Tensor, "panel input 16"] | None = None,
) -> Float[Tensor, "panel input 16"]:
    """A weight in panels, in `room` if there is any; the last one is filled up with zeros.

    `rows` are all of the weight's, or some at a time: a multiple of 16, but for the last.
    """
    panels = torch.empty(-(-num_out // PANEL), num_in, PANEL) if room is None else room
    assert not panels.data_ptr() % _LINE, "a panel's 16 numbers are one line of memory"
    begin = 0
    for part in rows:
        end = begin + -(-len(part) // PANEL)
        _lay_out(part.detach().contiguous().numpy(), panels[begin:end].numpy(), torch.get_num_threads())
        begin = end
    return panels


def plain_layout(panels: Float[Tensor, "panel input 16"], num_out: int) -> Float[Tensor, "output input"]:
    """A copy of what `lay_out` was given."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:num_out].clone()


def lay_out_bias(bias: Float[Tensor, " output"] | None, num_out: int) -> Float[Tensor, " padded_output"]:
    """What `multiply` adds; zeros without a bias."""
    padded = torch.zeros(-(-num_out // PANEL) * PANEL)
    if bias is not None:
        padded[:num_out] = bias.detach()
    return padded


def multiply(
    x: Float[Tensor, "row input"],
    panels: Float[Tensor, "panel input 16"],
    bias: Float[Tensor, " padded_output"],
) -> Float[Tensor, "row padded_output"]:
    """`x @ weight.T + bias`, with the outputs that fill the last panel up."""
    out = torch.empty(len(x), len(bias))
    worthwhile = panels.numel() * len(x) // _PRODUCTS_A_THREAD
    num_threads = max(min(worthwhile, torch.get_num_threads()), 1)
    _multiply(x.contiguous().numpy(), panels.numpy(), bias.numpy(), out.numpy(), num_threads)
    return out


def _make_tile(height: int) -> Any:
    """Code that multiplies `height` rows by one panel, with all sums in registers."""
    number, lane = ir.IntType(64), ir.IntType(32)
    vector = ir.VectorType(ir.FloatType(), PANEL)
    zeros, unset = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)
    first_lane = ir.Constant(ir.VectorType(lane, PANEL), [0] * PANEL)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def array_of(at: int) -> Any:
            return context.make_array(signature.args[at])(context, builder, values[at])

        def vector_at(data: Any, at: Any) -> Any:
            return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())

        x, panels, bias, out = (array_of(at) for at in (0, 2, 4, 5))
        _, row, _, panel, _, _ = values
        num_in, x_step = (builder.extract_value(each.shape, 1) for each in (panels, x))
        out_step = builder.extract_value(out.shape, 1)
        column = builder.mul(panel, number(PANEL))
        rows = [builder.add(row, number(at)) for at in range(height)]
        sources = [builder.gep(x.data, [builder.mul(each, x_step)]) for each in rows]
        weights = builder.gep(panels.data, [builder.mul(column, num_in)])
        targets = [vector_at(out.data, builder.add(builder.mul(each, out_step), column)) for each in rows]
        own_bias = builder.load(vector_at(bias.data, column), align=4)
        for target in targets:
            builder.store(own_bias, target, align=4)
        kind = ir.FunctionType(vector, [vector, vector, vector])
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{PANEL}f32")
        with cgutils.for_range_slice(builder, number(0), num_in, number(_BLOCK)) as (start, _):
            end = builder.add(start, number(_BLOCK))
            end = builder.select(builder.icmp_signed("<", end, num_in), end, num_in)
            before, loop = builder.block, builder.append_basic_block("inputs")
            after = builder.append_basic_block("sums")
            builder.branch(loop)
            builder.position_at_end(loop)
            at, sums = builder.phi(number), [builder.phi(vector) for _ in rows]
            place = builder.mul(at, number(PANEL))
            weight = builder.load(vector_at(weights, place), align=4)
            ask_for_memory(builder, builder.gep(weights, [builder.add(place, number(_AHEAD))]))
            added = []
            for source, total in zip(sources, sums, strict=True):
                one = builder.insert_element(unset, builder.load(builder.gep(source, [at])), lane(0))
                everywhere = builder.shuffle_vector(one, unset, first_lane)
                added.append(builder.call(multiply_add, [everywhere, weight, total]))
            following = builder.add(at, number(1))
            begun = [start] + [zeros] * height
            for phi, at_first, then in zip([at, *sums], begun, [following, *added], strict=True):
                phi.add_incoming(at_first, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
            builder.position_at_end(after)
            for target, total in zip(targets, added, strict=True):
                builder.store(builder.fadd(builder.load(target, align=4), total), target, align=4)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def tile(typing_context: Any, x: Any, row: Any, panels: Any, panel: Any, bias: Any, out: Any) -> Any:
        return types.void(x, row, panels, panel, bias, out), generate

    return tile


_tile_a, _tile_b, _tile_c, _tile_d, _tile_e = (_make_tile(height) for height in _HEIGHTS)
_A, _B, _C, _D, _E = _HEIGHTS


@_plain
def _multiply_part(x: F32, panels: F32, bias: F32, out: F32, first: int, count: int) -> None:
    num_rows = len(x)
    for panel in range(len(panels) * first // count, len(panels) * (first + 1) // count):
        row = 0
        while row + _A <= num_rows:
            _tile_a(x, row, panels, panel, bias, out)
            row += _A
        while row + _B <= num_rows:
            _tile_b(x, row, panels, panel, bias, out)
            row += _B
        while row + _C <= num_rows:
            _tile_c(x, row, panels, panel, bias, out)
            row += _C
        while row + _D <= num_rows:
            _tile_d(x, row, panels, panel, bias, out)
            row += _D
        while row + _E <= num_rows:
            _tile_e(x, row, panels, panel, bias, out)
            row += _E


@_plain
def _copy_part(x: F32, target: F32, first: int, count: int) -> None:
    begin, end = x.shape[1] * first // count, x.shape[1] * (first + 1) // count
    for row in range(len(x)):
        target[row, begin:end] = x[row, begin:end]


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _turn_tile(typing_context: Any, weight: Any, panels: Any, panel: Any, at: Any) -> Any:
    """A panel's 16 outputs of 16 inputs from `at` on, in registers: four rounds of interleaving turn them."""
    vector, number = ir.VectorType(ir.FloatType(), PANEL), ir.IntType(64)
    half = PANEL // 2
    halves = [
        ir.Constant(
            ir.VectorType(ir.IntType(32), PANEL), [k // 2 + k % 2 * PANEL + begin for k in range(PANEL)]
        )
        for begin in (0, half)
    ]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, target = (context.make_array(signature.args[k])(context, builder, values[k]) for k in (0, 1))
        _, _, panel, at = values
        num_in = builder.extract_value(source.shape, 1)

        def place(data: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        first = builder.mul(panel, number(PANEL))
        rows = [builder.mul(builder.add(first, number(k)), num_in) for k in range(PANEL)]
        lines = [builder.load(place(source.data, builder.add(row, at)), align=4) for row in rows]
        for _ in range(4):
            pairs = [(lines[k], lines[k + half]) for k in range(half)]
            lines = [builder.shuffle_vector(*pair, lanes) for pair in pairs for lanes in halves]
        begin = builder.mul(builder.add(builder.mul(panel, num_in), at), number(PANEL))
        # Straight to memory, half the time: nobody reads it soon, and no line is fetched to be overwritten.
        past_caches = builder.module.add_metadata([ir.IntType(32)(1)])
        for k, line in enumerate(lines):
            goal = place(target.data, builder.add(begin, number(k * PANEL)))
            builder.store(line, goal, align=_LINE).set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.void(weight, panels, panel, at), generate


@_plain
def _lay_out_part(weight: F32, panels: F32, first: int, count: int) -> None:
    num_out, num_in = weight.shape
    for panel in range(len(panels) * first // count, len(panels) * (first + 1) // count):
        num_own, at = min(PANEL, num_out - panel * PANEL), 0
        while num_own == PANEL and at + PANEL <= num_in:
            _turn_tile(weight, panels, panel, at)
            at += PANEL
        for rest in range(at, num_in):
            for lane in range(num_own):
                panels[panel, rest, lane] = weight[panel * PANEL + lane, rest]
            panels[panel, rest, num_own:] = 0


def _compile(key: int) -> tuple[Any, Any]:
    """`key` is what numba's cache tells versions of this code by, besides this file."""

    @entry
    def multiply_rows(x: F32, panels: F32, bias: F32, out: F32, num_threads: int) -> None:
        assert key >= 0
        rows = x
        if len(x) > 1 and x.shape[1] % _COLLIDING == 0:
            rows = np.empty((len(x), x.shape[1] + _APART), np.float32)
            in_parallel(_copy_part, (x, rows), num_threads)
        in_parallel(_multiply_part, (rows, panels, bias, out), num_threads)

    @entry
    def lay_out_panels(weight: F32, panels: F32, num_threads: int) -> None:
        assert key >= 0
        in_parallel(_lay_out_part, (weight, panels), num_threads)

    return multiply_rows, lay_out_panels


_multiply, _lay_out = _compile(made_of() ^ crc32(bytes(_HEIGHTS)))
