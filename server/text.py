"""Text to token ids, by the proposal's tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from ram_core.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# So many characters take about a millisecond; more are encoded off the event loop.
_MAX_INLINE_CHARS = 2000
# What a message costs, however short it is.
_CHARS_A_TURN = 20

Turn = dict[str, str]
"""One message: `role` and `content`."""

Encoded = TypeVar("Encoded")


async def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], max_tokens: int
) -> tuple[int, ...]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Raises:
        InvalidRequest: the chat template refuses it, or `max_tokens` can never hold it.
    """
    num_chars = sum(len(turn["content"]) for turn in turns)
    _check_length(tokenizer, num_chars, max_tokens, "messages")
    return await _run(lambda: _encode_chat(tokenizer, turns), num_chars + _CHARS_A_TURN * len(turns))


async def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of each text, with what the tokenizer puts before one.

    Raises:
        ContextLengthExceeded: `max_tokens` can never hold one of them.
    """
    for prompt in prompts:
        _check_length(tokenizer, len(prompt), max_tokens, "prompt")
    num_chars = sum(len(prompt) + _CHARS_A_TURN for prompt in prompts)
    return await _run(lambda: [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts], num_chars)


def _check_length(tokenizer: PreTrainedTokenizerBase, num_chars: int, max_tokens: int, param: str) -> None:
    """Refuse what is far too long before it is encoded, which takes seconds for megabytes of one letter."""
    if num_chars <= max_tokens:
        return
    most = max_tokens * _longest_token(tokenizer)
    if num_chars > most:
        message = f"A text of {num_chars} characters is more than {max_tokens} tokens can hold."
        raise ContextLengthExceeded(message, param=param)


_longest_tokens: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()


def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token, or more: byte-level vocabularies write a character for each byte."""
    if tokenizer not in _longest_tokens:
        _longest_tokens[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _longest_tokens[tokenizer]


async def _run(encode: Callable[[], Encoded], num_chars: int) -> Encoded:
    return await asyncio.to_thread(encode) if num_chars > _MAX_INLINE_CHARS else encode()


def _encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        message = "This model has no chat template; use /v1/completions."
        raise InvalidRequest(message, param="messages")
    try:
        text = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InvalidRequest(f"The model's chat template refuses this: {error}.", param="messages") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
