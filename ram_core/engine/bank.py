"""The models an engine serves: one proposal, its aligners, and the KV pools they write to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ram_core.engine.config import EngineConfig
from ram_core.engine.limits import EngineLimits
from ram_core.engine.plan import StartPlan, check_fits, describe, plan_kv, size_text
from ram_core.engine.room import expected_needs, free_bytes, naming_what_was_tried, needs_of
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvGeometry, KvPool
from ram_core.models.loading import (
    context_limit,
    load_config,
    load_model,
    resolve_device,
    resolve_dtype,
    unsupported_reason,
)
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
    """Everything that is loaded once and then only read, but for the pools' contents.

    `pools` holds the KV memory by name; `pool_of` maps each aligner to its pool, which aligners of equal
    geometry share. `plan` says what memory went where, and why; `ranks` are the processes that share the
    proposal.
    """

    proposal: PagedModel
    aligners: Mapping[str, PagedModel]
    pools: Mapping[str, KvPool]
    pool_of: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    page_size: int
    eos_ids: frozenset[int]
    plan: StartPlan
    ranks: Ranks
    proposal_pool: str = field(default=_PROPOSAL_POOL)

    def model(self, name: str) -> PagedModel:
        """A model by the name that lanes have for it."""
        return self.proposal if name == PROPOSAL else self.aligners[name]

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


def load_bank(config: EngineConfig, progress: Progress) -> ModelBank:
    """Load and check everything that `config` names; the cheap checks first.

    Raises:
        CheckpointError: a model cannot be served.
        VocabularyMismatch: an aligner's tokenizer is not the proposal's.
    """
    sources = {PROPOSAL: config.proposal} | {a.name: a.source for a in config.aligners}
    if len(sources) != len(config.aligners) + 1:
        raise CheckpointError("two aligners have the same name, or one is called `proposal`")
    progress("reading configs and tokenizers")
    configs = {name: _load_supported_config(name, source, config) for name, source in sources.items()}
    tokenizer = _load_tokenizers(sources, config)
    rows = {name: loaded.get_text_config().vocab_size for name, loaded in configs.items()}
    vocab_size = shared_vocabulary_size(tokenizer, rows.pop(PROPOSAL), rows)
    max_model_len = _choose_max_model_len(config, configs)

    check_shares(config.tensor_parallel, configs[PROPOSAL])
    ranks = join(config.tensor_parallel, resolve_device(config.device))
    device = ranks.device
    dtype = resolve_dtype(config.dtype, device, configs[PROPOSAL])
    free = ranks.least(free_bytes(device))
    if free is not None:
        check_fits(config, expected_needs(config, configs, dtype), max_model_len, free)
    models = _load_models(sources, config, ranks, dtype, vocab_size, progress)
    loaded = dict(models)
    proposal = models.pop(PROPOSAL)

    geometries, pool_of = _share_pools(proposal, models)
    needs = needs_of(loaded, geometries.values())
    kv = plan_kv(config, needs, max_model_len, ranks.least(free_bytes(device)))
    words = f"reserving KV memory for {kv.num_tokens} tokens"
    progress(words)
    with naming_what_was_tried(f"{words} ({size_text(kv.num_bytes)})", device):
        pools = {
            name: KvPool(geometry, kv.num_pages + 1, config.page_size, device)
            for name, geometry in geometries.items()
        }
    return ModelBank(
        proposal=proposal,
        aligners=models,
        pools=pools,
        pool_of=pool_of,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_model_len=kv.max_model_len,
        page_size=config.page_size,
        eos_ids=_eos_ids(proposal, tokenizer),
        plan=describe(config, needs, kv, device=str(device), dtype=str(dtype).removeprefix("torch.")),
        ranks=ranks,
    )


def _load_models(
    sources: Mapping[str, str],
    config: EngineConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    vocab_size: int,
    progress: Progress,
) -> dict[str, PagedModel]:
    """All models, checked; only the proposal may be quantised, or shared between processes."""
    models: dict[str, PagedModel] = {}
    for name, source in sources.items():
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
        is_shared = is_proposal and ranks.size > 1
        models[name] = (
            SharedModel(model, name=name, ranks=ranks) if is_shared else PagedModel(model, name=name)
        )
        check_conformance(models[name], vocab_size)
    return models


def _load_supported_config(name: str, source: str, config: EngineConfig) -> PretrainedConfig:
    loaded = load_config(source, trust_remote_code=config.trust_remote_code)
    reason = unsupported_reason(loaded)
    if reason is not None:
        raise CheckpointError(f"`{name}` ({source}) cannot be served: {reason}")
    return loaded


def _load_tokenizers(sources: Mapping[str, str], config: EngineConfig) -> PreTrainedTokenizerBase:
    """The shared tokenizer, after every aligner's was compared with it."""
    tokenizer = load_tokenizer(sources["proposal"], trust_remote_code=config.trust_remote_code)
    for aligner in config.aligners:
        own = load_tokenizer(aligner.source, trust_remote_code=config.trust_remote_code)
        check_same_vocabulary(tokenizer, own, aligner_name=aligner.name)
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
