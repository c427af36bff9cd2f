"""From the core's words to the wire's: deltas become chunks of a stream, or one answer."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel
from pydantic_core import to_json

from ram_core.engine.detokenizer import token_bytes, token_text
from ram_core.engine.messages import FinishReason, StepTelemetry, TokenEvent
from ram_core.params import AlignmentParams
from server.aligners.lease import NOTHING, Lease
from server.generation import Delta, Generation, Tally
from server.openai.convert import Ask
from server.openai.schema import (
    AlignedChatChoice,
    AlignedChatChunk,
    AlignedChatCompletion,
    AlignedChoiceLogprobs,
    AlignedChunkChoice,
    AlignedChunkLogprobs,
    AlignedCompletion,
    AlignedCompletionChoice,
    AlignedLogprobs,
    AlignedTokenLogprob,
    AlignmentSummary,
    LentAlignerSummary,
    TokenAlignment,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILLER = uuid.uuid4().hex
"""A text that no model's name holds."""
NOT_FINITE_LOG_PROB = -9999.0
"""What OpenAI reports where a log-probability is no number."""


@dataclass(slots=True)
class Transcript:
    """One choice, whole."""

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    tally: Tally = field(default_factory=Tally)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason
        self.tally = delta.tally or self.tally


class Renderer(Protocol):
    """One answer's shape: in chunks, or whole."""

    id: str

    def begin(self, lease: Lease, alignment: AlignmentParams) -> None:
        """Learn which aligners were lent for the answer, and how they act; before anything else is asked."""

    def events(self, delta: Delta) -> list[bytes]:
        """What a stream tells of one delta: server-sent events, a chunk in each."""

    def usage_event(self, usage: CompletionUsage) -> bytes:
        """The event without choices that ends a stream which asked for usage."""

    def answer(self, transcripts: Sequence[Transcript], usage: CompletionUsage) -> str:
        """The plain answer, as JSON."""


def count_usage(generation: Generation) -> CompletionUsage:
    """The tokens that a generation has read and drawn so far."""
    num_prompt_tokens, num_completion_tokens = generation.num_prompt_tokens, generation.num_completion_tokens
    return CompletionUsage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.num_cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )


