"""Text to token ids, by the proposal's tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from ram_core.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# So many characters take about a millisecond; more are encoded off the event loop.
_MAX_INLINE_CHARS = 2000

Turn = dict[str, str]
"""One message: `role` and `content`."""

Encoded = TypeVar("Encoded")


async def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> tuple[int, ...]:
    """Token ids of a conversation, up to where the assistant's next answer begins."""
    num_chars = sum(len(turn["content"]) for turn in turns)
    return await _run(lambda: _encode_chat(tokenizer, turns), num_chars)


async def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each text, with what the tokenizer puts before one."""
    num_chars = sum(len(prompt) for prompt in prompts)
    return await _run(lambda: [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts], num_chars)


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
