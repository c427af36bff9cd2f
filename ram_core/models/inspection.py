"""What a proposal and its aligners would need, and what speaks against serving them: without any weights.

Reads configs, tokenizers and the headers of weight files; models are built on the meta device, where one
token is sent through them to learn what each layer keeps of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.loading import (
    build_skeleton,
    check_weights,
    context_limit,
    load_config,
    resolve_device,
    resolve_dtype,
    unsupported_reason,
)
from ram_core.models.paged import PagedModel
from ram_core.models.quantization import is_quantized
from ram_core.models.vocabulary import check_same_vocabulary, load_tokenizer, shared_vocabulary_size
from ram_core.models.weight_files import checkpoint_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PROPOSAL = "proposal"


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What one model is and needs. A model that cannot be read has zeros, and problems that say why.

    `weight_bytes` and `kv_bytes_per_token` are in `dtype`, but for weights that the checkpoint quantises;
    `num_rows` counts the logits of a token.
    """

    name: str
    source: str
    architecture: str = "unknown"
    dtype: str = ""
    num_parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    context_tokens: int = 0
    num_rows: int = 0
    problems: tuple[str, ...] = ()

    def memory_bytes(self, num_tokens: int) -> int:
        """Bytes of the weights and of the keys and values of `num_tokens` tokens."""
        return self.weight_bytes + num_tokens * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class AlignerReport:
    """One aligner; `vocabulary_problem` says how its vocabulary differs from the proposal's, or is ""."""

    model: ModelReport
    vocabulary_problem: str = ""

    @property
    def is_vocabulary_shared(self) -> bool:
        """Whether both tokenizers could be read and are the same."""
        return not self.vocabulary_problem


@dataclass(frozen=True, slots=True)
class PairReport:
    """A proposal with its aligners; `max_model_len` is the length asked for, or else the longest possible."""

    proposal: ModelReport
    aligners: tuple[AlignerReport, ...]
    max_model_len: int
    problems: tuple[str, ...]

    @property
    def can_serve(self) -> bool:
        """Whether nothing that is known without the weights speaks against it."""
        return not self.problems

    @property
    def models(self) -> tuple[ModelReport, ...]:
        """The proposal and all aligners."""
        return (self.proposal, *(aligner.model for aligner in self.aligners))

    def memory_bytes(self, num_tokens: int) -> int:
        """Bytes of all weights, and of `num_tokens` tokens of keys and values in every model."""
        return sum(model.memory_bytes(num_tokens) for model in self.models)


def inspect_pair(
    proposal: str,
    aligners: Mapping[str, str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int = 0,
    trust_remote_code: bool = False,
) -> PairReport:
    """Look at a proposal and at aligners (name to source) that are to follow it.

    Whatever is broken becomes a problem of the report. `dtype` and `device` mean what they mean to the
    engine; `max_model_len` 0 is the longest that all models can.

    Raises:
        CheckpointError: `device` is none of this machine's.
    """
    options = _Options(dtype, resolve_device(device), trust_remote_code)
    main, vocabulary = _inspect(PROPOSAL, proposal, options)
    judged = []
    for name, source in aligners.items():
        report, own = _inspect(name, source, options)
        judged.append(AlignerReport(report, _vocabulary_problem(main, vocabulary, report, own)))
    models = [main, *(aligner.model for aligner in judged)]
    longest = min((model.context_tokens for model in models if model.context_tokens), default=0)
    problems = [problem for model in models for problem in model.problems]
    problems += [
        each.vocabulary_problem for each in judged if each.vocabulary_problem not in ("", _NOT_COMPARED)
    ]
    problems += _length_problems(models, max_model_len)
    return PairReport(main, tuple(judged), max_model_len or longest, tuple(problems))


_NOT_COMPARED = "not compared: a tokenizer cannot be read"


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: str
    device: torch.device
    trust_remote_code: bool


def _inspect(name: str, source: str, options: _Options) -> tuple[ModelReport, PreTrainedTokenizerBase | None]:
    """A model's report, and its tokenizer if that can be read."""
    report, tokenizer = ModelReport(name, source), None
    problems: list[str] = []
    with _noting(source, problems):
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        report = replace(report, architecture=_architecture(config))
        if reason := unsupported_reason(config):
            raise CheckpointError(f"`{source}`: {reason}")
        report = _measured(report, config, options)
        if Path(source).expanduser().is_dir():  # What the hub has need not be downloaded for a look.
            check_weights(source, config, trust_remote_code=options.trust_remote_code)
    with _noting(source, problems):
        tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    # A directory that is missing is missing for the config and for the tokenizer.
    return replace(report, problems=tuple(dict.fromkeys(problems))), tokenizer


def _measured(report: ModelReport, config: PreTrainedConfig, options: _Options) -> ModelReport:
    dtype = resolve_dtype(options.dtype, options.device, config)
    skeleton = build_skeleton(
        config, attn_implementation=ATTENTION_NAME, trust_remote_code=options.trust_remote_code
    )
    model = PagedModel(skeleton.to(dtype), name=report.source)
    return replace(
        report,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        weight_bytes=_stored_bytes(report.source, config) or model.weight_bytes,
        kv_bytes_per_token=model.geometry.bytes_per_token,
        context_tokens=context_limit(config),
        num_rows=config.get_text_config(decoder=True).vocab_size,
    )


def _stored_bytes(source: str, config: PreTrainedConfig) -> int:
    """Bytes of weights that are quantised in the checkpoint, as far as that is here; else 0."""
    directory = Path(source).expanduser()
    return checkpoint_bytes(directory) if is_quantized(config) and directory.is_dir() else 0


def _architecture(config: PreTrainedConfig) -> str:
    return str(next(iter(config.architectures or ()), config.model_type))


def _vocabulary_problem(
    main: ModelReport,
    proposal: PreTrainedTokenizerBase | None,
    report: ModelReport,
    aligner: PreTrainedTokenizerBase | None,
) -> str:
    if proposal is None or aligner is None:
        return _NOT_COMPARED
    try:
        check_same_vocabulary(proposal, aligner, aligner_name=report.name)
        if main.num_rows and report.num_rows:
            shared_vocabulary_size(proposal, main.num_rows, {report.name: report.num_rows})
    except VocabularyMismatch as error:
        return str(error)
    return ""


def _length_problems(models: Iterable[ModelReport], max_model_len: int) -> list[str]:
    return [
        f"`max_model_len` {max_model_len} exceeds the {model.context_tokens} tokens of `{model.name}`"
        for model in models
        if 0 < model.context_tokens < max_model_len
    ]


@contextmanager
def _noting(source: str, problems: list[str]) -> Iterator[None]:
    """Write down why a checkpoint cannot be served, and go on after the block."""
    try:
        yield
    except CheckpointError as error:
        named = f"`{source}`"
        problems.append(str(error) if named in str(error) else f"{named}: {error}")