class _Head:
    """What all parts of one answer have in common."""

    prefix: str
    answer_object: str
    chunk_object: str

    def __init__(self, ask: Ask, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ask = ask
        self._tokenizer = tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._lease, self._alignment = NOTHING, ask.alignment

    def begin(self, lease: Lease, alignment: AlignmentParams) -> None:
        """Learn which aligners were lent for the answer, and how they act."""
        self._lease, self._alignment = lease, alignment

    def _fields(self, object_name: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, "created": self._created, "model": self._ask.model}

    def _chunk_fields(self) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self._ask.wants_usage else {}
        return self._fields(self.chunk_object) | usage

    def _text_event(self, index: int, text: str) -> bytes:
        """An event of text and nothing else: rendered once a choice, and then filled in."""
        frame = self._frames.get(index)
        if frame is None:
            before, after = _event(self._text_chunk(index, _FILLER)).split(f'"{_FILLER}"'.encode())
            frame = self._frames[index] = (before, after)
        return b"%b%b%b" % (frame[0], to_json(text), frame[1])

    def _text_chunk(self, index: int, text: str) -> BaseModel:
        """A chunk of text and nothing else."""
        raise NotImplementedError

    @property
    def _is_plain(self) -> bool:
        """Whether chunks tell nothing of their tokens but the text."""
        return not (self._ask.wants_log_probs or self._ask.wants_telemetry)

    def _summary(self, tally: Tally) -> dict[str, Any]:
        if not self._ask.wants_telemetry:
            return {}
        return {"alignment": summarize(self._lease, self._alignment, tally)}

    def _summary_of(self, transcripts: Iterable[Transcript]) -> dict[str, Any]:
        total = Tally()
        for transcript in transcripts:
            total.merge(transcript.tally)
        return self._summary(total)

    def _figures(self, tokens: Iterable[TokenEvent]) -> dict[str, Any]:
        """The tokens' telemetry beside a choice, for those who want it and no log-probabilities."""
        if not self._ask.wants_telemetry or self._ask.wants_log_probs:
            return {}
        return {"alignment": [_figures(token.telemetry) for token in tokens]}


class ChatRenderer(_Head):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def events(self, delta: Delta) -> list[bytes]:
        events = []
        if delta.is_first:
            events.append(_event(self._chunk(delta.index, ChoiceDelta(role="assistant", content=""))))
        if self._is_plain:
            if delta.text:
                events.append(self._text_event(delta.index, delta.text))
        elif delta.text or delta.tokens:
            content = ChoiceDelta(content=delta.text)
            events.append(_event(self._chunk(delta.index, content, tokens=delta.tokens)))
        if delta.finish_reason is not None:
            summary = self._summary(delta.tally or Tally())
            events.append(
                _event(self._chunk(delta.index, ChoiceDelta(), delta.finish_reason, summary=summary))
            )
        return events

    def usage_event(self, usage: CompletionUsage) -> bytes:
        return _event(AlignedChatChunk(choices=[], **self._fields(self.chunk_object) | {"usage": usage}))

    def answer(self, transcripts: Sequence[Transcript], usage: CompletionUsage) -> str:
        choices = [self._choice(index, transcript) for index, transcript in enumerate(transcripts)]
        fields = self._fields(self.answer_object) | self._summary_of(transcripts)
        return _json(AlignedChatCompletion(choices=choices, usage=usage, **fields))

    def _chunk(
        self,
        index: int,
        delta: ChoiceDelta,
        finish_reason: FinishReason | None = None,
        *,
        tokens: Sequence[TokenEvent] = (),
        summary: dict[str, Any] | None = None,
    ) -> AlignedChatChunk:
        log_probs = AlignedChunkLogprobs(content=self._log_probs(tokens), refusal=None)
        choice = AlignedChunkChoice(
            index=index,
            delta=delta,
            finish_reason=finish_reason,
            logprobs=log_probs if tokens and self._ask.wants_log_probs else None,
            **(self._figures(tokens) if tokens else {}),
        )
        return AlignedChatChunk(choices=[choice], **self._chunk_fields() | (summary or {}))

    def _text_chunk(self, index: int, text: str) -> AlignedChatChunk:
        return self._chunk(index, ChoiceDelta(content=text))

    def _choice(self, index: int, transcript: Transcript) -> AlignedChatChoice:
        log_probs = None
        if self._ask.wants_log_probs:
            log_probs = AlignedChoiceLogprobs(content=self._log_probs(transcript.tokens), refusal=None)
        return AlignedChatChoice(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=transcript.text, refusal=None),
            finish_reason=transcript.finish_reason or "stop",
            logprobs=log_probs,
            **self._figures(transcript.tokens),
        )

    def _log_probs(self, tokens: Iterable[TokenEvent]) -> list[AlignedTokenLogprob]:
        return [self._log_prob(token) for token in tokens] if self._ask.wants_log_probs else []

    def _log_prob(self, token: TokenEvent) -> AlignedTokenLogprob:
        tops = [TopLogprob(**self._candidate(*candidate)) for candidate in token.top_log_probs]
        figures: dict[str, Any] = {}
        if self._ask.wants_telemetry:
            figures["alignment"] = _figures(token.telemetry)
        return AlignedTokenLogprob(
            top_logprobs=tops, **self._candidate(token.token_id, token.log_prob), **figures
        )

    def _candidate(self, token_id: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": token_text(self._tokenizer, token_id),
            "bytes": list(token_bytes(self._tokenizer, token_id)),
            "logprob": finite(log_prob),
        }


