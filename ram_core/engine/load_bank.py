"""Loading all that an engine begins with, the cheap checks first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.bank import PROPOSAL, PROPOSAL_POOL, ModelBank
from ram_core.engine.config import EngineConfig
from ram_core.engine.load_groups import each_once, load_groups
from ram_core.engine.newcomers import Terms, load_supported_config
from ram_core.engine.plan import Needs, check_fits, describe, plan_kv, size_text
from ram_core.engine.roll import Roll
from ram_core.engine.room import expected_needs, free_bytes, naming_what_was_tried, needs_of
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.backends import resolve_attention
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvGeometry, KvPool
from ram_core.models.loading import context_limit, load_model, resolve_device, resolve_dtype
from ram_core.models.lora import LoraConfig, is_adapter, read_lora_config
from ram_core.models.paged import PagedModel
from ram_core.models.tensor_parallel import Ranks, SharedModel, check_shares, join
from ram_core.models.vocabulary import check_same_vocabulary, load_tokenizer, shared_vocabulary_size

Progress = Callable[[str], None]
"""Told what is being done, one line at a time."""


@dataclass(frozen=True, slots=True)
class _Described:
    """What the configs say of the aligners that are still in: `sources` and `configs` are of their bases."""

    sources: dict[str, str]
    configs: dict[str, PretrainedConfig]
    adapters: dict[str, LoraConfig]

    def only(self, roll: Roll) -> _Described:
        """Without those who dropped out since."""
        names = [source.name for source in roll.sources]
        return _Described(
            {name: self.sources[name] for name in names},
            {name: self.configs[name] for name in names},
            {name: self.adapters[name] for name in names if name in self.adapters},
        )


def load_bank(config: EngineConfig, progress: Progress) -> ModelBank:
    """Load and check everything that `config` names; an aligner that is not required may fail.

    Raises:
        CheckpointError: a model cannot be served.
        VocabularyMismatch: an aligner's tokenizer is not the proposal's.
    """
    roll = Roll(config)
    if len({PROPOSAL, *(source.name for source in config.aligners)}) != len(config.aligners) + 1:
        raise CheckpointError("two aligners have the same name, or one is called `proposal`")
    progress("reading configs and tokenizers")
    main = load_supported_config(PROPOSAL, config.proposal, config)
    found = _describe(config, roll)
    tokenizer = load_tokenizer(config.proposal, trust_remote_code=config.trust_remote_code)
    num_rows = main.get_text_config().vocab_size
    _check_vocabularies(config, roll, found, tokenizer, num_rows)
    max_model_len = _choose_max_model_len(config, roll, {PROPOSAL: main, **found.only(roll).configs})
    check_shares(config.tensor_parallel, main)
    ranks = join(config.tensor_parallel, resolve_device(config.device))
    terms = Terms(
        config=config,
        tokenizer=tokenizer,
        num_rows=num_rows,
        max_model_len=max_model_len,
        device=ranks.device,
        dtype=resolve_dtype(config.dtype, ranks.device, main),
        attention=resolve_attention(config.attention, ranks.device, config.page_size),
        vocab_size=shared_vocabulary_size(tokenizer, num_rows, {}),
    )
    _check_memory(terms, ranks, roll, main, found)
    proposal = _load_proposal(terms, ranks, progress)
    groups = load_groups(
        config, roll, found.configs, found.adapters, _loader(terms, found, progress), progress
    )
    return _make_bank(terms, ranks, roll, proposal, groups, progress)


def _describe(config: EngineConfig, roll: Roll) -> _Described:
    found = _Described({}, {}, {})
    for aligner in config.aligners:
        with roll.trying(aligner.name):
            source = aligner.source
            if is_adapter(source):
                found.adapters[aligner.name] = adapter = read_lora_config(source)
                source = adapter.base
            found.sources[aligner.name] = source
            found.configs[aligner.name] = load_supported_config(aligner.name, source, config)
    return found


def _check_vocabularies(
    config: EngineConfig, roll: Roll, found: _Described, tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> None:
    """Compare every aligner's tokenizer with the proposal's; those of one place once."""
    seen: set[str] = set()
    for aligner in roll.sources:
        adapter = found.adapters.get(aligner.name)
        place = adapter.tokenizer_source if adapter else aligner.source
        with roll.trying(aligner.name):
            rows = {aligner.name: found.configs[aligner.name].get_text_config().vocab_size}
            shared_vocabulary_size(tokenizer, num_rows, rows)
            if place not in seen:
                own = load_tokenizer(place, trust_remote_code=config.trust_remote_code)
                check_same_vocabulary(tokenizer, own, aligner_name=aligner.name)
                seen.add(place)


def _choose_max_model_len(config: EngineConfig, roll: Roll, configs: Mapping[str, PretrainedConfig]) -> int:
    limits: dict[str, int] = {PROPOSAL: context_limit(configs[PROPOSAL])}
    for source in roll.sources:
        with roll.trying(source.name):
            limits[source.name] = context_limit(configs[source.name])
            _require_length(config, source.name, limits[source.name])
    limits = {name: limit for name, limit in limits.items() if name == PROPOSAL or roll.has(name)}
    _require_length(config, PROPOSAL, limits[PROPOSAL])
    return config.max_model_len or min(limits.values())


def _require_length(config: EngineConfig, name: str, limit: int) -> None:
    if config.max_model_len > limit:
        raise CheckpointError(
            f"`max_model_len` is {config.max_model_len}, but `{name}` reads at most {limit} tokens"
        )


def _check_memory(terms: Terms, ranks: Ranks, roll: Roll, main: PretrainedConfig, found: _Described) -> None:
    """Refuse what cannot fit; without those who are not required if that helps."""
    free = ranks.least(free_bytes(terms.device))
    if free is None:
        return
    while True:
        there = found.only(roll)
        configs = each_once({PROPOSAL: main, **there.configs}, there.adapters)
        try:
            check_fits(
                terms.config, expected_needs(terms.config, configs, terms.dtype), terms.max_model_len, free
            )
        except CheckpointError as error:
            if roll.drop_all(str(error)):
                continue
            raise
        return


def _load_proposal(terms: Terms, ranks: Ranks, progress: Progress) -> PagedModel:
    """The proposal alone may be quantised, or shared between processes."""
    config = terms.config
    progress(terms.loading(PROPOSAL, config.proposal))
    model = load_model(
        config.proposal,
        device=terms.device,
        dtype=terms.dtype,
        attn_implementation=ATTENTION_NAME,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization,
        num_ranks=ranks.size,
    )
    if ranks.size > 1:
        paged: PagedModel = SharedModel(model, name=PROPOSAL, ranks=ranks, attention=terms.attention)
    else:
        paged = PagedModel(model, name=PROPOSAL, attention=terms.attention)
    check_conformance(paged, terms.vocab_size)
    return paged


def _loader(terms: Terms, found: _Described, progress: Progress) -> Callable[[str], PagedModel]:
    def load(name: str) -> PagedModel:
        progress(terms.loading(name, found.sources[name]))
        return terms.load(name, found.sources[name])

    return load


def _make_bank(
    terms: Terms,
    ranks: Ranks,
    roll: Roll,
    proposal: PagedModel,
    groups: list[AlignerGroup],
    progress: Progress,
) -> ModelBank:
    """Reserve KV memory for all that was loaded."""
    config, device = replace(terms.config, aligners=tuple(roll.sources)), terms.device
    group_of = {name: group for group in groups for name in group.names}
    geometries, pool_of = _share_pools(proposal, {name: group.model for name, group in group_of.items()})
    needs = _needs(proposal, groups, geometries.values())
    kv = plan_kv(config, needs, terms.max_model_len, ranks.least(free_bytes(device)))
    words = f"reserving KV memory for {kv.num_tokens} tokens"
    progress(words)
    with naming_what_was_tried(f"{words} ({size_text(kv.num_bytes)})", device):
        pools = {
            name: KvPool(geometry, kv.num_pages + 1, config.page_size, device)
            for name, geometry in geometries.items()
        }
    residents = roll.residents
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
        failed=roll.failed,
        terms=replace(terms, max_model_len=kv.max_model_len),
        tokenizer=terms.tokenizer,
        vocab_size=terms.vocab_size,
        max_model_len=kv.max_model_len,
        page_size=config.page_size,
        eos_ids=_eos_ids(proposal, terms.tokenizer),
        plan=describe(config, needs, kv, device=str(device), dtype=str(terms.dtype).removeprefix("torch.")),
        ranks=ranks,
    )


def _needs(proposal: PagedModel, groups: Iterable[AlignerGroup], geometries: Iterable[KvGeometry]) -> Needs:
    needs = needs_of({PROPOSAL: proposal}, geometries)
    own = {name: num_bytes for group in groups for name, num_bytes in group.weight_bytes.items()}
    return replace(needs, weight_bytes={**needs.weight_bytes, **own})


def _share_pools(
    proposal: PagedModel, aligners: Mapping[str, PagedModel]
) -> tuple[dict[str, KvGeometry], dict[str, str]]:
    """Pools by name, and each aligner's pool: one for all aligners of equal geometry."""
    geometries = {PROPOSAL_POOL: proposal.geometry}
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
