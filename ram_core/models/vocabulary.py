"""Tokenizers: loading them, and holding an aligner's vocabulary against the proposal's.

An aligner weighs the proposal's candidates by their ids, so the same id must be the same string, cut from
text in the same way. Never imports torch.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.models.source import one_line, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_OTHER_FILES = {"aligner.json", "config.json", "generation_config.json"}
# Sections of tokenizer.json that decide how text is cut, by what we call them.
_SECTIONS = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer"}
# For tokenizers without a tokenizer.json: they must cut this alike.
_SAMPLE = "  Naïve façade: 12345 e-mails, don't “quote” me…\n\tif x==1:\n\t\tÀ bientôt, 東京 🙂🏽 ﬁn"


# How many tokens each had, and its size then: none ever gives one up.
_sizes: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]] = WeakKeyDictionary()


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory, or of a hub id.

    Raises:
        CheckpointError: missing or broken files; the reason is one line.
    """
    from transformers import AutoTokenizer

    directory = resolve_source(source, with_weights=False)
    if not any((directory / name).exists() for name in _TOKENIZER_FILES) and not any(
        directory.glob("*.tiktoken")
    ):
        raise CheckpointError(f"`{source}` has no tokenizer (no tokenizer.json nor any other form of it)")
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:  # Whatever a broken file makes of the libraries below.
        reason = _broken_json(directory) or one_line(error)
        raise CheckpointError(f"`{source}`: cannot read its tokenizer: {reason}") from None


def is_same_tokenizer(one: str, other: str) -> bool:
    """Whether two sources have the same tokenizer files, byte by byte: then nothing needs to be compared."""
    places = [resolve_source(source, with_weights=False) for source in (one, other)]
    names = [{path.name for path in place.iterdir() if describes_tokens(path.name)} for place in places]
    if names[0] != names[1] or not names[0] & set(_TOKENIZER_FILES):
        return False
    return all(filecmp.cmp(places[0] / name, places[1] / name, shallow=False) for name in names[0])


def describes_tokens(file_name: str) -> bool:
    """Whether a tokenizer may be made of a file: not of weights, configs of models, and words for people."""
    is_other = file_name in _OTHER_FILES or file_name.startswith(("model", "adapter", "."))
    return file_name.endswith((".json", ".model", ".txt", ".tiktoken", ".py")) and not is_other


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id that a token has: ids from here on must not be sampled."""
    num_tokens, size = _sizes.get(tokenizer, (-1, 0))
    # Counting is quick; all tokens take ten milliseconds, in which nothing else of Python runs.
    if num_tokens != len(tokenizer):
        size = int(max(tokenizer.get_vocab().values())) + 1
        _sizes[tokenizer] = (len(tokenizer), size)
    return size


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, of the tokens in the order of their ids."""
    canonical = json.dumps(_tokens_by_id(tokenizer), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def shared_vocabulary_size(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, aligner_rows: Mapping[str, int]
) -> int:
    """Ids that can be drawn: those of the tokenizer for which the proposal has one of its `num_rows` logits.

    Some checkpoints name a token more than their model has logits for; it can never be drawn.

    Raises:
        VocabularyMismatch: an aligner has no logits for some of these ids.
    """
    size = min(vocabulary_size(tokenizer), num_rows)
    for name, rows in aligner_rows.items():
        if rows < size:
            raise VocabularyMismatch(
                f"aligner `{name}` has logits for {rows} tokens, the proposal for {size}"
            )
    return size


def check_same_vocabulary(
    proposal: PreTrainedTokenizerBase, aligner: PreTrainedTokenizerBase, *, aligner_name: str
) -> None:
    """Refuse an aligner whose tokenizer is not the proposal's.

    Raises:
        VocabularyMismatch: where they differ first: an id, a size, or how text is cut. Which tokens end a
            text is not compared: only the proposal's count.
    """
    difference = _token_difference(proposal, aligner) or _cutting_difference(proposal, aligner)
    if difference:
        raise VocabularyMismatch(f"aligner `{aligner_name}` cannot follow the proposal: {difference}")


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Each id's token, added ones included; None where an id has none."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
    # Should two tokens share an id, the order makes sure that it is always the same one that counts.
    for token in sorted(vocab):
        tokens[vocab[token]] = token
    return tokens


def _token_difference(proposal: PreTrainedTokenizerBase, aligner: PreTrainedTokenizerBase) -> str:
    ours, theirs = _tokens_by_id(proposal), _tokens_by_id(aligner)
    if ours == theirs:
        return ""
    pairs = zip_longest(ours, theirs)
    token_id, our_token, their_token = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
    if token_id < min(len(ours), len(theirs)):
        return f"token {token_id} is {_quoted(our_token)} in the proposal and {_quoted(their_token)} in it"
    return (
        f"the proposal has {len(ours)} tokens and it has {len(theirs)}; "
        f"the first that only one of them has is {token_id}, {_quoted(our_token or their_token)}"
    )


def _cutting_difference(proposal: PreTrainedTokenizerBase, aligner: PreTrainedTokenizerBase) -> str:
    """How the same text becomes other tokens, though the tokens are the same."""
    ours, theirs = _cutting_rules(proposal), _cutting_rules(aligner)
    if ours is None or theirs is None:
        same = proposal.encode(_SAMPLE) == aligner.encode(_SAMPLE)
        return "" if same else "the tokens are the same, but it cuts the same text into others"
    for name, rule in ours.items():
        if rule != theirs.get(name):
            return f"the tokens are the same, but its {name} differs, so that it cuts text into others"
    return ""


def _cutting_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """What tokenizer.json says of cutting text, by name, ready to be compared; None without such a file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    rules = {said: _canonical(described.get(section)) for section, said in _SECTIONS.items()}
    model = dict(described["model"])
    rules["list of merges"] = model.pop("merges", None)
    # A list holds scores too (Unigram); a mapping only says again which id a token has.
    scores = model.pop("vocab", None)
    rules["list of scores"] = scores if isinstance(scores, list) else None
    rules["model of tokens"] = model
    return rules


def _canonical(section: Any) -> Any:
    """The section without what makes no difference: wrappers of one step or none, and offsets."""
    if isinstance(section, list):
        return [_canonical(step) for step in section]
    if not isinstance(section, dict):
        return section
    for steps in ("normalizers", "pretokenizers"):
        if section.get("type") == "Sequence" and steps in section and len(section[steps]) <= 1:
            return _canonical(section[steps][0]) if section[steps] else None
    return {name: _canonical(value) for name, value in section.items() if name != "trim_offsets"}


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _broken_json(directory: Path) -> str:
    """Which JSON file of the directory cannot be read, and where; "" if all can."""
    for path in sorted(directory.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path.name} is broken ({one_line(error)})"
    return ""
