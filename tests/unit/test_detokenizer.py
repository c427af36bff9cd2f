"""Text comes out whole: against the tokenizer's own decode, and a brute-force search for stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ram_core.engine.detokenizer import REPLACEMENT, Detokenizer, token_bytes, token_text
from tests.models import make_tokenizer

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "▁a", "▁the", "é", "▁▁"]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@cache
def sentencepiece(num_stripped: int = 1) -> PreTrainedTokenizerFast:
    """The shape of Llama 2's tokenizer: words, byte fallback, and a first space that belongs to nobody."""
    vocab = {token: token_id for token_id, token in enumerate(["<s>", *BYTE_TOKENS, *WORDS])}
    core = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if num_stripped:
        steps.append(decoders.Strip(" ", num_stripped, 0))
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A decoder without a table of bytes: its window is decoded again with each token."""
    vocab = {token: token_id for token_id, token in enumerate(["<s>", *WORDS])}
    core = Tokenizer(models.BPE(vocab, [("▁", "a")]))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@cache
def slow() -> ByT5Tokenizer:
    return ByT5Tokenizer()


class Opaque:
    """The byte-level tokenizer as one of which nothing is known but what it decodes; counts its work."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def __len__(self) -> int:
        return len(byte_level())

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        self.num_decoded += len(ids)
        return byte_level().decode(ids, **options)


def pieces_of(detokenizer: Detokenizer, ids: Iterable[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def stream(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: object) -> str:
    return "".join(pieces_of(Detokenizer(tokenizer, **options), ids))


def ids_of_bytes(data: bytes) -> list[int]:
    """One token for each byte, of the byte-level tokenizer."""
    by_bytes = {token_bytes(byte_level(), token_id): token_id for token_id in range(len(byte_level()))}
    return [by_bytes[bytes([byte])] for byte in data]


def text_before_stop(text: str, stop: Sequence[str]) -> str:
    """Brute force: grow the text by one character until it ends with a stop string."""
    for end in range(len(text) + 1):
        met = [word for word in stop if text[:end].endswith(word)]
        if met:
            return text[: end - max(map(len, met))]
    return text


@given(st.lists(st.integers(0, 310), max_size=40), st.booleans())
def test_byte_level_pieces_are_the_tokenizers_own_text_whatever_the_tokens(ids, skip_special_tokens):
    whole = byte_level().decode(ids, skip_special_tokens=skip_special_tokens)
    assert stream(byte_level(), ids, skip_special_tokens=skip_special_tokens) == whole


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_unicode_text_comes_back_relative_to_its_prompt(prompt, text):
    tokenizer = byte_level()
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    pieces = pieces_of(Detokenizer(tokenizer, prompt_ids=prompt_ids), ids)
    assert "".join(pieces) == text
    assert all(piece.isprintable() or piece in text for piece in pieces)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_no_piece_holds_half_a_character_when_each_byte_is_a_token(text):
    detokenizer = Detokenizer(byte_level())
    shown = ""
    for byte_count, token_id in enumerate(ids_of_bytes(text.encode()), start=1):
        shown += detokenizer.push(token_id)
        assert shown == text.encode()[:byte_count].decode(errors="ignore")
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("num_stripped", [0, 1])
@given(
    prompt_ids=st.lists(st.sampled_from([0, *range(257, 264)]), max_size=4),
    ids=st.lists(st.one_of(st.integers(0, 128), st.integers(257, 264)), max_size=12),
)
def test_sentencepiece_spaces_are_those_of_the_whole_text(num_stripped, prompt_ids, ids):
    tokenizer = sentencepiece(num_stripped)
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    if num_stripped and all(token_id == 0 for token_id in prompt_ids):
        before = ""
    assert stream(tokenizer, ids, prompt_ids=prompt_ids) == whole[len(before) :]


@given(st.lists(st.one_of(st.sampled_from(["€", "é", "🙂"]), st.sampled_from(WORDS)), max_size=8))
def test_byte_fallback_tokens_become_characters(parts):
    tokenizer = sentencepiece()
    ids: list[int] = []
    for part in parts:
        ids += [257 + WORDS.index(part)] if part in WORDS else [1 + byte for byte in part.encode()]
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=lambda make: make.__name__)
def test_broken_bytes_become_the_replacement_characters_of_the_tokenizer(make):
    tokenizer = make()
    for data in (b"\xe2\x82", b"\xff", b"\xff\xfe\xfd", b"\xf0\x9f\x99", b"\xed\xa0\x80"):
        tail = [264 - 1] if make is sentencepiece else ids_of_bytes(b"a")
        ids = [1 + byte for byte in data] if make is sentencepiece else ids_of_bytes(data)
        assert stream(tokenizer, ids + tail) == tokenizer.decode(ids + tail)
        assert stream(tokenizer, ids) == tokenizer.decode(ids)


def test_bytes_that_are_never_text_are_told_as_they_come_and_not_held_for_ever():
    pieces = pieces_of(Detokenizer(byte_level()), ids_of_bytes(b"\xff" * 50))
    assert pieces == [REPLACEMENT] * 50 + [""]


def test_a_character_begun_by_the_prompt_is_finished_by_the_answer():
    prompt_ids = byte_level().encode("hello ") + ids_of_bytes(b"\xc3")
    pieces = pieces_of(Detokenizer(byte_level(), prompt_ids=prompt_ids), ids_of_bytes(b"\xa9!"))
    assert pieces == ["é", "!", ""]


def test_an_answer_cut_inside_a_character_ends_with_a_replacement_character():
    pieces = pieces_of(Detokenizer(byte_level()), ids_of_bytes("a🙂".encode()[:-1]))
    assert pieces == ["a", "", "", "", REPLACEMENT]


@given(st.lists(st.integers(0, 7), max_size=3), st.lists(st.integers(0, 7), max_size=12))
def test_a_decoder_that_needs_its_neighbours_is_followed_too(prompt_ids, ids):
    tokenizer = metaspace()
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    if not any(prompt_ids):
        before = ""
    assert stream(tokenizer, ids, prompt_ids=prompt_ids) == whole[len(before) :]


@given(st.text(max_size=20), st.text(max_size=20))
@example(REPLACEMENT, "a")
def test_a_slow_tokenizer_gives_back_any_text(prompt, text):
    tokenizer = slow()
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream(tokenizer, ids, prompt_ids=prompt_ids) == text


def test_a_slow_tokenizer_never_tells_half_a_character():
    ids = slow().encode("a🙂b", add_special_tokens=False)
    assert pieces_of(Detokenizer(slow()), ids) == ["a", "", "", "", "🙂", "b", ""]


@given(st.text(max_size=20), st.text(max_size=20))
@example(REPLACEMENT, REPLACEMENT)
def test_an_unknown_tokenizer_gives_back_any_text(prompt, text):
    detokenizer = Detokenizer(Opaque(), prompt_ids=byte_level().encode(prompt))
    shown = ""
    for byte_count, token_id in enumerate(ids_of_bytes(text.encode()), start=1):
        shown += detokenizer.push(token_id)
        whole = text.encode()[:byte_count].decode(errors="ignore")
        assert shown == (whole if not whole.endswith(REPLACEMENT) else shown)
    assert shown + detokenizer.flush() == text


def test_an_unknown_tokenizer_finishes_the_prompts_last_character_too():
    prompt_ids = byte_level().encode("hello ") + ids_of_bytes(b"\xc3")
    pieces = pieces_of(Detokenizer(Opaque(), prompt_ids=prompt_ids), ids_of_bytes(b"\xa9!"))
    assert pieces == ["é", "!", ""]


@pytest.mark.parametrize("data", [b"a", b"\xff"])
def test_an_unknown_tokenizer_does_bounded_work_for_each_token(data):
    tokenizer = Opaque()
    assert stream(tokenizer, ids_of_bytes(data * 500)) == (data * 500).decode(errors="replace")
    assert tokenizer.num_decoded < 500 * 40


@settings(max_examples=300)
@given(
    st.text("ab é", max_size=14),
    st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=4),
    st.data(),
)
def test_the_text_ends_before_the_first_complete_stop_string_however_it_is_cut(text, stop, data):
    tokenizer = byte_level()
    cut = data.draw(st.integers(0, len(text)))
    ids = tokenizer.encode(text[:cut]) + ids_of_bytes(text[cut:].encode())
    detokenizer = Detokenizer(tokenizer, stop=tuple(stop))
    expected = text_before_stop(text, stop)
    assert "".join(pieces_of(detokenizer, ids)) == expected
    assert detokenizer.is_stopped == (expected != text)


