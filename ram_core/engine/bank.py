"""The models an engine serves: one proposal, its aligners, and the KV pools they write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import EngineConfig
from ram_core.engine.limits import EngineLimits
from ram_core.engine.load_groups import each_once, load_groups
from ram_core.engine.newcomers import Newcomer, Terms, load_supported_config
from ram_core.engine.plan import Needs, StartPlan, check_fits, describe, plan_kv, size_text
from ram_core.engine.room import expected_needs, free_bytes, naming_what_was_tried, needs_of
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.backends import resolve_attention
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvGeometry, KvPool
from ram_core.models.loading import (
    context_limit,
    load_model,
    resolve_device,
    resolve_dtype,
)
from ram_core.models.lora import LoraConfig, is_adapter, read_lora_config
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from ram_core.models.quantization import PLAIN
from ram_core.models.tensor_parallel import Ranks, SharedModel, check_shares, join
from ram_core.models.vocabulary import check_same_vocabulary, load_tokenizer, shared_vocabulary_size

Progress = Callable[[str], None]
"""Told what is being done, one line at a time."""

_PROPOSAL_POOL = "proposal"
PROPOSAL = "proposal"
"""The proposal's name among the models; no aligner has it."""


@dataclass(frozen=True)
class ModelBank:
    """The models of an engine and their KV memory. Aligners come and go, between steps; all else stays.

    `pools` holds the KV memory by name; `pool_of` maps each aligner's model to its pool, which those of equal
    geometry share. `group_of` maps it to the group that a forward serves; `group_by_name` has the groups.
    `residents` names the models of each aligner, `bytes_of` says what they take, and `failed` why some are
    missing that should have been there at start. `terms` are what newcomers must go with. `plan` says what
    memory went where, and why; `ranks` are the processes that share the proposal.
    """

    proposal: PagedModel
    group_by_name: dict[str, AlignerGroup]
    group_of: dict[str, AlignerGroup]
    pools: dict[str, KvPool]
    pool_of: dict[str, str]
    residents: dict[str, tuple[str, ...]]
    bytes_of: dict[str, int]
    failed: Mapping[str, str]
    terms: Terms
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    page_size: int
    eos_ids: frozenset[int]
    plan: StartPlan
    ranks: Ranks
    proposal_pool: str = field(default=_PROPOSAL_POOL)

    @property
    def aligners(self) -> dict[str, PagedModel]:
        """The model that serves each aligner, perhaps others too."""
        return {name: group.model for name, group in self.group_of.items()}

    @property
    def groups(self) -> tuple[AlignerGroup, ...]:
        """All groups, each once."""
        return tuple(self.group_by_name.values())

    def forward(
        self, name: str, batch: PackedBatch, pool: KvPool, slots: Int64[Tensor, " token"] | None
    ) -> Float[Tensor, "logit padded_vocab"]:
        """Run the proposal, or the group of that name; `slots` are those of a group that shares a module."""
        if name == PROPOSAL:
            return self.proposal.forward(batch, pool)
        return self.group_by_name[name].forward(batch, pool, slots)

    @property
    def limits(self) -> EngineLimits:
        """What requests are checked against."""
        return EngineLimits(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            page_size=self.page_size,
            num_pages=self.pools[self.proposal_pool].num_pages - 1,
            pools=dict(self.pool_of),
        )

    def add(self, aligner: str, newcomers: Iterable[Newcomer]) -> dict[str, KvPool]:
        """Let an aligner's models be asked for; returns the pools that came with them, by name.

        Raises:
            ValueError: a model has the name of another; nothing has changed.
        """
        models = tuple(newcomers)
        for each in models:
            if each.name in self.group_of or each.name == PROPOSAL:
                raise ValueError(f"there is a model `{each.name}` already")
        new_pools: dict[str, KvPool] = {}
        for each in models:
            if each.pool is not None:
                new_pools[f"aligners-{len(self.pools) - 1}"] = self.pools[
                    f"aligners-{len(self.pools) - 1}"
                ] = each.pool
            geometry = each.group.model.geometry
            self.pool_of[each.name] = next(
                name
                for name, pool in self.pools.items()
                if name != self.proposal_pool and pool.geometry == geometry
            )
            self.group_by_name[each.group.name] = each.group
            self.group_of[each.name] = each.group
            if each.name not in each.group.names:
                each.group.add(each.name, each.slot)
        self.residents[aligner] = tuple(each.name for each in models)
        self.bytes_of[aligner] = sum(each.num_bytes for each in models)
        return new_pools

    def remove(self, aligner: str) -> tuple[tuple[AlignerGroup, int], ...]:
        """Let nobody ask for an aligner any more; returns where its weights still are."""
        del self.bytes_of[aligner]
        places = []
        for name in self.residents.pop(aligner):
            del self.pool_of[name]
            group = self.group_of.pop(name)
            places.append((group, group.remove(name)))
        return tuple(places)

    def free(self, places: Iterable[tuple[AlignerGroup, int]]) -> list[AlignerGroup]:
        """Give back the memory of aligners that were removed; returns the groups that are gone with them."""
        gone = []
        for group, slot in places:
            group.free(slot)
            if group.is_empty:
                del self.group_by_name[group.name]
                gone.append(group)
        return gone


