"""Which code computes attention: the reference anywhere, on a device what is quick there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from ram_core.models.attention import AttentionBackend, PagedAttention
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch

ATTENTION_KINDS = ("auto", "triton", "torch")
"""What can be asked for; "auto" is Triton's kernels on CUDA where Triton is installed, else PyTorch."""


def choose_backend(batch: PackedBatch, pool: KvPool, kind: str = "auto") -> AttentionBackend:
    """What serves the attention layers of one forward."""
    if kind == "auto":
        kind = "triton" if batch.slots.is_cuda and _has_triton() else "torch"
    if kind == "torch":
        return PagedAttention(batch, pool)
    # Only where it is used: Triton is no requirement, and takes its time to import.
    from ram_core.models.triton_attention import TritonAttention

    return TritonAttention(batch, pool)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
