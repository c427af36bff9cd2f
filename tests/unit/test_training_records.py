"""Data in every form that people have it, and errors that name file and line."""

import json

import pytest

from ram_core.training.errors import DataError
from ram_core.training.records import Record, fingerprint, read_records, record_of

QUESTION = ({"role": "user", "content": "Why?"},)


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"messages": turns("Why?")}, Record(QUESTION)),
        ({"messages": turns("Why?", "So.")}, Record(QUESTION, "So.")),
        ({"messages": turns("A", "B", "C", "D")}, Record(tuple(turns("A", "B", "C")), "D")),
        ({"prompt": "Why?"}, Record(QUESTION)),
        ({"prompt": "Why?", "completion": "So."}, Record(QUESTION, "So.")),
        ({"prompt": turns("Why?"), "completion": turns("", "So.")[1:]}, Record(QUESTION, "So.")),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, Record(QUESTION, "So.", "No.")),
        ({"chosen": turns("Why?", "So."), "rejected": turns("Why?", "No.")}, Record(QUESTION, "So.", "No.")),
        (
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
            },
            Record(QUESTION, "So.", "No."),
        ),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "So.", "rejected": "No."},
         Record(QUESTION, "So.", "No.")),
    ],
)  # fmt: skip
def test_every_form_of_a_record_is_understood(row, record):
    assert record_of(row, "here") == record


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([], "object"),
        ({}, "messages"),
        ({"text": "x"}, "text"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": turns("Why?", " ")}, "empty"),
        ({"messages": turns("", "So.")[1:]}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "Why?", "completion": ""}, "completion"),
        ({"prompt": "Why?", "completion": turns("x")}, "completion"),
        ({"prompt": "Why?", "chosen": "So."}, "rejected"),
        ({"chosen": "So.", "rejected": "No."}, "chosen"),
        ({"chosen": turns("A", "B"), "rejected": turns("C", "B")}, "same prompt"),
    ],
)
def test_what_is_no_record_is_refused_and_told_where(row, named):
    with pytest.raises(DataError, match="here") as caught:
        record_of(row, "here")
    assert named in str(caught.value)


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Why?"}\n\n{"prompt": "Who?", "completion": "Me."}\n')
    assert [record.wanted for record in read_records(str(path))] == ["", "Me."]
    assert len(read_records(str(path), max_records=1)) == 1


@pytest.mark.parametrize("line", ['{"prompt": ', "[" * 100_000, '"\\ud800', "\xff"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "Why?"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"data\.jsonl`, line 3"):
        read_records(str(path))


def test_no_records_and_no_file_are_errors(tmp_path):
    path = tmp_path / "data.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        read_records(str(path))
    path.write_text("\n")
    with pytest.raises(DataError, match="no records"):
        read_records(str(path))


def test_a_datasets_source_is_read_with_its_own_library(tmp_path, monkeypatch):
    """A local directory is loaded by the very code that loads a name from the hub."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "named"
    home.mkdir()
    (home / "train.jsonl").write_text(json.dumps({"messages": turns("Why?", "So.")}) + "\n")
    assert read_records(f"hf:{home}") == [Record(QUESTION, "So.")]
    with pytest.raises(DataError, match="split `test`"):
        read_records(f"hf:{home}", split="test")


def test_half_a_character_is_refused_by_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Why?", "completion": "So."}\n{"prompt": "Why?", "completion": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"line 2: .*U\+D83D"):
        read_records(str(path))


def test_a_record_knows_its_line_and_the_fingerprint_does_not(tmp_path):
    lines = ['{"prompt": "Why?", "completion": "So."}\n', '{"prompt": "Who?", "completion": "Me."}\n']
    for name, text in (("one", "".join(lines)), ("two", "\n".join(lines)), ("other", "".join(lines[::-1]))):
        (tmp_path / name).write_text(text)
    one, two, other = (read_records(str(tmp_path / name)) for name in ("one", "two", "other"))
    assert [record.where.rpartition(", ")[2] for record in two] == ["line 1", "line 3"]
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)
    said = [Record(QUESTION), Record(QUESTION, "So."), Record(QUESTION, "", "So."), Record(QUESTION * 2)]
    assert len({fingerprint([record]) for record in said}) == len(said)