def load_bank(config: EngineConfig, progress: Progress) -> ModelBank:
    """Load and check everything that `config` names; the cheap checks first.

    Raises:
        CheckpointError: a model cannot be served.
        VocabularyMismatch: an aligner's tokenizer is not the proposal's.
    """
    sources = {PROPOSAL: config.proposal} | {a.name: a.source for a in config.aligners}
    adapters = {a.name: read_lora_config(a.source) for a in config.aligners if is_adapter(a.source)}
    sources |= {name: adapter.base for name, adapter in adapters.items()}
    if len(sources) != len(config.aligners) + 1:
        raise CheckpointError("two aligners have the same name, or one is called `proposal`")
    progress("reading configs and tokenizers")
    configs = {name: load_supported_config(name, source, config) for name, source in sources.items()}
    tokenizer = _load_tokenizers(config, adapters)
    rows = {name: loaded.get_text_config().vocab_size for name, loaded in configs.items()}
    num_rows = rows.pop(PROPOSAL)
    vocab_size = shared_vocabulary_size(tokenizer, num_rows, rows)
    max_model_len = _choose_max_model_len(config, configs)

    check_shares(config.tensor_parallel, configs[PROPOSAL])
    ranks = join(config.tensor_parallel, resolve_device(config.device))
    device = ranks.device
    dtype = resolve_dtype(config.dtype, device, configs[PROPOSAL])
    attention = resolve_attention(config.attention, device, config.page_size)
    free = ranks.least(free_bytes(device))
    if free is not None:
        check_fits(config, expected_needs(config, each_once(configs, adapters), dtype), max_model_len, free)

    def load(name: str) -> PagedModel:
        return _load_model(name, sources[name], config, ranks, dtype, attention, vocab_size, progress)

    proposal = load(PROPOSAL)
    groups = load_groups(config, configs, adapters, load, progress)
    group_of = {name: group for group in groups for name in group.names}
    geometries, pool_of = _share_pools(proposal, {name: group.model for name, group in group_of.items()})
    needs = _needs(proposal, groups, geometries.values())
    kv = plan_kv(config, needs, max_model_len, ranks.least(free_bytes(device)))
    words = f"reserving KV memory for {kv.num_tokens} tokens"
    progress(words)
    with naming_what_was_tried(f"{words} ({size_text(kv.num_bytes)})", device):
        pools = {
            name: KvPool(geometry, kv.num_pages + 1, config.page_size, device)
            for name, geometry in geometries.items()
        }
    residents: dict[str, tuple[str, ...]] = {}
    for aligner in config.aligners:
        residents[aligner.aligner] = (*residents.get(aligner.aligner, ()), aligner.name)
    return ModelBank(
        proposal=proposal,
        group_by_name={group.name: group for group in groups},
        group_of=group_of,
        pools=pools,
        pool_of=pool_of,
        residents=residents,
        bytes_of={
            aligner: sum(group_of[name].weight_bytes[name] for name in names)
            for aligner, names in residents.items()
        },
        failed={},
        terms=Terms(
            config=config,
            tokenizer=tokenizer,
            num_rows=num_rows,
            max_model_len=kv.max_model_len,
            device=device,
            dtype=dtype,
            attention=attention,
            vocab_size=vocab_size,
        ),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_model_len=kv.max_model_len,
        page_size=config.page_size,
        eos_ids=_eos_ids(proposal, tokenizer),
        plan=describe(config, needs, kv, device=str(device), dtype=str(dtype).removeprefix("torch.")),
        ranks=ranks,
    )


