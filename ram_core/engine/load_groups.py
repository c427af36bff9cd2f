"""Loading aligners into groups: which can share a module, and whether they then say what they say alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import EngineConfig
from ram_core.engine.roll import Roll
from ram_core.errors import CheckpointError
from ram_core.models.backends import least_page_size
from ram_core.models.kv import KvPool
from ram_core.models.loading import architecture
from ram_core.models.lora import LoraConfig, LoraLayer, load_lora
from ram_core.models.lora_stack import LoraStack, linear_shapes
from ram_core.models.packing import Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel, plain_weights

logger = logging.getLogger(__name__)

Load = Callable[[str], PagedModel]
"""Loads an aligner's model, or its base, and checks it by itself."""

_PAGE_SIZE = 4
_PAGES = 2
# Of each slot's two rows; in the second batch the first has one token and the second has more.
_CHUNKS = (((0, 5), (0, 3)), ((5, 6), (3, 5)), ((6, 7), (5, 8)))


def load_groups(
    config: EngineConfig,
    roll: Roll,
    configs: Mapping[str, PretrainedConfig],
    adapters: Mapping[str, LoraConfig],
    load: Load,
    progress: Callable[[str], None],
) -> list[AlignerGroup]:
    """Load aligners, those together that can share a module.

    Args:
        config: whether and for how many to make shared modules.
        roll: which aligners; some may drop out.
        configs: of each aligner's model, or its base.
        adapters: of those aligners that are LoRA adapters.
        load: gives the model of an aligner, or its base.
        progress: told what is done.

    Raises:
        CheckpointError: one that is required cannot be served.
    """
    groups: list[AlignerGroup] = []
    names = [source.name for source in roll.sources]
    full = [name for name in names if name not in adapters]
    for family in _together(full, lambda name: architecture(configs[name]) if config.aligner_bank else name):
        num_slots = max(len(family), config.aligner_slots)
        kind = architecture(configs[family[0]])
        stack: StackedModel | None = None
        loaded: list[str] = []
        if config.aligner_bank and num_slots > 1:
            stack, loaded = load_stacked(family, _loaded(family, load, roll), num_slots)
        if stack is None:
            for name, model in _loaded(family, load, roll):
                groups.append(AlignerGroup(f"aligners-{name}", model, [name], kind=kind))
        else:
            progress(f"{', '.join(loaded)} share a module with {num_slots} slots")
            groups.append(AlignerGroup(f"aligners-{loaded[0]}", stack, loaded, kind=kind))
    for family in _together([name for name in names if name in adapters], lambda name: adapters[name].base):
        num_slots = max(len(family), config.aligner_slots)
        base = adapters[family[0]].base
        progress(f"{', '.join(family)} are LoRA adapters of {base}, with {num_slots} slots")
        group = _load_loras({name: adapters[name] for name in family}, load, num_slots, roll)
        groups += [] if group is None else [group]
    return _without_dropped(groups, roll)


def _loaded(names: Iterable[str], load: Load, roll: Roll) -> Iterator[tuple[str, PagedModel]]:
    """Models, one after the other, of those who do not drop out."""
    for name in names:
        model = None
        with roll.trying(name):
            model = load(name) if roll.has(name) else None
        if model is not None:
            yield name, model


def _without_dropped(groups: list[AlignerGroup], roll: Roll) -> list[AlignerGroup]:
    """The groups, after what was loaded of aligners that dropped out by another of their models has gone."""
    for group in groups:
        for name in group.names:
            if not roll.has(name):
                group.free(group.remove(name))
    return [group for group in groups if group.names]


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


def load_stacked(
    wanted: Sequence[str], models: Iterator[tuple[str, PagedModel]], num_slots: int
) -> tuple[StackedModel | None, list[str]]:
    """Models in one module, and their names in the order of their slots; some that are wanted may not come.

    None if they cannot share one, or say something else there than alone.
    """
    name, first = next(models, (None, None))
    if name is None or first is None:
        return None, []
    names = [name]
    weights, alone = plain_weights(first.model), [probe_alone(first)]
    try:
        stack = StackedModel(first, num_slots)
    except CheckpointError as error:
        logger.warning("%s take a forward each: %s", ", ".join(wanted), str(error))
        return None, []
    stack.stage(0, weights)
    del weights
    stack.settle(0)
    for slot, (name, model) in enumerate(models, start=1):
        names.append(name)
        alone.append(probe_alone(model))
        stack.stage(slot, plain_weights(model.model))
        stack.settle(slot)
    if reason := _difference(stack, torch.stack(alone)):
        logger.warning("%s take a forward each: %s", ", ".join(names), reason)
        return None, []
    return stack, names


def _load_loras(
    adapters: Mapping[str, LoraConfig], load: Load, num_slots: int, roll: Roll
) -> AlignerGroup | None:
    """Adapters of one base; None if none of them is left."""
    base = None
    for name in adapters:
        # If the base cannot be loaded, all drop out, or the error goes on.
        with roll.trying(name):
            base = base or load(name)
    if base is None:
        return None
    shapes = linear_shapes(base.model)
    layers: dict[str, dict[str, LoraLayer]] = {}
    for name, adapter in adapters.items():
        with roll.trying(name):
            layers[name] = load_lora(adapter, shapes)
    if not layers:
        return None
    stack = stack_loras(base, layers, num_slots)
    kind = next(iter(adapters.values())).base
    return AlignerGroup(f"aligners-{next(iter(layers))}", stack, layers, kind=kind)


def stack_loras(
    base: PagedModel, layers: Mapping[str, Mapping[str, LoraLayer]], num_slots: int, *, least_rank: int = 0
) -> LoraStack:
    """Adapters of a base in one module with room for `num_slots`, by their names and its layers'.

    It has room for others of the highest of their ranks, and at least for those of `least_rank`.

    Raises:
        CheckpointError: one of them cannot be served.
    """
    modules = dict.fromkeys(module for own in layers.values() for module in own)
    max_rank = max(least_rank, *(layer.rank for own in layers.values() for layer in own.values()))
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
