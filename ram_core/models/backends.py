"""Which code computes attention: the reference anywhere, on a device what is quick there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ram_core.errors import CheckpointError
from ram_core.models.attention import AttentionBackend, AttentionOptions, PagedAttention
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch

ATTENTION_KINDS = ("auto", "triton", "torch", "flash_attn", "flashinfer")
"""What can be asked for; "auto" is Triton's kernels on CUDA where Triton is installed, else PyTorch."""

_FLASH_PAGE_SIZE = 256


def resolve_attention(name: str, device: torch.device, page_size: int) -> str:
    """The kind of attention that `name` means on a device.

    Raises:
        CheckpointError: there is no such kind, or it needs another device, a package, or other pages.
    """
    if name not in ATTENTION_KINDS:
        raise CheckpointError(f"`attention` must be {', '.join(ATTENTION_KINDS)}, got {name!r}")
    if name == "auto":
        return "triton" if device.type == "cuda" and _is_installed("triton") else "torch"
    if name == "torch":
        return name
    if device.type != "cuda":
        raise CheckpointError(f"`attention` is {name!r}, which needs CUDA, but `device` is `{device}`")
    if not _is_installed(name):
        raise CheckpointError(f"`attention` is {name!r}, but that package is not installed")
    if page_size % least_page_size(name):
        raise CheckpointError(
            f"`attention` {name!r} needs a `page_size` that is a multiple of {least_page_size(name)}, "
            f"got {page_size}"
        )
    return name


def least_page_size(kind: str) -> int:
    """The number of tokens of which pages have to be a multiple."""
    return _FLASH_PAGE_SIZE if kind == "flash_attn" else 1


def can_be_recorded(kind: str) -> bool:
    """Whether a forward with this attention never waits for the device."""
    return kind != "flashinfer"


def check_package_can(name: str, query: Tensor, options: AttentionOptions) -> None:
    """Refuse what none of the packages that are extras computes.

    Raises:
        CheckpointError: attention sinks, or other than 16 bits.
    """
    if options.sinks is not None:
        raise CheckpointError(f"`attention` {name!r} knows no attention sinks; use 'triton'")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise CheckpointError(f"`attention` {name!r} computes in 16 bits, not in {query.dtype}")


def choose_backend(batch: PackedBatch, pool: KvPool, kind: str = "auto") -> AttentionBackend:
    """What serves the attention layers of one forward."""
    if kind == "auto":
        kind = resolve_attention(kind, batch.slots.device, pool.page_size)
    # Only what is used is imported: the packages are no requirement, and take their time.
    if kind == "triton":
        from ram_core.models.triton_attention import TritonAttention

        return TritonAttention(batch, pool)
    if kind == "flash_attn":
        from ram_core.models.flash_attention import FlashAttention

        return FlashAttention(batch, pool)
    if kind == "flashinfer":
        from ram_core.models.flashinfer_attention import FlashInferAttention

        return FlashInferAttention(batch, pool)
    return PagedAttention(batch, pool)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None