def _load_model(
    name: str,
    source: str,
    config: EngineConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    attention: str,
    vocab_size: int,
    progress: Progress,
) -> PagedModel:
    """A model, checked; only the proposal may be quantised, or shared between processes."""
    is_proposal = name == PROPOSAL
    progress(f"loading {name} ({source}) on {ranks.device} as {str(dtype).removeprefix('torch.')}")
    model = load_model(
        source,
        device=ranks.device,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization if is_proposal else PLAIN,
        num_ranks=ranks.size if is_proposal else 1,
    )
    if is_proposal and ranks.size > 1:
        paged: PagedModel = SharedModel(model, name=name, ranks=ranks, attention=attention)
    else:
        paged = PagedModel(model, name=name, attention=attention)
    check_conformance(paged, vocab_size)
    return paged


def _needs(proposal: PagedModel, groups: Iterable[AlignerGroup], geometries: Iterable[KvGeometry]) -> Needs:
    needs = needs_of({PROPOSAL: proposal}, geometries)
    own = {name: num_bytes for group in groups for name, num_bytes in group.weight_bytes.items()}
    return replace(needs, weight_bytes={**needs.weight_bytes, **own})


def _load_tokenizers(config: EngineConfig, adapters: Mapping[str, LoraConfig]) -> PreTrainedTokenizerBase:
    """The shared tokenizer, after every aligner's was compared with it; those of one place once."""
    tokenizer = load_tokenizer(config.proposal, trust_remote_code=config.trust_remote_code)
    places: dict[str, str] = {}
    for aligner in config.aligners:
        adapter = adapters.get(aligner.name)
        places.setdefault(adapter.tokenizer_source if adapter else aligner.source, aligner.name)
    for source, name in places.items():
        own = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        check_same_vocabulary(tokenizer, own, aligner_name=name)
    return tokenizer


def _choose_max_model_len(config: EngineConfig, configs: Mapping[str, PretrainedConfig]) -> int:
    limits = {name: context_limit(loaded) for name, loaded in configs.items()}
    shortest = min(limits, key=lambda name: limits[name])
    if config.max_model_len > limits[shortest]:
        raise CheckpointError(
            f"`max_model_len` is {config.max_model_len}, "
            f"but `{shortest}` reads at most {limits[shortest]} tokens"
        )
    return config.max_model_len or limits[shortest]


def _share_pools(
    proposal: PagedModel, aligners: Mapping[str, PagedModel]
) -> tuple[dict[str, KvGeometry], dict[str, str]]:
    """Pools by name, and each aligner's pool: one for all aligners of equal geometry."""
    geometries = {_PROPOSAL_POOL: proposal.geometry}
    names: dict[KvGeometry, str] = {}
    for model in aligners.values():
        name = names.setdefault(model.geometry, f"aligners-{len(names)}")
        geometries[name] = model.geometry
    return geometries, {name: names[model.geometry] for name, model in aligners.items()}


def _eos_ids(proposal: PagedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a text, by the checkpoint's generation config and by its tokenizer."""
    generation = getattr(proposal.model.generation_config, "eos_token_id", None)
    listed = generation if isinstance(generation, list) else [generation]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