class CompletionRenderer(_Head):
    """/v1/completions."""

    prefix = "cmpl"
    answer_object = chunk_object = "text_completion"

    def __init__(self, ask: Ask, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(ask, tokenizer)
        self._offsets: dict[int, int] = {}

    def events(self, delta: Delta) -> list[bytes]:
        is_over = delta.finish_reason is not None
        if not (delta.text or delta.tokens or is_over or delta.is_first):
            return []
        if self._is_plain and not is_over:
            return [self._text_event(delta.index, delta.text)]
        summary = self._summary(delta.tally or Tally()) if is_over else {}
        choice = self._choice(delta.index, delta.text, delta.tokens, delta.finish_reason)
        return [_event(AlignedCompletion(choices=[choice], **self._chunk_fields() | summary))]

    def usage_event(self, usage: CompletionUsage) -> bytes:
        return _event(AlignedCompletion(choices=[], **self._fields(self.chunk_object) | {"usage": usage}))

    def answer(self, transcripts: Sequence[Transcript], usage: CompletionUsage) -> str:
        choices = [
            self._choice(index, transcript.text, transcript.tokens, transcript.finish_reason)
            for index, transcript in enumerate(transcripts)
        ]
        fields = self._fields(self.answer_object) | self._summary_of(transcripts)
        return _json(AlignedCompletion(choices=choices, usage=usage, **fields))

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenEvent], finish_reason: FinishReason | None
    ) -> AlignedCompletionChoice:
        return AlignedCompletionChoice(
            index=index,
            text=text,
            finish_reason=finish_reason,
            logprobs=self._log_probs(index, tokens) if tokens and self._ask.wants_log_probs else None,
            **self._figures(tokens),
        )

    def _text_chunk(self, index: int, text: str) -> AlignedCompletion:
        choice = self._choice(index, text, (), None)
        return AlignedCompletion(choices=[choice], **self._chunk_fields())

    def _log_probs(self, index: int, tokens: Sequence[TokenEvent]) -> AlignedLogprobs:
        texts = [token_text(self._tokenizer, token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        figures: dict[str, Any] = {}
        if self._ask.wants_telemetry:
            figures["alignment"] = [_figures(token.telemetry) for token in tokens]
        return AlignedLogprobs(
            text_offset=offsets,
            token_logprobs=[finite(token.log_prob) for token in tokens],
            tokens=texts,
            top_logprobs=[self._top(token) for token in tokens],
            **figures,
        )

    def _top(self, token: TokenEvent) -> dict[str, float]:
        """The alternatives by text, the most probable of equal texts, and always the token itself."""
        table: dict[str, float] = {}
        for token_id, log_prob in (*token.top_log_probs, (token.token_id, token.log_prob)):
            table.setdefault(token_text(self._tokenizer, token_id), finite(log_prob))
        return table


def summarize(lease: Lease, alignment: AlignmentParams, tally: Tally) -> AlignmentSummary:
    """Who answered, and what the aligners did to an answer."""
    return AlignmentSummary(
        aligners=_lent(lease),
        resampling=alignment.resampling.value,
        tokens=tally.num_tokens,
        fallbacks=tally.num_fallbacks,
        mean_kl_p_q=tally.mean("kl_p_q"),
        mean_kl_pi_p=tally.mean("kl_pi_p"),
        mean_ess=tally.mean("ess"),
        mean_aligner_mass=tally.mean("aligner_mass"),
    )


def _lent(lease: Lease) -> list[LentAlignerSummary]:
    return [
        LentAlignerSummary(name=lent.name, version=lent.version, strength=lent.strength)
        for lent in lease.aligners
    ]


def finite(log_prob: float) -> float:
    """JSON has no NaN and no infinity."""
    return log_prob if math.isfinite(log_prob) else NOT_FINITE_LOG_PROB


def _figures(telemetry: StepTelemetry | None) -> TokenAlignment | None:
    if telemetry is None:
        return None
    values = (telemetry.kl_p_q, telemetry.kl_pi_p, telemetry.ess, telemetry.aligner_mass)
    kl_p_q, kl_pi_p, ess, aligner_mass = (value if math.isfinite(value) else None for value in values)
    return TokenAlignment(
        kl_p_q=kl_p_q, kl_pi_p=kl_pi_p, ess=ess, aligner_mass=aligner_mass, fallback=telemetry.is_fallback
    )


def _json(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True)


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + _json(chunk).encode() + b"\n\n"
