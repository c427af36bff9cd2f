"""The demo's tokenizer: any text survives it, and a conversation reads as it was trained."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ram_core.demo.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved and loaded, as it is served."""
    path = tmp_path_factory.mktemp("tokenizer")
    texts = ["What is the capital of France?", "The capital of France is Paris.", "1024"] * 20
    train_tokenizer(texts, vocab_size=320, max_length=64).save_pretrained(path, save_jinja_files=False)
    return AutoTokenizer.from_pretrained(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("text", ["héllo 😀 世界", " leading", "tab\tand\nline", "It is , odd !", "👩‍👩‍👧"])
def test_known_troublemakers_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.decode(i) for i in tokenizer.encode("1024", add_special_tokens=False)] == list("1024")


def test_a_conversation_reads_as_turns_that_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|system|>Be brief.<|eos|><|user|>Hi<|eos|>"
        "<|assistant|>Hello.<|eos|><|user|>Bye<|eos|><|assistant|>"
    )


def test_an_unknown_role_is_refused_by_name(tokenizer):
    with pytest.raises(jinja2.TemplateError, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
