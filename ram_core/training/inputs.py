"""What a training run works on, read and judged before any stage begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ram_core.models.loading import context_limit, load_config
from ram_core.models.lora import MAX_RANK
from ram_core.models.source import resolve_source
from ram_core.models.vocabulary import check_same_vocabulary, load_tokenizer, shared_vocabulary_size
from ram_core.progress import OnProgress
from ram_core.training.config import DataConfig, Stage, TrainConfig
from ram_core.training.encoding import Encoded, encode_records
from ram_core.training.errors import ConfigError, DataError
from ram_core.training.records import Record, fingerprint, read_records


@dataclass(frozen=True, slots=True)
class Inputs:
    """The records as token ids, what they are in a hash, and what there is to say about them.

    `data` are the limits that really hold: no model reads more than its context.
    """

    encoded: Encoded
    data: DataConfig
    fingerprint: str
    notes: tuple[str, ...]


def read_inputs(config: TrainConfig, stages: Sequence[Stage], on_progress: OnProgress) -> Inputs:
    """Read and encode the data for these stages, after a look at the models.

    Raises:
        ConfigError: something that a stage needs is not named.
        DataError: the data cannot be read or encoded, or a record lacks an answer to learn.
        CheckpointError: a model is missing or broken.
        VocabularyMismatch: the aligner's tokenizer is not the proposal's.
    """
    _require_names(config, stages)
    tokenizer = _shared_tokenizer(config)
    records = read_records(config.data.train, split=config.data.split, max_records=config.data.max_records)
    if {"warmup", "fit"} & set(stages):
        _require_answers(records)
    data, notes = _within_context(config)
    ends = _end_ids(_proposal_source(config))
    encoded = encode_records(records, tokenizer, data, end_ids=ends, on_progress=on_progress)
    return Inputs(encoded, data, fingerprint(records), (str(encoded.lengths), *notes))


def _require_names(config: TrainConfig, stages: Sequence[Stage]) -> None:
    if not config.data.train:
        raise ConfigError("`data.train` must name the training data: a JSONL file, or hf:NAME")
    if not _proposal_source(config):
        raise ConfigError("`proposal` must name a model (or `warmup.model` one to be trained to be it)")
    if "warmup" in stages and not config.warmup.model:
        raise ConfigError("`warmup.model` must name a model for the stage `warmup`")
    if {"fit", "package"} & set(stages) and not config.fit.model:
        raise ConfigError("`fit.model` must name the small model that becomes the aligner")
    if config.fit.lora.rank > MAX_RANK and not config.fit.lora.is_merged:
        raise ConfigError(
            f"`fit.lora.rank` must be at most {MAX_RANK} unless `is_merged`, got {config.fit.lora.rank}"
        )


def _proposal_source(config: TrainConfig) -> str:
    """The model that is the proposal, or that is trained to be it: both have the same tokenizer."""
    return config.warmup.model or config.proposal


def _shared_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The proposal's tokenizer, after the aligner's was held against it."""
    proposal, aligner = _proposal_source(config), config.fit.model
    is_trusted = config.trust_remote_code
    tokenizer = load_tokenizer(proposal, trust_remote_code=is_trusted)
    if aligner:
        check_same_vocabulary(
            tokenizer, load_tokenizer(aligner, trust_remote_code=is_trusted), aligner_name=aligner
        )
        rows = {
            source: load_config(source, trust_remote_code=is_trusted).get_text_config(decoder=True).vocab_size
            for source in (proposal, aligner)
        }
        shared_vocabulary_size(tokenizer, rows[proposal], {aligner: rows[aligner]})
    return tokenizer


def _require_answers(records: Sequence[Record]) -> None:
    for record in records:
        if not record.wanted:
            raise DataError(f"{record.where}: it has no answer to learn; only `synthesize` can do without")


def _within_context(config: TrainConfig) -> tuple[DataConfig, list[str]]:
    """The data's limits, lowered to what all models can read."""
    data = config.data
    sources = {_proposal_source(config), config.fit.model} - {""}
    context = min(
        context_limit(load_config(source, trust_remote_code=config.trust_remote_code)) for source in sources
    )
    if context >= data.max_tokens:
        return data, []
    prompt = min(data.max_prompt_tokens, context // 2)
    note = f"the models read {context:,} tokens: `max_tokens` is {context}, `max_prompt_tokens` {prompt}"
    return msgspec.structs.replace(data, max_tokens=context, max_prompt_tokens=prompt), [note]


def _end_ids(proposal: str) -> frozenset[int]:
    """The tokens that end an answer by the proposal's generation config, if it has one."""
    directory = resolve_source(proposal, with_weights=False)
    try:
        ids = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # it has none
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
