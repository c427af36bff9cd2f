"""What passes between tensors and compiled code, and how code is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ram_core.resampling import threads

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Logits(NamedTuple):
    """Raw logits of both models, padding columns included; `aligner_row` is -1 where there is no aligner."""

    proposal: F32
    aligner: F32
    aligner_row: I64
    strength: F32


class Asked(NamedTuple):
    """The fields of `StepParams` that matter here."""

    mode: I64
    temperature: F32
    top_k: I64
    top_p: F32
    min_p: F32
    proposal_temperature: F32
    proposal_top_k: I64
    proposal_top_p: F32
    kl_threshold: F32
    has_eos_priority: NDArray[np.bool_]
    seed: I64
    position: I64


class Told(NamedTuple):
    """Where the fields of `Draws` and `Telemetry` are written."""

    token: I64
    log_prob: F32
    top_token: I64
    top_log_prob: F32
    is_bad: NDArray[np.bool_]
    kl_p_q: F32
    kl_pi_p: F32
    ess: F32
    aligner_mass: F32
    is_fallback: NDArray[np.bool_]


class Room(NamedTuple):
    """One thread's memory, or that of several, one after the other; floats in whole blocks.

    `e_x` is `exp x`, `s` are scores, `sums` of blocks.
    """

    x: F32
    y: F32
    e_x: F32
    e_y: F32
    s: F32
    e_s: F32
    sums: I64
    histogram: I64
    ids: NDArray[np.int32]


def inner(*fastmath: str) -> Callable[..., Any]:
    """For functions that only compiled code calls; LLVM inlines them. `fastmath` as in `numba.njit`."""

    def decorate(function: Callable[..., Any]) -> Any:
        # What nobody calls from Python needs no wrapper, which saves a third of the time to compile.
        return njit(
            nogil=True,
            error_model="numpy",
            fastmath=set(fastmath),
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
        )(function)

    return decorate


def entry(function: Callable[..., Any]) -> Any:
    """For functions that Python calls: without the GIL, and kept on disk if there is a place for it."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # Neither the package's nor the user's cache directory can be written.
        return njit(nogil=True, error_model="numpy")(function)


def made_of(*modules: ModuleType) -> int:
    """A number for the code of modules, of this one and of `threads`; for what compiled functions close over.

    numba's cache on disk looks at one file alone: what else its code is made of becomes part of its key.
    """
    files = [str(module.__file__) for module in (*modules, threads)] + [__file__]
    return crc32(b"".join(Path(file).read_bytes() for file in files))


def ask_for_memory(builder: Any, place: Any) -> None:
    """Generate code that has the memory at a pointer, if there is any, brought near; waits for nothing."""
    number = ir.IntType(32)
    pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch")
    # For reading, as near as can be, and data.
    builder.call(ask, [pointer, number(0), number(3), number(1)])


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def prefetch(typing_context: Any, array: Any, at: Any) -> Any:
    """In compiled code: have the memory of a contiguous array's number `at` brought near."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        first = context.make_array(signature.args[0])(context, builder, values[0]).data
        ask_for_memory(builder, builder.gep(first, [values[1]]))
        return context.get_dummy_value()

    return types.void(array, at), codegen
