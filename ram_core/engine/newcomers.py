"""Models for an engine, read and checked: all of them at start, and aligners that come while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import EngineConfig
from ram_core.engine.load_groups import architecture, stack_loras
from ram_core.engine.messages import LoadAligner
from ram_core.engine.plan import size_text
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvGeometry, KvPool
from ram_core.models.loading import context_limit, load_config, load_model, unsupported_reason
from ram_core.models.lora import LoraConfig, LoraLayer, is_adapter, load_lora, read_lora_config
from ram_core.models.lora_stack import LoraStack, linear_shapes
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel, plain_weights
from ram_core.models.vocabulary import check_same_vocabulary, load_tokenizer, shared_vocabulary_size

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
        self, terms: Terms, groups: Callable[[], list[AlignerGroup]], pools: Callable[[], list[KvPool]]
    ) -> None:
        self._terms = terms
        self._groups = groups
        self._pools = pools

    def load(self, order: LoadAligner, progress: Callable[[float], None]) -> list[Newcomer]:
        """All parts of an aligner; any thread may call it, but one at a time.

        Raises:
            CheckpointError: one of them cannot be served, or takes too much memory; nothing is left of any.
        """
        found: list[Newcomer] = []
        left = order.max_bytes
        try:
            for index, (name, source) in enumerate(order.parts):
                found.append(self._load_one(name, source, left, found))
                left -= found[-1].num_bytes
                progress((index + 1) / len(order.parts))
        except BaseException:
            for newcomer in found:
                newcomer.group.abandon(newcomer.slot)
            raise
        return found

    def _load_one(self, name: str, source: str, max_bytes: int, others: list[Newcomer]) -> Newcomer:
        adapter = read_lora_config(source) if is_adapter(source) else None
        base = source if adapter is None else adapter.base
        config = load_supported_config(name, base, self._terms.config)
        self._check_terms(name, config, source if adapter is None else adapter.tokenizer_source)
        if adapter is None:
            return self._load_model(name, source, config, max_bytes, others)
        return self._load_adapter(name, adapter, max_bytes, others)

    def _check_terms(self, name: str, config: PretrainedConfig, tokenizer_source: str) -> None:
        terms = self._terms
        limit = context_limit(config)
        if limit < terms.max_model_len:
            raise CheckpointError(
                f"`{name}` reads at most {limit} tokens, requests have {terms.max_model_len}"
            )
        own = load_tokenizer(tokenizer_source, trust_remote_code=terms.config.trust_remote_code)
        check_same_vocabulary(terms.tokenizer, own, aligner_name=name)
        rows = {name: config.get_text_config().vocab_size}
        shared_vocabulary_size(terms.tokenizer, terms.num_rows, rows)

    def _load_model(
        self, name: str, source: str, config: PretrainedConfig, max_bytes: int, others: list[Newcomer]
    ) -> Newcomer:
        kind = architecture(config)
        paged = self._load_alone(name, source)
        for group in self._groups():
            if group.kind == kind and isinstance(group.served, StackedModel):
                check_size(name, group.served.slot_bytes, max_bytes)
                slot = group.stage(plain_weights(paged.model))
                if slot is not None:
                    return Newcomer(name, group, slot, group.served.slot_bytes)
        check_size(name, paged.weight_bytes, max_bytes)
        group = AlignerGroup(_unique(name), paged, [name], kind=kind)
        return self._in_pool(Newcomer(name, group, 0, paged.weight_bytes), others)

    def _load_adapter(
        self, name: str, adapter: LoraConfig, max_bytes: int, others: list[Newcomer]
    ) -> Newcomer:
        for group in self._groups():
            if group.kind == adapter.base and isinstance(group.served, LoraStack):
                layers = load_lora(adapter, linear_shapes(group.model.model))
                try:
                    slot = group.stage(layers)
                except CheckpointError:
                    continue
                if slot is not None:
                    return Newcomer(name, group, slot, sum_bytes(layers, self._terms.dtype))
        base = self._load_alone(name, adapter.base)
        layers = load_lora(adapter, linear_shapes(base.model))
        check_size(name, base.weight_bytes + sum_bytes(layers, self._terms.dtype), max_bytes)
        stack = stack_loras(base, {name: layers}, max(1, self._terms.config.aligner_slots))
        group = AlignerGroup(_unique(name), stack, [name], kind=adapter.base)
        num_bytes = base.weight_bytes + sum_bytes(layers, self._terms.dtype)
        return self._in_pool(Newcomer(name, group, 0, num_bytes), others)

    def _load_alone(self, name: str, source: str) -> PagedModel:
        terms = self._terms
        model = load_model(
            source,
            device=terms.device,
            dtype=terms.dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=terms.config.trust_remote_code,
        )
        paged = PagedModel(model, name=name, attention=terms.attention)
        check_conformance(paged, terms.vocab_size)
        return paged

    def _in_pool(self, newcomer: Newcomer, others: list[Newcomer]) -> Newcomer:
        """With a pool if the bank has none of its geometry, nor anybody of `others`."""
        geometry: KvGeometry = newcomer.group.model.geometry
        pools = [*self._pools(), *(each.pool for each in others if each.pool is not None)]
        if any(pool.geometry == geometry for pool in pools[1:]):
            return newcomer
        pool = KvPool(geometry, pools[0].num_pages, pools[0].page_size, self._terms.device)
        return replace(newcomer, pool=pool)


def sum_bytes(layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> int:
    """What an adapter's weights take in `dtype`."""
    return sum(layer.a.numel() + layer.b.numel() for layer in layers.values()) * int(dtype.itemsize)


def check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    """Refuse what takes more memory than it may; raises CheckpointError."""
    if num_bytes > max_bytes:
        raise CheckpointError(f"`{name}` takes {size_text(num_bytes)}, but may take {size_text(max_bytes)}")


def _unique(name: str) -> str:
    """A group's name that no other group has or had."""
    return f"aligners-{name}-{next(_numbers)}"
