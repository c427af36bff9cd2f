"""The wire: what a request may hold, and our additions to OpenAI's answers.

The wire has no defaults: what is absent is None, and the core's default applies. Types are strict (a boolean
is no number, a string no integer); ranges are the core's to check, except where only the wire has a limit.
"""

from __future__ import annotations

from typing import Annotated, Literal

from openai.types import Completion, CompletionChoice, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 4096
MAX_STOP_TOKENS = 4096
MAX_ALIGNERS = 64
MAX_CACHE_SALT = 256


_Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
# A union tries all of its lists: one that does not fit must not tell of each of its items.
_TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class AlignerChoice(_Wire):
    """One aligner of several, and how strongly it pulls."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    strength: float | None = None


class Alignment(_Wire):
    """Everything that is ours, under one key, so that nothing collides with OpenAI's fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    aligner: str | None = None
    aligners: Annotated[list[AlignerChoice], Field(max_length=MAX_ALIGNERS)] | None = None
    strength: float | None = None
    resampling: str | None = None
    candidates: int | None = None
    proposal_temperature: float | None = None
    proposal_top_p: float | None = None
    proposal_top_k: int | None = None
    kl_threshold: float | None = None
    eos_priority: bool | None = None
    telemetry: bool | None = None


class StreamOptions(_Wire):
    """`include_obfuscation` is accepted and without effect: we never pad chunks."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(_Wire):
    """What both endpoints share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    alignment: Alignment | None = None


class ContentPart(_Wire):
    type: str
    text: str | None = None


class Message(_Wire):
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(fail_fast=True)]
    )
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_num_prompts(cls, prompt: object) -> object:
        """Before each of them is looked at."""
        if isinstance(prompt, list) and len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
            raise ValueError(f"there may be {MAX_CHOICES} prompts")
        return prompt


class TokenAlignment(BaseModel):
    """What the aligner did to one token; a figure that is not finite is null."""

    kl_p_q: float | None
    kl_pi_p: float | None
    ess: float | None
    aligner_mass: float | None
    fallback: bool


class LentAlignerSummary(BaseModel):
    """An aligner that the request named: the version that answered, and how strongly it pulled."""

    name: str
    version: str
    strength: float


class AlignmentSummary(BaseModel):
    """Who answered, and what the aligners did to an answer, or to one choice; means over aligned tokens."""

    aligners: list[LentAlignerSummary]
    resampling: str
    tokens: int
    fallbacks: int
    mean_kl_p_q: float | None
    mean_kl_pi_p: float | None
    mean_ess: float | None
    mean_aligner_mass: float | None


class AlignedTokenLogprob(ChatCompletionTokenLogprob):
    alignment: TokenAlignment | None = None


class AlignedChoiceLogprobs(ChoiceLogprobs):
    content: list[AlignedTokenLogprob] | None = None  # type: ignore[assignment]


class AlignedChunkLogprobs(ChunkLogprobs):
    content: list[AlignedTokenLogprob] | None = None  # type: ignore[assignment]


class AlignedLogprobs(Logprobs):
    alignment: list[TokenAlignment | None] | None = None


class AlignedChatChoice(ChatChoice):
    logprobs: AlignedChoiceLogprobs | None = None
    alignment: list[TokenAlignment | None] | None = None


class AlignedChunkChoice(ChunkChoice):
    logprobs: AlignedChunkLogprobs | None = None
    alignment: list[TokenAlignment | None] | None = None


class AlignedCompletionChoice(CompletionChoice):
    """Also a choice of a chunk, whose `finish_reason` is null until its last."""

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]
    logprobs: AlignedLogprobs | None = None
    alignment: list[TokenAlignment | None] | None = None


class AlignedChatCompletion(ChatCompletion):
    choices: list[AlignedChatChoice]  # type: ignore[assignment]
    alignment: AlignmentSummary | None = None


class AlignedChatChunk(ChatCompletionChunk):
    choices: list[AlignedChunkChoice]  # type: ignore[assignment]
    alignment: AlignmentSummary | None = None


class AlignedCompletion(Completion):
    choices: list[AlignedCompletionChoice]  # type: ignore[assignment]
    alignment: AlignmentSummary | None = None


class ServedModel(Model):
    """A model of ours: an aligner's `parent` is the proposal whose tokens it weighs."""

    root: str
    parent: str | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ServedModel]
