"""What models take of a device's memory, and what the device has: the numbers that `plan` reckons with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ram_core.engine.config import EngineConfig
from ram_core.engine.plan import Needs, size_text
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvGeometry
from ram_core.models.loading import build_skeleton
from ram_core.models.paged import PagedModel
from ram_core.models.quantization import QUANTIZATIONS, is_quantized, quantized_bytes
from ram_core.models.source import resolve_source
from ram_core.models.weight_files import checkpoint_bytes

_MEMORY_INFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody has; None on CPU, where the system decides.

    What torch keeps for later, but does not use, counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def memory_for_aligners(config: EngineConfig, device: torch.device, held_bytes: int) -> int:
    """What all aligners may hold together, given what they hold, their free slots included."""
    if config.aligner_memory_bytes:
        return config.aligner_memory_bytes
    free = free_bytes(device)
    return held_bytes + (_free_host_bytes() if free is None else free) // 2


def _free_host_bytes() -> int:
    """Memory of this machine that programs can have without paging, as far as the kernel tells."""
    try:
        lines = _MEMORY_INFO.read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something failed for want of memory; on CPU torch has no error of its own for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free_text(device: torch.device) -> str:
    """The same for people."""
    free = free_bytes(device)
    return "unknown on CPU" if free is None else size_text(free)


def expected_needs(
    config: EngineConfig, configs: Mapping[str, PretrainedConfig], dtype: torch.dtype
) -> Needs:
    """What the models that `config` names take of this process' device; reads no weights."""
    models = {name: without_weights(name, each, dtype, config) for name, each in configs.items()}
    proposal = models.pop("proposal")
    ways = {name: quantized_bytes(proposal.model, name) for name in QUANTIZATIONS}
    main_bytes = ways[config.quantization]
    if is_quantized(configs["proposal"]):
        main_bytes = checkpoint_bytes(resolve_source(config.proposal, with_weights=True))
        ways = {}
    shares = config.tensor_parallel
    others = {name: model.weight_bytes for name, model in models.items()}
    geometries = {model.geometry for model in models.values()}
    return Needs(
        {"proposal": main_bytes // shares} | others,
        proposal.geometry.bytes_per_token // shares + sum(each.bytes_per_token for each in geometries),
        {
            name: num_bytes // shares + sum(others.values())
            for name, num_bytes in ways.items()
            if num_bytes < main_bytes
        },
    )


def expected_bytes(model_config: PretrainedConfig, dtype: torch.dtype, config: EngineConfig) -> int:
    """What an aligner's model takes, by its config; reads no weights."""
    return without_weights("aligner", model_config, dtype, config).weight_bytes


def needs_of(models: Mapping[str, PagedModel], geometries: Iterable[KvGeometry]) -> Needs:
    """The bytes of models, loaded or not, and of a token in each of the pools."""
    return Needs(
        {name: model.weight_bytes for name, model in models.items()},
        sum(geometry.bytes_per_token for geometry in geometries),
    )


@contextmanager
def naming_what_was_tried(words: str, device: torch.device) -> Iterator[None]:
    """Turn a device's want of memory inside the block into one line.

    Raises:
        CheckpointError: there was no memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise CheckpointError(f"{words} failed: {free_text(device)} free on `{device}`") from None


def without_weights(
    name: str, model_config: PretrainedConfig, dtype: torch.dtype, config: EngineConfig
) -> PagedModel:
    """A model as its config describes it, on the meta device."""
    skeleton = build_skeleton(
        model_config, attn_implementation=ATTENTION_NAME, trust_remote_code=config.trust_remote_code
    )
    return PagedModel(skeleton.to(dtype), name=name)
