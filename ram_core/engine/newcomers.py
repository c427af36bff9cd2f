"""Models for an engine, read and checked: all of them at start, and aligners that come while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import EngineConfig
from ram_core.engine.device import beside_steps
from ram_core.engine.load_groups import load_stacked, stack_loras
from ram_core.engine.load_share import Listener, Share
from ram_core.engine.messages import LoadAligner
from ram_core.engine.pace import Pace
from ram_core.engine.plan import size_text
from ram_core.engine.room import expected_bytes, is_out_of_memory, without_weights
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance, chunked_logits, far_off, plain_logits
from ram_core.models.kv import KvPool
from ram_core.models.loading import (
    architecture,
    context_limit,
    load_config,
    load_model,
    unsupported_reason,
)
from ram_core.models.lora import MAX_RANK, LoraConfig, LoraLayer, is_adapter, load_lora, read_lora_config
from ram_core.models.lora_stack import LoraStack, linear_shapes
from ram_core.models.outline import Outline, buffers_of, make_shell, outline_of
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from ram_core.models.source import resolve_source
from ram_core.models.stacked import (
    StackedModel,
    fits_as_stored,
    plain_weights,
    unstackable_reason,
)
from ram_core.models.stored import StoredWeights, Weight
from ram_core.models.vocabulary import (
    check_same_vocabulary,
    is_same_tokenizer,
    load_tokenizer,
    shared_vocabulary_size,
)

_CPU_LORA_SLOTS = 16

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Terms:
    """What every aligner of an engine has to go with; `num_rows` are the proposal's logits of a token."""

    config: EngineConfig
    tokenizer: PreTrainedTokenizerBase
    num_rows: int
    max_model_len: int
    device: torch.device
    dtype: torch.dtype
    attention: str
    vocab_size: int

    def loading(self, name: str, source: str) -> str:
        """What is being done, in words."""
        return f"loading {name} ({source}) on {self.device} as {str(self.dtype).removeprefix('torch.')}"

    def load(self, name: str, source: str) -> PagedModel:
        """An aligner's model, or its base, checked by itself.

        Raises:
            CheckpointError: it cannot be served.
        """
        paged = PagedModel(self.load_model(source), name=name, attention=self.attention)
        check_conformance(paged, self.vocab_size)
        return paged

    def load_model(self, source: str) -> PreTrainedModel:
        """The same as transformers loads it; raises as `load`."""
        return load_model(
            source,
            device=self.device,
            dtype=self.dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=self.config.trust_remote_code,
        )

    def make_shell(self, config: PretrainedConfig, outline: Outline) -> PreTrainedModel | None:
        """A model of an architecture that was loaded before, without reading its files; None if none was."""
        if outline.buffers is None:
            return None
        return make_shell(
            config,
            outline.buffers,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.config.trust_remote_code,
        )

    def check(self, name: str, config: PretrainedConfig, tokenizer_source: str) -> None:
        """Refuse a model that cannot follow the proposal, or not as far as requests go.

        Raises:
            CheckpointError: it reads less tokens, or others.
        """
        limit = context_limit(config)
        if limit < self.max_model_len:
            raise CheckpointError(
                f"`{name}` reads at most {limit} tokens, but requests may have {self.max_model_len}"
            )
        trusts = self.config.trust_remote_code
        if not is_same_tokenizer(self.config.proposal, tokenizer_source):
            own = load_tokenizer(tokenizer_source, trust_remote_code=trusts)
            check_same_vocabulary(self.tokenizer, own, aligner_name=name)
        shared_vocabulary_size(self.tokenizer, self.num_rows, {name: config.get_text_config().vocab_size})


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A model that is in memory and has no name in the bank yet; `pool` if there was none of its geometry."""

    name: str
    group: AlignerGroup
    slot: int
    num_bytes: int
    pool: KvPool | None = None


def load_supported_config(name: str, source: str, config: EngineConfig) -> PretrainedConfig:
    """The config of a model that can be served.

    Raises:
        CheckpointError: it is missing or broken, or its architecture cannot be served.
    """
    loaded = load_config(source, trust_remote_code=config.trust_remote_code)
    reason = unsupported_reason(loaded)
    if reason is not None:
        raise CheckpointError(f"`{name}` ({source}) cannot be served: {reason}")
    return loaded


class Newcomers:
    """Brings aligners' models into memory, for the groups and pools of a bank that others use meanwhile."""

    def __init__(
        self,
        terms: Terms,
        groups: Callable[[], list[AlignerGroup]],
        pools: Callable[[], list[KvPool]],
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_busy` says whether there are steps for which a load has to leave the cores."""
        self._is_busy = is_busy
        self._terms = terms
        self._groups = groups
        self._pools = pools
        # Of architectures that say the same in a shared module, over pages, as by themselves.
        self._conforming: dict[str, Outline] = {}
        self._spare: AlignerGroup | None = None

    def keep(self, group: AlignerGroup) -> None:
        """Keep a group that is gone, for the next of its kind; any thread may call it."""
        if isinstance(group.served, StackedModel) and group.served.is_worth_keeping:
            self._spare = group

    def load(self, order: LoadAligner, listener: Listener) -> list[Newcomer]:
        """All parts of an aligner; any thread may call it, but one at a time.

        Raises:
            CheckpointError: one of them cannot be served, or takes too much memory; nothing is left of any.
        """
        found: list[Newcomer] = []
        left = order.max_bytes
        pace = Pace(self._is_busy)
        try:
            with beside_steps(self._terms.device):
                for index, (name, source) in enumerate(order.parts):
                    share = Share(listener, pace, index, len(order.parts))
                    found.append(self._load_one(name, source, left, found, share))
                    left -= found[-1].num_bytes
        except BaseException as error:
            turn_away(found)
            if is_out_of_memory(error):
                raise CheckpointError(f"`{self._terms.device}` has not enough memory free") from None
            raise
        return found

    def _load_one(
        self, name: str, source: str, max_bytes: int, others: list[Newcomer], share: Share
    ) -> Newcomer:
        adapter = read_lora_config(source) if is_adapter(source) else None
        base = source if adapter is None else adapter.base
        config = load_supported_config(name, base, self._terms.config)
        self._terms.check(name, config, source if adapter is None else adapter.tokenizer_source)
        share.pace.rest()
        if adapter is not None:
            newcomer = self._adapter_in_slot(name, adapter, max_bytes)
            return newcomer or self._own_lora_group(name, adapter, max_bytes, others)
        newcomer = self._model_in_slot(name, source, config, max_bytes, share)
        return newcomer or self._own_group(name, source, config, max_bytes, others, share)

    def _take_spare(self) -> Iterator[AlignerGroup]:
        """The group that was kept, if any; it is let go unless it is used now."""
        spare, self._spare = self._spare, None
        if spare is not None:
            yield spare

    def _model_in_slot(
        self, name: str, source: str, config: PretrainedConfig, max_bytes: int, share: Share
    ) -> Newcomer | None:
        """A model beside others of its architecture, if there is a free slot: read straight into it."""
        kind = architecture(config)
        directory = resolve_source(source, with_weights=True)
        for group in itertools.chain(self._groups(), self._take_spare()):
            served = group.served
            if not isinstance(served, StackedModel) or group.kind != kind or not group.free_slots:
                continue
            check_size(name, served.slot_bytes, max_bytes)
            with StoredWeights(directory, share.read) as stored:
                share.total = stored.num_bytes
                weights: Mapping[str, Weight] | None = served.weights_in(stored)
                if weights is None:
                    weights = plain_weights(self._terms.load(name, source).model)
                slot = group.stage(weights, partial(self._expect, name, group, share))
            if slot is not None:
                group.wait_settled(slot)
                return Newcomer(name, group, slot, served.slot_bytes)
        return None

    def _expect(self, name: str, group: AlignerGroup, share: Share, slot: int) -> None:
        """Have those who wait for an aligner be told when its weights are nearly there."""
        # Of several models, one that fails takes those along that have come before.
        if share.num_parts == 1 and self._terms.device.type == "cpu":
            assert isinstance(group.served, StackedModel)
            newcomer = Newcomer(name, group, slot, group.served.slot_bytes)
            share.on_soon = partial(share.listener.expect, newcomer)

    def _own_group(
        self,
        name: str,
        source: str,
        config: PretrainedConfig,
        max_bytes: int,
        others: list[Newcomer],
        share: Share,
    ) -> Newcomer:
        """A model that shares no module, but with those that come later if slots were asked for."""
        own, kind = self._terms.config, architecture(config)
        outline = self._conforming.get(kind)
        outline = outline or outline_of(without_weights(name, config, self._terms.dtype, own))
        check_size(name, outline.num_bytes, max_bytes)
        num_slots = own.aligner_slots if own.aligner_bank else 1
        served: PagedModel | StackedModel | None = None
        if num_slots > 1:
            served = self._read_stacked(name, source, config, outline, num_slots, share)
            if served is None:
                served, _ = load_stacked([name], iter([(name, self._terms.load(name, source))]), num_slots)
        served = served or self._terms.load(name, source)
        num_bytes = served.slot_bytes if isinstance(served, StackedModel) else served.weight_bytes
        group = AlignerGroup(_unique(name), served, [name], kind=kind)
        return self._in_pool(Newcomer(name, group, 0, num_bytes), others)

    def _read_stacked(
        self,
        name: str,
        source: str,
        config: PretrainedConfig,
        outline: Outline,
        num_slots: int,
        share: Share,
    ) -> StackedModel | None:
        """A shared module whose first weights are read straight from the files, and no model built of them.

        The first of an architecture is compared with its own plain forward. None if it differs, or cannot be
        had in this way; others may tell why.
        """
        terms, kind = self._terms, architecture(config)
        is_known = kind in self._conforming
        model = terms.make_shell(config, outline) or terms.load_model(source)
        share.pace.rest()
        with StoredWeights(resolve_source(source, with_weights=True), share.read) as stored:
            if not outline.axes or unstackable_reason(model) or not fits_as_stored(model, stored):
                return None
            share.total = stored.num_bytes
            alone = PagedModel(model, name=name, attention=terms.attention, geometry=outline.geometry)
            plain = None if is_known else plain_logits(alone, terms.vocab_size)
            buffers = buffers_of(model, terms.dtype)
            stack = StackedModel(alone, num_slots, outline.axes)
            weights = stack.weights_in(stored)
            assert weights is not None, "a stack has the shapes of its model"
            stack.stage(0, weights)
        stack.settle(0)
        if plain is not None:
            if not self._says(plain, stack):
                return None
            self._conforming[kind] = replace(outline, buffers=buffers)
        return stack

    def _says(self, plain: Tensor, stack: StackedModel) -> bool:
        """Whether the model in a stack's first slot gives these logits over pages, but for rounding."""

        def forward(batch: PackedBatch, pool: KvPool) -> Tensor:
            return stack.forward(batch, pool, torch.zeros_like(batch.input_ids))

        try:
            ours = chunked_logits(stack.paged, self._terms.vocab_size, forward)
        except Exception:  # Whatever a model's code makes of weights that differ from token to token.
            return False
        return far_off(ours, plain, stack.paged.model) is None

    def _adapter_in_slot(self, name: str, adapter: LoraConfig, max_bytes: int) -> Newcomer | None:
        """An adapter beside others of its base, if they left room for all that it changes."""
        for group in self._groups():
            if not isinstance(group.served, LoraStack) or group.kind != adapter.base:
                continue
            layers = load_lora(adapter, group.served.base_shapes)
            num_bytes = lora_bytes(layers, self._terms.dtype)
            check_size(name, num_bytes, max_bytes)
            slot = group.stage(layers) if group.served.has_room_for(layers) else None
            if slot is not None:
                group.wait_settled(slot)
                return Newcomer(name, group, slot, num_bytes)
        return None

    def _own_lora_group(
        self, name: str, adapter: LoraConfig, max_bytes: int, others: list[Newcomer]
    ) -> Newcomer:
        """An adapter that takes a forward of its own; what is in memory of its base is not loaded again."""
        own, on_cpu = self._terms.config, self._terms.device.type == "cpu"
        base, base_bytes = self._shared_base(adapter, others), 0
        if base is None:
            config = load_supported_config(name, adapter.base, own)
            base_bytes = expected_bytes(config, self._terms.dtype, own)
            check_size(name, base_bytes, max_bytes)
            base = self._terms.load(name, adapter.base)
        layers = load_lora(adapter, linear_shapes(base.model))
        num_bytes = base_bytes + lora_bytes(layers, self._terms.dtype)
        check_size(name, num_bytes, max_bytes)
        # Room for others of its kind, which costs nothing on CPU before it is taken.
        num_slots = max(_CPU_LORA_SLOTS if on_cpu else 1, own.aligner_slots)
        stack = stack_loras(base, {name: layers}, num_slots, least_rank=MAX_RANK if on_cpu else 0)
        group = AlignerGroup(_unique(name), stack, [name], kind=adapter.base)
        return self._in_pool(Newcomer(name, group, 0, num_bytes), others)

    def _shared_base(self, adapter: LoraConfig, others: list[Newcomer]) -> PagedModel | None:
        """The base of an adapter, if adapters that are there have it."""
        for group in (*self._groups(), *(each.group for each in others)):
            if isinstance(group.served, LoraStack) and group.kind == adapter.base:
                return group.served.base_again()
        return None

    def _in_pool(self, newcomer: Newcomer, others: list[Newcomer]) -> Newcomer:
        """With a pool if the bank has none of its geometry, nor anybody of `others`."""
        geometry = newcomer.group.model.geometry
        proposal, *known = self._pools()
        known += [each.pool for each in others if each.pool is not None]
        if any(pool.geometry == geometry for pool in known):
            return newcomer
        pool = KvPool(geometry, proposal.num_pages, proposal.page_size, self._terms.device)
        return replace(newcomer, pool=pool)


def turn_away(newcomers: Iterable[Newcomer]) -> None:
    """Let go of models that will get no name."""
    for newcomer in newcomers:
        newcomer.group.abandon(newcomer.slot)


def lora_bytes(layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> int:
    """What an adapter's weights take in `dtype`."""
    return sum(layer.a.numel() + layer.b.numel() for layer in layers.values()) * int(dtype.itemsize)


def check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    """Refuse what takes more memory than it may; raises CheckpointError."""
    if num_bytes > max_bytes:
        raise CheckpointError(f"`{name}` takes {size_text(num_bytes)}, but may take {size_text(max_bytes)}")


def _unique(name: str) -> str:
    """A group's name that no other group has or had."""
    return f"aligners-{name}-{next(_numbers)}"
