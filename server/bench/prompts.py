"""What is said to the server: synthetic words of a wanted length, or conversations from a file."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ram_core.errors import RamError
from server.bench.lengths import Lengths

# Short and common: in most vocabularies each is one token with the space before it.
_WORD_LIST = """
an as at be by do go he if in is it me my no of on or so to up us we about above after again air all also
always and another answer any are around ask back because been before began being below between big book both
boy built but call came can car change children city close cold come could country cut day did different does
door down draw each early earth eat end enough even ever every eye face family far father feet few find fire
first five follow food for form found four from full gave get girl give good great green group grow had half
hand hard has have head hear help her here high him his home horse house how idea just keep kind knew know
land large last late learn leave left letter life light like line list little live long look made make man
many may mean men might mile more morning most mother mountain move much music must name near need never new
next night north not now number off often old once one only open other our out over own page paper part people
place plan plant play point put question quick read ready real right river road room run said same saw say
school sea second see seem sentence set seven she should show side small some song soon south stand start
state still stop story study such sun sure table take talk tell than that them then there these they thing
think this those three through time together told too took town tree true try turn two under until use very
voice walk want warm was watch water way well went were what when where which while white who why will wind
with wood word work world would write year yes you young your
"""
WORDS = _WORD_LIST.split()
SHORT_WORDS = [*string.ascii_lowercase, *(word for word in WORDS if len(word) <= 3)]
MAX_FITTING_ROUNDS = 64
MIN_WORDS = 64

Message = dict[str, Any]
if TYPE_CHECKING:
    from tokenizers import Tokenizer

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Talk:
    """The messages of a request, and how long its answer shall be (None: as the command line says)."""

    messages: Sequence[Message]
    num_answer_tokens: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Words to write prompts with, and how their length is counted."""

    count: CountTokens
    words: Sequence[str]


def count_words(text: str) -> int:
    """The measure where no tokenizer is given."""
    return len(text.split())


PLAIN = Vocabulary(count_words, WORDS)


def load_vocabulary(directory: Path) -> Vocabulary:
    """A tokenizer's count, special tokens left out, and the words that are one token to it.

    Its own words, because a vocabulary that knows none of ours would see the same prompt again and again.
    Reads `tokenizer.json`, without transformers or torch.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json" if directory.is_dir() else directory
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare `Exception`.
        raise RamError(f"Cannot read a tokenizer from {path}: {error}") from None

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    words = _single_token_words(tokenizer)
    return Vocabulary(count_tokens, words if len(words) >= MIN_WORDS else WORDS)


def _single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Those that are one token after a space, and come back from it."""
    token_ids = [[token_id] for token_id in range(tokenizer.get_vocab_size(with_added_tokens=False))]
    words = [word for text in tokenizer.decode_batch(token_ids) if (word := text.strip()).isalnum()]
    words = list(dict.fromkeys(words))
    head = tokenizer.encode(SHORT_WORDS[0], add_special_tokens=False).ids
    spellings = tokenizer.encode_batch(
        [f"{SHORT_WORDS[0]} {word}" for word in words], add_special_tokens=False
    )
    tails = [spelling.ids[len(head) :] for spelling in spellings]
    comes_back = [text.strip() for text in tokenizer.decode_batch(tails)]
    return [
        word
        for word, tail, text in zip(words, tails, comes_back, strict=True)
        if len(tail) == 1 and text == word
    ]


class SyntheticTalks:
    """One user message of random words each; the shared prefix, if any, is the same in all of them."""

    def __init__(
        self,
        lengths: Lengths,
        *,
        vocabulary: Vocabulary,
        num_shared_tokens: int,
        noise: np.random.Generator,
    ) -> None:
        self._lengths = lengths
        self._vocabulary = vocabulary
        self._num_shared = num_shared_tokens
        self._prefix = write_words(noise, num_shared_tokens, vocabulary) if num_shared_tokens else ""

    def talk(self, index: int, noise: np.random.Generator) -> Talk:
        """The message of one request: the prefix's tokens, and as many of its own as the law says."""
        num_tokens = self._num_shared + self._lengths.draw(noise)
        text = write_words(noise, num_tokens, self._vocabulary, begin=self._prefix)
        return Talk([{"role": "user", "content": text}])


