"""Compile attention's kernels for CUDA devices that are not there, and print what became of them as JSON.

Run as a process of its own: where tests run without CUDA, Triton interprets, and it decides so for good when
it is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ram_core.models import triton_attention
from ram_core.models.attention import AttentionOptions
from ram_core.models.kv import KvGeometry, KvPool, LayerShape
from ram_core.models.packing import Row, pack
from ram_core.models.triton_attention import TritonAttention

CPU = torch.device("cpu")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands where a kernel does and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches_of(
    lens: tuple[int, ...],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    num_splits: int,
    **options: Any,
) -> list[Launch]:
    """What one layer of a batch launches; `heads` are numbers of query and key heads, and their sizes."""
    num_heads, num_kv_heads, key_dim, value_dim = heads
    pool = KvPool(KvGeometry((LayerShape(num_kv_heads, key_dim, value_dim),), dtype), 4, 16, CPU)
    batch = pack([Row([0] * length, 0, [1] * 99) for length in lens], page_size=16, device=CPU)
    sizes = [(num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim)]
    inputs = [torch.zeros(sum(lens), *size, dtype=dtype).transpose(0, 1) for size in sizes]
    launches: list[Launch] = []
    kernels = {name: getattr(triton_attention, name) for name in ("write_kv", "attend_tile", "join_splits")}
    for name, kernel in kernels.items():
        setattr(triton_attention, name, Recorder(kernel, launches))
    TritonAttention(batch, pool, num_splits).attend(0, *inputs, AttentionOptions(**options))
    for name, kernel in kernels.items():
        setattr(triton_attention, name, kernel)
    return launches


def compile_launch(launch: Launch, capability: int) -> dict[str, Any]:
    """As Triton does it at a launch: by types, by what is divisible by 16, and by constants."""
    kernel, args, kwargs = launch
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    # Without CUDA it would be for the interpreter.
    given["is_widened"] = False
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value, is_special = given[name], name not in kernel.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name], is_aligned = POINTERS[value.dtype], is_special
        elif value is None or kernel.params[index].is_constexpr:
            signature[name], constants[name], is_aligned = "constexpr", value, False
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            is_aligned = is_special and isinstance(value, int) and value % 16 == 0
        if is_aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared_bytes": compiled.metadata.shared,
        "has_matrix_units": "mma" in code,
        "has_async_copies": "cp.async" in code,
    }


def main() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    settings: list[Any] = [
        (launches_of((1, 1), (32, 8, 128, 128), bf16, 4), 90),
        (launches_of((3, 70), (8, 4, 256, 256), bf16, 1, window=40, softcap=50.0), 80),
        (launches_of((5, 5), (8, 2, 64, 80), fp32, 1, window=40, sinks=torch.zeros(8)), 80),
    ]
    found = [compile_launch(launch, capability) for launches, capability in settings for launch in launches]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
