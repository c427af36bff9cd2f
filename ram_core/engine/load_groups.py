"""Loading aligners into groups: which can share a module, and whether they then say what they say alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import EngineConfig
from ram_core.errors import CheckpointError
from ram_core.models.backends import least_page_size
from ram_core.models.kv import KvPool
from ram_core.models.lora import LoraConfig, LoraLayer, load_lora
from ram_core.models.lora_stack import LoraStack, linear_shapes
from ram_core.models.packing import Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel, plain_weights

logger = logging.getLogger(__name__)

Load = Callable[[str], PagedModel]
"""Loads an aligner's model, or its base, and checks it by itself."""

# What a config says that changes no logits.
_WORDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_PAGE_SIZE = 4
_PAGES = 2
# Of each slot's two rows; in the second batch the first has one token and the second has more.
_CHUNKS = (((0, 5), (0, 3)), ((5, 6), (3, 5)), ((6, 7), (5, 8)))


def load_groups(
    config: EngineConfig,
    configs: Mapping[str, PretrainedConfig],
    adapters: Mapping[str, LoraConfig],
    load: Load,
    progress: Callable[[str], None],
) -> list[AlignerGroup]:
    """Load aligners, those together that can share a module.

    Args:
        config: which aligners, and whether and for how many to make shared modules.
        configs: of each aligner's model, or its base.
        adapters: of those aligners that are LoRA adapters.
        load: gives the model of an aligner, or its base.
        progress: told what is done.

    Raises:
        CheckpointError: one cannot be served.
    """
    groups: list[AlignerGroup] = []
    full = [aligner.name for aligner in config.aligners if aligner.name not in adapters]
    families = _together(full, lambda name: architecture(configs[name]) if config.aligner_bank else name)
    for names in families:
        num_slots = max(len(names), config.aligner_slots)
        stack = load_stacked(names, load, num_slots) if config.aligner_bank and num_slots > 1 else None
        if stack is None:
            kind = architecture(configs[names[0]])
            groups += [AlignerGroup(f"aligners-{name}", load(name), [name], kind=kind) for name in names]
        else:
            progress(f"{', '.join(names)} share a module with {num_slots} slots")
            kind = architecture(configs[names[0]])
            groups.append(AlignerGroup(f"aligners-{names[0]}", stack, names, kind=kind))
    for names in _together(adapters, lambda name: adapters[name].base):
        num_slots = max(len(names), config.aligner_slots)
        progress(f"{', '.join(names)} are LoRA adapters of {adapters[names[0]].base}, with {num_slots} slots")
        stack_of_base = _load_loras({name: adapters[name] for name in names}, load, num_slots)
        kind = adapters[names[0]].base
        groups.append(AlignerGroup(f"aligners-{names[0]}", stack_of_base, names, kind=kind))
    return groups


def each_once(
    configs: Mapping[str, PretrainedConfig], adapters: Mapping[str, LoraConfig]
) -> dict[str, PretrainedConfig]:
    """The configs of all models that are loaded: of the adapters of one base only the first one's."""
    others = {name for names in _together(adapters, lambda name: adapters[name].base) for name in names[1:]}
    return {name: config for name, config in configs.items() if name not in others}


