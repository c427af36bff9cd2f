"""Records as token ids, as the proposal reads a conversation and is to continue it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ram_core.models.source import one_line
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.config import DataConfig
from ram_core.training.errors import DataError
from ram_core.training.examples import TrainingPair
from ram_core.training.records import Message, Record

_REPORT_EVERY = 500


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the limits did to `num_records`; a dropped record is not counted as truncated."""

    num_records: int
    num_dropped: int = 0
    num_prompts_truncated: int = 0
    num_answers_truncated: int = 0

    def __str__(self) -> str:
        counts = {
            "dropped as too long": self.num_dropped,
            "with a prompt that lost its beginning": self.num_prompts_truncated,
            "with an answer that lost its end": self.num_answers_truncated,
        }
        return ", ".join(
            [
                f"{self.num_records:,} records",
                *(f"{count:,} {what}" for what, count in counts.items() if count),
            ]
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of the records that were kept, with the records, in their order.

    A pair's `wanted` is empty where its record has no wanted answer, `proposed` where it has no rejected one.
    """

    records: tuple[Record, ...]
    pairs: tuple[TrainingPair, ...]
    lengths: Lengths


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a conversation, ready for the assistant's answer.

    Without a chat template, they are those of the contents, joined by newlines.

    Raises:
        DataError: the chat template refuses the conversation, a system message for instance.
    """
    return _ask(tokenizer, messages).ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    *,
    end_ids: Set[int] = frozenset(),
) -> tuple[int, ...]:
    """Token ids with which the assistant answers `messages` by `text`; the last one ends the answer.

    They are what the chat template puts behind the prompt, up to and with the first token that ends an
    answer: the tokenizer's own end of text, or one of `end_ids`. Without a template, or where it writes no
    such continuation, they are the text's own and an end.

    Raises:
        DataError: the chat template refuses the conversation or leaves nothing of the answer, or no token
            ends an answer.
    """
    return _answer(tokenizer, messages, text, _ask(tokenizer, messages), end_ids)


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    end_ids: Set[int] = frozenset(),
    on_progress: OnProgress = ignore_progress,
) -> Encoded:
    """All records as token ids, none longer than `data` allows; what is longer is counted.

    A prompt that is cut loses its beginning, an answer its end and so its last token, the end of text.

    Raises:
        DataError: a record cannot be encoded, which is named by its file and line; or none is left.
    """
    kept: list[tuple[Record, TrainingPair]] = []
    num_prompts = num_answers = 0
    for done, record in enumerate(records, 1):
        try:
            whole = _encode_record(record, tokenizer, end_ids)
        except DataError as error:
            raise DataError(f"{record.where}: {error}" if record.where else str(error)) from None
        pair = _within(whole, data)
        if pair == whole or data.too_long == "truncate":
            kept.append((record, pair))
            num_prompts += len(pair.prompt) < len(whole.prompt)
            num_answers += (len(pair.wanted), len(pair.proposed)) != (len(whole.wanted), len(whole.proposed))
        if done % _REPORT_EVERY == 0 or done == len(records):
            on_progress(Progress("encoding", done, len(records)))
    if not kept:
        raise DataError(
            f"all {len(records)} records are longer than `max_prompt_tokens` {data.max_prompt_tokens} "
            f"or `max_tokens` {data.max_tokens}; raise them, or set `too_long` to truncate"
        )
    lengths = Lengths(len(records), len(records) - len(kept), num_prompts, num_answers)
    return Encoded(tuple(record for record, _ in kept), tuple(pair for _, pair in kept), lengths)


def _encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, end_ids: Set[int]) -> TrainingPair:
    asked = _ask(tokenizer, record.messages)
    if not asked.ids:
        raise DataError("its prompt has no tokens")
    wanted, rejected = (
        _answer(tokenizer, record.messages, text, asked, end_ids) if text else ()
        for text in (record.wanted, record.rejected)
    )
    return TrainingPair(asked.ids, wanted, rejected)


def _within(pair: TrainingPair, data: DataConfig) -> TrainingPair:
    """The pair, cut to the limits."""
    prompt = pair.prompt[-data.max_prompt_tokens :]
    room = data.max_tokens - len(prompt)
    return TrainingPair(prompt, pair.wanted[:room], pair.proposed[:room])


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt as the template wrote it ("" without a template), and as token ids."""

    rendered: str
    ids: tuple[int, ...]


def _ask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> _Asked:
    if not tokenizer.chat_template:
        return _Asked("", tuple(tokenizer.encode("\n".join(message["content"] for message in messages))))
    rendered = _render(tokenizer, messages, is_prompt=True)
    return _Asked(rendered, _ids(tokenizer, rendered))


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    asked: _Asked,
    end_ids: Set[int],
) -> tuple[int, ...]:
    """What `encode_answer` promises, to a prompt that was encoded before."""
    ends = {*end_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    if not ends:
        raise DataError("the tokenizer has no end-of-text token, so no answer could end")
    end: int = min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if tokenizer.chat_template:
        whole = _render(tokenizer, [*messages, {"role": "assistant", "content": text}], is_prompt=False)
        continued = _continuation(tokenizer, asked, whole)
        length = next((at for at, token in enumerate(continued, 1) if token in ends), 0)
        if length == 1:
            raise DataError("the chat template leaves nothing of the answer")
        if length:
            return continued[:length]
        behind = _ids(tokenizer, whole.rpartition(text.strip())[2])
        end = next((token for token in behind if token in ends), end)
    return (*tokenizer.encode(text, add_special_tokens=False), end)


def _continuation(tokenizer: PreTrainedTokenizerBase, asked: _Asked, whole: str) -> tuple[int, ...]:
    """What a template adds to the prompt for the answer, or () if it writes the conversation anew."""
    if not whole.startswith(asked.rendered):
        return ()
    # Cut as one text, so that the first token of the answer is the one that follows this prompt.
    whole_ids = _ids(tokenizer, whole)
    if whole_ids[: len(asked.ids)] == asked.ids:
        return whole_ids[len(asked.ids) :]
    return _ids(tokenizer, whole[len(asked.rendered) :])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, is_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=is_prompt, tokenize=False)
        )
    except Exception as error:  # a template is a program, and raises whatever it likes
        raise DataError(f"the chat template refuses it: {one_line(error)}") from None


def _ids(tokenizer: PreTrainedTokenizerBase, rendered: str) -> tuple[int, ...]:
    """Token ids of what a template wrote, special tokens included."""
    return tuple(tokenizer.encode(rendered, add_special_tokens=False))
