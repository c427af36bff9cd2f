"""Compile the bank's kernel for CUDA devices that are not there, and print what became of it as JSON.

A process of its own, for the reason that `tests.kernel_compiler` has.
"""

from __future__ import annotations

import json
import sys

import torch

from ram_core.models import triton_grouped_linear
from ram_core.models.grouped_linear import RowGroups
from tests.kernel_compiler import Launch, Recorder, compile_launch


def launches_of(sizes: tuple[int, int, int], dtype: torch.dtype, *, is_added: bool) -> list[Launch]:
    """What a product of so many rows, columns and numbers in a row launches, of a stack of two slots."""
    num_rows, num_columns, depth = sizes
    launches: list[Launch] = []
    kernel = triton_grouped_linear._kernel
    triton_grouped_linear._kernel = Recorder(kernel, launches)
    triton_grouped_linear.grouped_linear_triton(
        torch.zeros(num_rows, depth, dtype=dtype),
        torch.zeros(2, num_columns, depth, dtype=dtype),
        None if is_added else torch.zeros(2, num_columns, dtype=dtype),
        RowGroups.of(torch.zeros(num_rows, dtype=torch.int64), 2),
        add_to=torch.zeros(num_rows, num_columns, dtype=dtype) if is_added else None,
    )
    triton_grouped_linear._kernel = kernel
    return launches


def main() -> None:
    settings = [
        ((1, 2048, 2048), torch.bfloat16, 90, False),
        ((64, 32_768, 128), torch.bfloat16, 90, False),
        ((64, 2048, 16), torch.bfloat16, 80, True),
        ((512, 64, 96), torch.float32, 80, False),
    ]
    found = [
        compile_launch(launch, capability)
        for sizes, dtype, capability, is_added in settings
        for launch in launches_of(sizes, dtype, is_added=is_added)
    ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
