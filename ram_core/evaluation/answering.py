"""One proposal and its aligners, loaded once, and many settings of them answered on the same prompts."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ram_core.aligners.catalogue import Catalogue
from ram_core.aligners.manifest import Manifest, default_manifest, read_manifest
from ram_core.aligners.names import SELF
from ram_core.aligners.states import AskedAligner, VersionKey
from ram_core.engine.config import AlignerSource
from ram_core.engine.local import Choice
from ram_core.engine.messages import StepTelemetry
from ram_core.models.source import resolve_source
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.encoding import encode_prompt
from ram_core.training.errors import DataError
from ram_core.training.records import Record
from ram_core.training.synthesis import load_engine

# Wide: nobody waits for a single answer here.
_MAX_BATCH = 128
_NO_VERSION = "0"

ALONE = "proposal"
"""The label of the proposal's own answers."""


@dataclass(frozen=True)
class Setting:
    """One way to answer: how the proposal is aligned, and how tokens are drawn.

    The terms of `alignment` name aligners of the bench; one whose manifest lists several models stands for
    all of them. `sampling.max_tokens` 0 answers to the end of the context.
    """

    label: str
    alignment: AlignmentParams = field(default_factory=AlignmentParams)
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Answers:
    """What a setting answered, in the order of the prompts. `seconds` is the time of all of them together."""

    setting: Setting
    texts: tuple[str, ...]
    choices: tuple[Choice, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens drawn, those that ended an answer among them."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return tuple(len(choice.token_ids) for choice in self.choices)

    @cached_property
    def telemetry(self) -> tuple[StepTelemetry, ...]:
        """What the aligner did to each token, answer after answer; empty for the proposal alone."""
        return tuple(step for choice in self.choices for step in choice.telemetry)


class Bench:
    """An engine and the prompts of `records`, for as many settings as are wanted.

    Args:
        proposal: directory or hub id of the frozen model.
        aligners: a directory or hub id for each name that settings may use.
        records: whose prompts are answered; their wanted answers are for others to look at.
        device: as `EngineConfig` has it, like `dtype` and `quantization`.

    Raises:
        CheckpointError: a model that cannot be served; `VocabularyMismatch` for an aligner of another
            tokenizer.
        DataError: there are no records, or a prompt fills the whole context.
    """

    def __init__(
        self,
        proposal: str,
        aligners: Mapping[str, str],
        records: Sequence[Record],
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "none",
        trust_remote_code: bool = False,
        max_batch: int = _MAX_BATCH,
    ) -> None:
        if not records:
            raise DataError("there are no records to evaluate on")
        self.manifests = {name: _manifest(name, source) for name, source in aligners.items()}
        self._catalogue = Catalogue()
        for name, manifest in self.manifests.items():
            key = VersionKey(name, manifest.version)
            self._catalogue.add(key, aligners[name], manifest.terms, manifest.strength)
        self.engine = load_engine(
            proposal,
            [part for name, source in aligners.items() for part in self._parts(name, source)],
            device=device,
            dtype=dtype,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            max_batch=max_batch,
            # The first setting must not be the one that pays for all prompts.
            prefix_cache=False,
        )
        self._take(records)

    def with_records(self, records: Sequence[Record]) -> Bench:
        """The same engine, and so not at the same time, for the prompts of other records.

        Raises:
            DataError: there are no records, or a prompt fills the whole context.
        """
        other = copy.copy(self)
        other._take(records)
        return other

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the proposal and all aligners share."""
        return self.engine.tokenizer

    def answer(self, setting: Setting, on_progress: OnProgress = ignore_progress) -> Answers:
        """One answer to each prompt.

        Every prompt has noise of its own, derived from the seed (0 if there is none) and its place, the same
        in every setting: a rerun gets the same answers.

        Raises:
            RamError: an aligner that is not there, or a model that failed.
        """
        alignment = self.resolved(setting.alignment)
        first_seed = setting.sampling.seed or 0
        sampling = [
            replace(setting.sampling, seed=first_seed + index, max_tokens=self._room(prompt, setting))
            for index, prompt in enumerate(self.prompts)
        ]
        num_done = 0

        def count(_index: int, _choice: Choice) -> None:
            nonlocal num_done
            num_done += 1
            on_progress(Progress(f"answering, {setting.label}", num_done, len(self.prompts)))

        start_s = time.perf_counter()
        choices = self.engine.generate(self.prompts, sampling, alignment, on_finish=count)
        seconds = time.perf_counter() - start_s
        texts = tuple(self.engine.text(choice) for choice in choices)
        return Answers(setting, texts, tuple(choices), seconds)

    def resolved(self, alignment: AlignmentParams) -> AlignmentParams:
        """The same alignment with the engine's models in place of aligners' names.

        Raises:
            UnknownModel: there is no such aligner.
        """
        asked = [AskedAligner(term.aligner, term.strength) for term in alignment.terms]
        terms = self._catalogue.resolve(asked, "").terms
        return replace(
            alignment,
            terms=tuple(AlignerTerm(_model_name(term.key, term.part), term.strength) for term in terms),
        )

    def _parts(self, name: str, source: str) -> list[AlignerSource]:
        manifest = self.manifests[name]
        key, directory = VersionKey(name, manifest.version), resolve_source(source, with_weights=True)
        return [AlignerSource(_model_name(key, part), str(directory / part)) for part in manifest.parts]

    def _room(self, prompt: Sequence[int], setting: Setting) -> int:
        room = self.engine.engine.limits.max_model_len - len(prompt)
        return min(setting.sampling.max_tokens or room, room)

    def _take(self, records: Sequence[Record]) -> None:
        if not records:
            raise DataError("there are no records to evaluate on")
        self.records = tuple(records)
        self.prompts = tuple(encode_prompt(self.tokenizer, record.messages) for record in self.records)
        limit = self.engine.engine.limits.max_model_len
        for number, prompt in enumerate(self.prompts, 1):
            if len(prompt) >= limit:
                raise DataError(
                    f"record {number}: its prompt has {len(prompt)} tokens, and the context holds {limit}"
                )


def alone(sampling: SamplingParams, alignment: AlignmentParams | None = None) -> Setting:
    """The proposal by itself, cut to the nucleus that aligned draws are cut to: nothing else differs."""
    nucleus = alignment or AlignmentParams()
    cut = replace(sampling, top_p=nucleus.proposal_top_p, top_k=nucleus.proposal_top_k)
    return Setting(ALONE, sampling=cut)


def _manifest(name: str, source: str) -> Manifest:
    """What an aligner says of itself, and where it says nothing, what holds then."""
    directory: Path = resolve_source(source, with_weights=True)
    return read_manifest(directory) or default_manifest(name, _NO_VERSION)


def _model_name(key: VersionKey, part: str) -> str:
    """What the engine calls a model of an aligner: NAME, or NAME@VERSION/PART for one further down."""
    path = part.removeprefix("./")
    return key.name if path in (SELF, ".") else f"{key}/{path}"