@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_text_is_held_only_while_it_may_begin_a_stop_string(text, stop):
    detokenizer = Detokenizer(byte_level(), stop=tuple(stop))
    shown = ""
    for count, token_id in enumerate(ids_of_bytes(text.encode()), start=1):
        shown += detokenizer.push(token_id)
        if detokenizer.is_stopped:
            break
        held = text[len(shown) : count]
        beginnings = {word[:size] for word in stop for size in range(len(word))}
        longest = max(
            (text[:count][-size:] for size in range(1, count + 1) if text[:count][-size:] in beginnings),
            key=len,
            default="",
        )
        assert held == longest


def test_nothing_is_told_after_a_stop_string():
    detokenizer = Detokenizer(byte_level(), stop=("b",))
    assert pieces_of(detokenizer, ids_of_bytes(b"abc")) == ["a", "", "", ""]
    assert detokenizer.is_stopped


def test_text_that_never_became_a_stop_string_is_flushed():
    detokenizer = Detokenizer(byte_level(), stop=("abc",))
    assert pieces_of(detokenizer, ids_of_bytes(b"ab")) == ["", "", "ab"]
    assert not detokenizer.is_stopped


def test_a_long_stop_string_of_one_letter_takes_linear_time():
    detokenizer = Detokenizer(byte_level(), stop=("a" * 20_000 + "b",))
    letter, other = ids_of_bytes(b"ac")
    for _ in range(20_000):
        detokenizer.push(letter)
    assert len(detokenizer.push(other)) == 20_001


def test_every_byte_has_a_token_whose_bytes_are_exact():
    assert {token_bytes(byte_level(), token_id) for token_id in ids_of_bytes(bytes(range(256)))} == {
        bytes([byte]) for byte in range(256)
    }
    assert token_bytes(sentencepiece(), 1 + 0xE2) == b"\xe2"


def test_a_token_keeps_its_leading_space_and_a_special_one_its_name():
    assert token_text(sentencepiece(), 257 + WORDS.index("▁the")) == " the"
    assert token_text(metaspace(), 1 + WORDS.index("▁the")) == " the"
    assert token_text(byte_level(), byte_level().eos_token_id) == "<|end|>"
    assert token_text(metaspace(), 0) == "<s>"


def test_half_a_character_reads_as_a_replacement_character():
    assert token_text(byte_level(), ids_of_bytes(b"\xe2")[0]) == REPLACEMENT


def test_an_id_that_no_token_has_is_empty():
    assert token_bytes(byte_level(), 10_000) == b""
    assert token_bytes(slow(), 10_000) == b""
    assert stream(byte_level(), [10_000, -1]) == ""
