"""Tokens to text, one at a time: never half a character, never the beginning of a stop string.

Most tokenizers decode token by token into bytes (byte-level BPE, and SentencePiece models with byte
fallback), so their text is that of an incremental UTF-8 decoder over a table of each token's bytes: exact,
a microsecond a token. All others decode a short window anew with each token. `tokenizers`' own
`DecodeStream` is not used: after a prompt that ends inside a character it repeats the whole prompt, and it
holds, and decodes again with each token, whatever is not valid UTF-8.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# SentencePiece writes a space as this.
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A code point has at most 4 bytes, so that many tokens tell whether a prompt ends inside of one; some more
# for special tokens, which have no bytes.
_NUM_PROMPT_IDS = 16
# After so many tokens without a whole character, a window's text is told as it is.
_MAX_PENDING = 16


class Detokenizer:
    """The text of one growing answer.

    `prompt_ids` come before it: they decide about a leading space, and a character that the prompt leaves
    unfinished is finished by the answer. All pieces together are what the tokenizer would decode at once.
    (Except after byte-fallback tokens that are not UTF-8: the tokenizer spoils the whole run of byte tokens,
    here the characters that were whole stay.)

    The text ends before the first stop string to be complete, whatever the tokens; of two that are complete
    with the same character, the longer counts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...] = (),
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        table = _table_of(tokenizer)
        self._pieces: _Pieces
        if table is not None:
            self._pieces = _BytePieces(table, prompt_ids, skip_special_tokens)
        else:
            self._pieces = _WindowPieces(tokenizer, prompt_ids, skip_special_tokens)
        self._gate = _StopGate(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met; nothing is told any more."""
        return self._gate.is_stopped

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain, often empty."""
        return self._gate.push(self._pieces.push(token_id))

    def flush(self) -> str:
        """Return the rest at the end of the answer; bytes that are no whole character as U+FFFD."""
        return self._gate.push(self._pieces.flush()) + self._gate.flush()


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token's text for people; bytes that are no whole character as U+FFFD, an unknown id as ""."""
    return token_bytes(tokenizer, token_id).decode("utf-8", errors="replace")


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """One token's exact bytes, a leading space included; of a special token, the bytes of its name.

    Only of tokenizers without a table (see above) may bytes of an unfinished character be lost.
    """
    table = _table_of(tokenizer)
    if table is not None:
        return table.bytes_of(token_id)
    if not 0 <= token_id < len(tokenizer):
        return b""
    token: str = tokenizer.convert_ids_to_tokens(token_id)
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if _SPACE_MARK in token:
        return token.replace(_SPACE_MARK, " ").encode()
    return str(tokenizer.decode([token_id], skip_special_tokens=False)).encode()


class _Pieces(Protocol):
    """Text of tokens in order, whole characters only."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteTable:
    """The bytes of each token of one tokenizer, looked up once.

    `decoder` is the decoder section of its tokenizer.json; raises ValueError if its tokens' bytes depend on
    their neighbours, or are not known here.
    """

    def __init__(self, backend: Any, decoder: dict[str, Any]) -> None:
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        self._is_byte_level = kinds == ["ByteLevel"]
        self._replacements: list[tuple[str, str]] = []
        self.num_stripped = 0
        if not self._is_byte_level:
            self._read_sentencepiece(steps, kinds)
        # The byte-fallback decoder writes one U+FFFD for each broken byte, the byte-level one for each
        # longest prefix of a character, as Python's does.
        self.errors = "replace" if self._is_byte_level else "ram-replace-each"
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._backend = backend
        self._bytes: dict[int, bytes] = {}

    def _read_sentencepiece(self, steps: list[dict[str, Any]], kinds: list[str]) -> None:
        """Accept replacements, byte fallback, fuse, and a strip of leading spaces, in this order."""
        if not re.fullmatch(r"(Replace )*ByteFallback Fuse (Strip )?", "".join(f"{kind} " for kind in kinds)):
            raise ValueError(f"unknown decoder {kinds}")
        for step in steps:
            if step["type"] == "Replace":
                self._replacements.append((step["pattern"]["String"], step["content"]))
            if step["type"] == "Strip":
                self.num_stripped = step["start"]
                if step["stop"] or step["content"] != " ":
                    raise ValueError(f"unknown strip {step}")

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; none for an unknown id, which decodes to nothing."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._is_byte_level:
            # A token with a character outside the byte alphabet is an added one, and means itself.
            is_in_alphabet = all(char in _BYTE_OF_CHAR for char in token)
            return bytes(_BYTE_OF_CHAR[char] for char in token) if is_in_alphabet else token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.encode()


class _BytePieces:
    """Tokens whose bytes are known: an incremental UTF-8 decoder does the rest."""

    def __init__(self, table: _ByteTable, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._table = table
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(table.errors)
        for token_id in prompt_ids[-_NUM_PROMPT_IDS:]:
            self._decoder.decode(self._bytes_of(token_id))
        is_first = not any(self._bytes_of(token_id) for token_id in prompt_ids)
        self._num_to_strip = table.num_stripped if is_first else 0

    def push(self, token_id: int) -> str:
        data = self._bytes_of(token_id)
        if self._num_to_strip and data:
            data = self._strip(data)
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._table.bytes_of(token_id)

    def _strip(self, data: bytes) -> bytes:
        """Drop the spaces that the tokenizer put before the text's first word."""
        num_spaces = min(len(data) - len(data.lstrip(b" ")), self._num_to_strip)
        self._num_to_strip = self._num_to_strip - num_spaces if num_spaces == len(data) else 0
        return data[num_spaces:]


class _WindowPieces:
    """Any tokenizer: decode the last tokens again with each new one, and tell what it added."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_ids[-_NUM_PROMPT_IDS:])
        self._num_told = len(self._window)
        self._told = self._decode()

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        new = self._news(text)
        is_whole = bool(new) and not text.endswith(REPLACEMENT)
        if not is_whole and len(self._window) - self._num_told < _MAX_PENDING:
            return ""
        # What was just told stays as the context of what comes; what came before it can go.
        self._window = self._window[self._num_told :]
        self._num_told = len(self._window)
        self._told = self._decode()
        return new

    def flush(self) -> str:
        return self._news(self._decode())

    def _news(self, text: str) -> str:
        if text.startswith(self._told):
            return text[len(self._told) :]
        # What ended inside a character, the prompt perhaps, has been completed.
        return text[len(self._told.rstrip(REPLACEMENT)) :]

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens))


class _StopGate:
    """Lets text through up to the first stop string; holds what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._matchers = [_StopMatcher(text) for text in stop]
        self._first_chars = frozenset(text[0] for text in stop)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        if self.is_stopped:
            return ""
        if not self._held and self._first_chars.isdisjoint(text):
            return text  # Nothing begins here: 5 µs a token become 1 with four stop strings.
        held = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            num_met = max(matcher.advance(char) for matcher in self._matchers)
            if num_met:
                self.is_stopped = True
                self._held = ""
                return held[: end - num_met]
        num_safe = len(held) - max(matcher.num_matched for matcher in self._matchers)
        self._held = held[num_safe:]
        return held[:num_safe]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _StopMatcher:
    """Knuth, Morris and Pratt's automaton: how much of the stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _fallback_of(stop)
        self.num_matched = 0

    def advance(self, char: str) -> int:
        """Take a character; return the stop string's length if it is complete, else 0."""
        self.num_matched = _extend(self._stop, self._fallback, self.num_matched, char)
        return len(self._stop) if self.num_matched == len(self._stop) else 0


@lru_cache(maxsize=64)
def _fallback_of(stop: str) -> Sequence[int]:
    """Of each n the longest proper beginning of the stop string that its first n characters end with.

    Kept, so that the many choices of a request with a long stop string do not each work it out.
    """
    fallback = [0, 0]
    for char in stop[1:]:
        fallback.append(_extend(stop, fallback, fallback[-1], char))
    return fallback


def _extend(stop: str, fallback: Sequence[int], num_matched: int, char: str) -> int:
    while num_matched and stop[num_matched] != char:
        num_matched = fallback[num_matched]
    return num_matched + 1 if stop[num_matched] == char else 0


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 means itself, the rest is from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHAR = _byte_of_char()
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, _ByteTable | None] = WeakKeyDictionary()


def _table_of(tokenizer: PreTrainedTokenizerBase) -> _ByteTable | None:
    """The tokenizer's table of bytes, made once; None if its decoder needs a token's neighbours."""
    if tokenizer not in _TABLES:
        _TABLES[tokenizer] = _make_table(tokenizer)
    return _TABLES[tokenizer]


def _make_table(tokenizer: PreTrainedTokenizerBase) -> _ByteTable | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return None
    try:
        return _ByteTable(backend, json.loads(decoder.__getstate__()))
    except (KeyError, TypeError, ValueError):
        return None


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("ram-replace-each", _replace_each)
