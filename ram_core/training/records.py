"""Training data as people have it: JSONL files and `datasets` sources. Never imports torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from ram_core.training.errors import DataError

Message = dict[str, str]
"""A chat message as chat templates read it: `role` and `content`."""

_ROLES = ("system", "user", "assistant", "tool", "developer")
_FORMS = "`messages`, `prompt` (and `completion`), or `chosen` and `rejected`"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt, the answer that is wanted and one that is not; "" where a record has none.

    `messages` end with the turn that is to be answered. `where` is the place that it was read from, for
    errors; it is no part of what the record is.
    """

    messages: tuple[Message, ...]
    wanted: str = ""
    rejected: str = ""
    where: str = dataclass_field(default="", compare=False)


def read_records(source: str, *, split: str = "train", max_records: int = 0) -> list[Record]:
    """The records of a JSONL file, or of a `datasets` source ("hf:NAME" or "hf:NAME:CONFIG").

    `split` is for `datasets` sources; `max_records` 0 reads all. Blank lines are passed over.

    Raises:
        DataError: there is nothing to read, or a line that is no record; file and line are named.
    """
    rows = _dataset_rows(source, split) if source.startswith("hf:") else _jsonl_rows(Path(source))
    wanted_rows = itertools.islice(rows, max_records or None)
    records = [record_of(row, where) for where, row in wanted_rows]
    if not records:
        raise DataError(f"`{source}` has no records")
    return records


def record_of(row: Any, where: str) -> Record:
    """The record that a row is, in any of the forms that people use; `where` is named in errors.

    `messages` is a conversation, its last answer wanted if it ends with one. `prompt` (a text, or messages)
    may come with a `completion`. Preferences are `chosen` and `rejected`: texts beside a `prompt`, or whole
    conversations that begin alike, also written out as "\\n\\nHuman: … \\n\\nAssistant: …".

    Raises:
        DataError: it has none of these forms, or holds something that is no text.
    """
    record = replace(_record_of(row, where), where=where)
    for text in (record.wanted, record.rejected, *(message["content"] for message in record.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise DataError(f"{where}: a text holds half of a character ({half}), which is no text") from None
    return record


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256, in hexadecimal, of what records say, in their order; where they were read is not in it."""
    digest = hashlib.sha256()
    for record in records:
        said = [record.messages, record.wanted, record.rejected]
        digest.update(json.dumps(said, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _record_of(row: Any, where: str) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a record must be an object, got {_named(row)}")
    if "chosen" in row or "rejected" in row:
        return _preference(row, where)
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where)
        if messages[-1]["role"] != "assistant":
            return Record(messages)
        return Record(_prompt_of(messages[:-1], where), _answer(messages[-1]["content"], "messages", where))
    if "prompt" in row:
        prompt = _prompt_of(_conversation(row["prompt"], "prompt", where), where)
        if row.get("completion") is None:
            return Record(prompt)
        return Record(prompt, _completion(row["completion"], "completion", where))
    raise DataError(f"{where}: a record needs {_FORMS}, got {sorted(map(str, row))}")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"`{path}`, line {number}", _parsed(line, path, number)
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}") from None


def _parsed(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{path}`, line {number}: not JSON: {error}") from None


def _dataset_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"`{source}` needs the package `datasets`: pip install 'ram-server[train]'") from None
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises whatever its many readers raise
        raise DataError(f"`{source}`, split `{split}`: {' '.join(str(error).split())}") from None
    return ((f"`{source}`, row {number}", row) for number, row in enumerate(table, 1))


def _preference(row: Mapping[str, Any], where: str) -> Record:
    for field in ("chosen", "rejected"):
        if field not in row:
            raise DataError(f"{where}: `chosen` and `rejected` must come together, `{field}` is missing")
    if row.get("prompt") is not None:
        prompt = _prompt_of(_conversation(row["prompt"], "prompt", where), where)
        return Record(prompt, *(_completion(row[field], field, where) for field in ("chosen", "rejected")))
    chosen, rejected = (_conversation(row[field], field, where) for field in ("chosen", "rejected"))
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: `{field}` without a `prompt` must end with an answer to one")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: `chosen` and `rejected` must answer the same prompt")
    return Record(
        _prompt_of(chosen[:-1], where),
        _answer(chosen[-1]["content"], "chosen", where),
        _answer(rejected[-1]["content"], "rejected", where),
    )


def _conversation(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Messages that are given as messages, as one user's text, or as a transcript."""
    if not isinstance(value, str):
        return _messages(value, field, where)
    opening, *turns = _TURN.split(value)
    if turns and not opening.strip():
        pairs = zip(turns[::2], turns[1::2], strict=True)
        messages = [{"role": _TURN_ROLES[name], "content": text.strip()} for name, text in pairs]
        # A prompt may end with the name of who speaks next.
        if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        return tuple(messages)
    if not value.strip():
        raise DataError(f"{where}: `{field}` is empty")
    return ({"role": "user", "content": value},)


def _completion(value: Any, field: str, where: str) -> str:
    """An answer that is given as a text, or as messages with an answer at the end."""
    if isinstance(value, str):
        return _answer(value, field, where)
    messages = _messages(value, field, where)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: `{field}` must end with an assistant's message")
    return _answer(messages[-1]["content"], field, where)


def _messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: `{field}` must be a list of messages, got {_named(value)}")
    return tuple(_message(message, f"{field}[{index}]", where) for index, message in enumerate(value))


def _message(value: Any, field: str, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: `{field}` must be a message, got {_named(value)}")
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        raise DataError(f"{where}: `{field}.role` must be one of {', '.join(_ROLES)}, got {_named(role)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: `{field}.content` must be a text, got {_named(content)}")
    return {"role": role, "content": content}


def _prompt_of(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: a prompt must end with a turn that is to be answered")
    return messages


def _answer(text: str, field: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the answer in `{field}` is empty")
    return text


def _named(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