class RecordedTalks:
    """Conversations from a file, in an order of their own; those of a long run come round again."""

    def __init__(self, talks: Sequence[Talk], noise: np.random.Generator) -> None:
        self._talks = talks
        self._order: list[int] = noise.permutation(len(talks)).tolist()

    def talk(self, index: int, noise: np.random.Generator) -> Talk:
        return self._talks[self._order[index % len(self._talks)]]


def write_words(
    noise: np.random.Generator, num_tokens: int, vocabulary: Vocabulary, *, begin: str = ""
) -> str:
    """Random words after `begin`, such that all together count `num_tokens`.

    Adds what is missing, a word for each token, and takes back what is too much. A vocabulary that splits
    words is met by chance, with short words at the end; if it is not, the nearest count has to do.
    """
    count, pool = vocabulary.count, vocabulary.words
    words = begin.split()
    num_begin = len(words)
    best, best_distance = begin, num_tokens
    for _ in range(MAX_FITTING_ROUNDS):
        text = " ".join(words)
        missing = num_tokens - (count(text) if text else 0)
        if missing == 0:
            return text
        if abs(missing) < best_distance:
            best, best_distance = text, abs(missing)
        if missing > 0:
            words += noise.choice(pool, size=-(-missing // _tokens_a_word(words, count))).tolist()
        else:
            pool = SHORT_WORDS
            num_excess = -(missing // _tokens_a_word(words, count))
            # One more now and then, or a gap that no single word fills would come back for ever.
            num_removed = num_excess + int(noise.integers(2))
            del words[max(num_begin, len(words) - num_removed) :]
    return best


def _tokens_a_word(words: Sequence[str], count: CountTokens) -> int:
    return max(1, round(count(" ".join(words)) / len(words))) if words else 1


def read_talks(path: Path, *, count: CountTokens | None) -> list[Talk]:
    """One conversation a line: `{"messages": […]}`, ShareGPT's `{"conversations": […]}` or `{"prompt": "…"}`.

    An assistant's message at the end is what was answered then: it is not sent, and its length by `count`,
    if there is one, is asked for; `"max_tokens"` in the line wins. Raises `RamError` that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RamError(f"Cannot read conversations from {path}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    talks = [_read_talk(line, f"{path}:{number}", count) for number, line in numbered]
    if not talks:
        raise RamError(f"There is no conversation in {path}.")
    return talks


def _read_talk(line: str, place: str, count: CountTokens | None) -> Talk:
    try:
        fields = json.loads(line)
        messages = _messages_of(fields)
        num_tokens = fields.get("max_tokens")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RamError(
            f'{place}: a line is {{"messages": […]}}, {{"conversations": […]}} or {{"prompt": "…"}}.'
        ) from None
    if num_tokens is not None and (type(num_tokens) is not int or num_tokens < 1):
        raise RamError(f"{place}: `max_tokens` is a whole number from 1 on; got `{num_tokens}`.")
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
        if num_tokens is None and count is not None and isinstance(answer, str):
            num_tokens = max(1, count(answer))
    if not messages:
        raise RamError(f"{place}: nothing is asked here.")
    return Talk(messages, num_tokens)


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _messages_of(fields: dict[str, Any]) -> list[Message]:
    if "prompt" in fields:
        return [{"role": "user", "content": str(fields["prompt"])}]
    if "conversations" in fields:
        return [
            {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in fields["conversations"]
        ]
    messages: list[Message] = list(fields["messages"])
    if not all(message["role"] and "content" in message for message in messages):
        raise ValueError("A message has a role and a content.")
    return messages
