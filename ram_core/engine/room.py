"""What models take of a device's memory, and what the device has: the numbers that `plan` reckons with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig

from ram_core.engine.config import EngineConfig
from ram_core.engine.plan import Needs, check_fits, size_text
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvGeometry
from ram_core.models.loading import build_skeleton
from ram_core.models.paged import PagedModel


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody has; None on CPU, where the system decides.

    What torch keeps for later, but does not use, counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_text(device: torch.device) -> str:
    """The same for people."""
    free = free_bytes(device)
    return "unknown on CPU" if free is None else size_text(free)


def refuse_too_big(
    config: EngineConfig,
    configs: Mapping[str, PretrainedConfig],
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
) -> None:
    """Reckon on models without memory whether the device can hold them, before a weight is read.

    Raises:
        CheckpointError: it cannot; says what would fit.
    """
    free = free_bytes(device)
    if free is None:
        return
    models = {
        name: PagedModel(
            build_skeleton(
                each, attn_implementation=ATTENTION_NAME, trust_remote_code=config.trust_remote_code
            ).to(dtype),
            name=name,
        )
        for name, each in configs.items()
    }
    geometries = {model.geometry for name, model in models.items() if name != "proposal"}
    needs = needs_of(models, [models["proposal"].geometry, *geometries])
    check_fits(config, needs, max_model_len, free)


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