def _together(names: Iterable[str], kind: Callable[[str], str]) -> list[list[str]]:
    """Names of one kind in a list each, all in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(kind(name), []).append(name)
    return list(found.values())


def architecture(config: PretrainedConfig) -> str:
    """The same for two configs if their models differ in weights alone."""
    said = {name: value for name, value in config.to_dict().items() if name not in _WORDS}
    return json.dumps([type(config).__qualname__, said], sort_keys=True, default=str)


def load_stacked(names: Sequence[str], load: Load, num_slots: int) -> StackedModel | None:
    """Models in one module; None if they cannot share one, or say something else there than alone."""
    first = load(names[0])
    weights, alone = plain_weights(first.model), [probe_alone(first)]
    try:
        stack = StackedModel(first, num_slots)
    except CheckpointError as error:
        logger.warning("%s take a forward each: %s", ", ".join(names), error)
        return None
    stack.stage(0, weights)
    del weights
    stack.settle(0)
    for slot, name in enumerate(names[1:], start=1):
        model = load(name)
        alone.append(probe_alone(model))
        stack.stage(slot, plain_weights(model.model))
        stack.settle(slot)
    if reason := _difference(stack, torch.stack(alone)):
        logger.warning("%s take a forward each: %s", ", ".join(names), reason)
        return None
    return stack


def _load_loras(adapters: Mapping[str, LoraConfig], load: Load, num_slots: int) -> LoraStack:
    base = load(next(iter(adapters)))
    shapes = linear_shapes(base.model)
    return stack_loras(
        base, {name: load_lora(adapter, shapes) for name, adapter in adapters.items()}, num_slots
    )


def stack_loras(base: PagedModel, layers: Mapping[str, Mapping[str, LoraLayer]], num_slots: int) -> LoraStack:
    """Adapters of a base in one module with room for `num_slots`, by their names and its layers'.

    Raises:
        CheckpointError: one of them cannot be served.
    """
    modules = dict.fromkeys(module for own in layers.values() for module in own)
    max_rank = max(layer.rank for own in layers.values() for layer in own.values())
    stack = LoraStack(base, num_slots, modules, max_rank)
    for slot, (name, own) in enumerate(layers.items()):
        try:
            stack.stage(slot, own)
        except CheckpointError as error:
            raise CheckpointError(f"`{name}`: {error}") from None
        stack.settle(slot)
    return stack


def probe_alone(model: PagedModel) -> Float[Tensor, "logit vocab"]:
    """What a model says of a few tokens."""
    return _probe(model, [0])[0]


def _difference(stack: StackedModel, alone: Float[Tensor, "slot logit vocab"]) -> str | None:
    """How the slots' logits differ from what each model said alone; None if they do not."""
    try:
        together = _probe(stack, list(range(len(alone))))
    except Exception as error:  # Whatever a model's code makes of weights that differ from token to token.
        return f"their code does not run on stacked weights ({error})"
    scale = alone.std().clamp(min=1e-6)
    worst = ((together - alone).abs().amax() / scale).item()
    limit = 0.25
    if stack.paged.model.dtype == torch.float32:
        # On CPU the same products are made; a device's kernel adds up in another order than its library.
        limit = 1e-5 if stack.paged.device.type == "cpu" else 1e-3
    return None if worst <= limit else f"logits differ by {worst:.2g} standard deviations in one module"


@torch.inference_mode()
def _probe(served: PagedModel | StackedModel, slots: Sequence[int]) -> Float[Tensor, "slot logit vocab"]:
    """Chunks of tokens of two rows a slot, in packed batches."""
    paged = served.paged if isinstance(served, StackedModel) else served
    page_size = max(_PAGE_SIZE, least_page_size(paged.attention))
    pool = KvPool(paged.geometry, 2 * len(slots) * _PAGES + 1, page_size, paged.device)
    vocab_size = paged.model.config.get_text_config().vocab_size
    logits = []
    for chunks in _CHUNKS:
        rows, owners = [], []
        # As in a step: the first rows of all slots before the second ones.
        for nth, (start, end) in enumerate(chunks):
            ids = [7919 * (position + 31 * nth) % vocab_size for position in range(start, end)]
            for at, slot in enumerate(slots):
                page = 1 + (2 * at + nth) * _PAGES
                rows.append(Row(ids, start, range(page, page + _PAGES)))
                owners += [slot] * len(ids)
        batch = pack(rows, page_size=page_size, device=paged.device)
        if isinstance(served, StackedModel):
            out = served.forward(batch, pool, torch.tensor(owners).to(paged.device))
        else:
            out = served.forward(batch, pool)
        logits.append(out.float().view(2, len(slots), -1).transpose(0, 1))
    return torch.cat(logits, 1)
