"""An aligner follows only a proposal whose tokens are its own, cut from text in the same way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.models.vocabulary import (
    check_same_vocabulary,
    fingerprint,
    load_tokenizer,
    shared_vocabulary_size,
    vocabulary_size,
)
from tests.models import SENTENCES, make_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "aligner"
    make_tokenizer().save_pretrained(directory)
    return directory


def edited(directory: Path, edit: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    """Change a saved tokenizer.json, and load what it has become."""
    path = directory / "tokenizer.json"
    described = json.loads(path.read_text())
    edit(described)
    path.write_text(json.dumps(described))
    return load_tokenizer(str(directory))


def mismatch(aligner: PreTrainedTokenizerBase) -> str:
    with pytest.raises(VocabularyMismatch) as caught:
        check_same_vocabulary(make_tokenizer(), aligner, aligner_name="polite")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_tokenizer_is_the_one_that_was_saved(saved):
    tokenizer = load_tokenizer(str(saved))
    check_same_vocabulary(make_tokenizer(), tokenizer, aligner_name="polite")
    assert fingerprint(tokenizer) == fingerprint(make_tokenizer())


def test_the_lowest_id_that_differs_is_named_with_both_its_tokens():
    aligner = make_tokenizer(sentences=["another corpus, with other merges: zzz zzz zzz", *SENTENCES[3:]])
    ours, theirs = make_tokenizer(), aligner
    first = next(i for i in range(300) if ours.convert_ids_to_tokens(i) != theirs.convert_ids_to_tokens(i))
    said = mismatch(aligner)
    assert f"token {first} is {ours.convert_ids_to_tokens(first)!r} in the proposal" in said
    assert f"{theirs.convert_ids_to_tokens(first)!r} in it" in said
    assert "`polite`" in said


def test_a_longer_vocabulary_is_refused_by_its_size():
    said = mismatch(make_tokenizer(310))
    assert "the proposal has 300 tokens and it has 310" in said
    assert "is 300, " in said


def test_an_added_token_is_a_difference():
    aligner = make_tokenizer()
    aligner.add_tokens(["<think>"])
    assert "it has 301; the first that only one of them has is 300, '<think>'" in mismatch(aligner)


def test_another_end_of_text_is_no_difference():
    """A base model's tokenizer beside an instruct model's: the same ids and strings."""
    aligner = make_tokenizer()
    aligner.eos_token = "<|pad|>"
    check_same_vocabulary(make_tokenizer(), aligner, aligner_name="base")


def test_only_ids_with_logits_can_be_drawn():
    tokenizer = make_tokenizer()
    assert shared_vocabulary_size(tokenizer, 320, {"polite": 300}) == 300
    assert shared_vocabulary_size(tokenizer, 299, {"polite": 299}) == 299
    with pytest.raises(
        VocabularyMismatch, match="aligner `polite` has logits for 299 tokens, the proposal for 300"
    ):
        shared_vocabulary_size(tokenizer, 320, {"polite": 299})


def test_other_merges_of_the_same_tokens_are_refused(saved):
    aligner = edited(saved, lambda described: described["model"]["merges"].reverse())
    assert "its list of merges differs" in mismatch(aligner)


def test_another_normalizer_is_refused(saved):
    aligner = edited(saved, lambda described: described.update(normalizer={"type": "NFKC"}))
    assert "its normalizer differs" in mismatch(aligner)


def test_another_pre_tokenizer_is_refused(saved):
    aligner = edited(saved, lambda described: described["pre_tokenizer"].update(use_regex=False))
    assert "its pre-tokenizer differs" in mismatch(aligner)


def test_wrappers_and_offsets_that_change_no_token_are_no_difference(saved):
    def wrap(described: dict[str, Any]) -> None:
        inner = described["pre_tokenizer"] | {"trim_offsets": not described["pre_tokenizer"]["trim_offsets"]}
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}
        described["normalizer"] = {"type": "Sequence", "normalizers": []}

    check_same_vocabulary(make_tokenizer(), edited(saved, wrap), aligner_name="polite")


def test_tokenizers_without_a_tokenizer_json_are_held_against_a_sample():
    class Shouting(ByT5Tokenizer):
        def _tokenize(self, text: str) -> list[str]:
            return super()._tokenize(text.upper())

    check_same_vocabulary(ByT5Tokenizer(), ByT5Tokenizer(), aligner_name="bytes")
    with pytest.raises(VocabularyMismatch, match="it cuts the same text into others"):
        check_same_vocabulary(ByT5Tokenizer(), Shouting(), aligner_name="bytes")


def test_the_size_counts_up_to_the_highest_id():
    tokenizer = make_tokenizer()
    assert vocabulary_size(tokenizer) == 300
    tokenizer.add_tokens(["<think>"])
    assert vocabulary_size(tokenizer) == 301


def test_the_size_is_counted_once(monkeypatch):
    tokenizer = make_tokenizer()
    assert vocabulary_size(tokenizer) == 300
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: pytest.fail("counted again"))
    assert vocabulary_size(tokenizer) == 300


def test_fingerprints_tell_vocabularies_apart_and_stay():
    assert fingerprint(make_tokenizer()) == fingerprint(make_tokenizer())
    assert fingerprint(make_tokenizer()) != fingerprint(make_tokenizer(301))
    assert len(bytes.fromhex(fingerprint(make_tokenizer()))) == 32


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "tokenizer.json").write_text('{"model": '), "tokenizer.json is broken"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot read its tokenizer"),
        (lambda path: (path / "tokenizer_config.json").write_text("["), "tokenizer_config.json is broken"),
    ],
)
def test_a_broken_tokenizer_gives_one_line(saved, spoil, reason):
    spoil(saved)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(str(saved))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/place", "nowhere", "./org/name", "../up"])
def test_a_missing_directory_says_so(source):
    with pytest.raises(CheckpointError, match=f"`{source}`: no such directory"):
        load_tokenizer(source)


def test_a_hub_id_that_cannot_be_had_says_so_at_once(monkeypatch):
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("Name or service not known\n\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer("some-org/some-model")
    assert str(caught.value) == (
        "`some-org/some-model`: no such directory, and the model hub does not give it "
        "(Name or service not known)"
    )


def test_the_module_does_not_import_torch():
    code = "import sys, ram_core.models.vocabulary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
