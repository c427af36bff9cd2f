"""Answers that grow by lines: interrupted, resumed and repaired, they are those of one whole run."""

import errno
import json

import msgspec
import pytest

from ram_core.progress import ignore_progress
from ram_core.training import synthesis
from ram_core.training.config import DataConfig, SynthesizeConfig, TrainConfig
from ram_core.training.encoding import encode_records
from ram_core.training.errors import DataError
from ram_core.training.records import Record, read_records
from ram_core.training.synthesis import REJECTED, read_answers, synthesize
from tests.models import make_tokenizer, save_model

# The last two are the same: noise is each prompt's own, not its text's.
QUESTIONS = [f"What is {number} and {number}?" for number in (*range(11), 10)]
CONFIG = TrainConfig(
    output="",
    seed=3,
    data=DataConfig(max_prompt_tokens=60, max_tokens=120),
    synthesize=SynthesizeConfig(temperature=1.0, max_answer_tokens=24, max_batch=4, device="cpu"),
)


@pytest.fixture(scope="module")
def proposal(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("proposal"), "llama"))


@pytest.fixture(scope="module")
def encoded():
    records = [Record(({"role": "user", "content": text},), "So.") for text in QUESTIONS]
    return encode_records(records, make_tokenizer(), CONFIG.data)


@pytest.fixture(scope="module")
def whole(proposal, encoded, tmp_path_factory):
    """The file of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "synthesis.jsonl"
    synthesize(CONFIG, proposal, encoded, path, ignore_progress)
    return path.read_bytes()


class StopAt:
    """A progress callback that interrupts the run when so many answers are there."""

    def __init__(self, step):
        self.step = step

    def __call__(self, progress):
        if progress.step == self.step:
            raise KeyboardInterrupt


def test_each_prompt_has_an_answer_and_each_line_is_a_record(whole, encoded, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole)
    answers = read_answers(path)
    assert list(answers) == list(range(len(QUESTIONS)))
    tokenizer = make_tokenizer()
    for index, answer in answers.items():
        assert answer.prompt == encoded.records[index].messages
        assert answer.completion == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        is_ended = answer.token_ids[-1] == tokenizer.eos_token_id
        assert (answer.finish_reason == "stop") == is_ended
        assert is_ended or len(answer.token_ids) == 24
    assert len({answer.token_ids for answer in answers.values()}) == len(answers)
    assert [record.messages for record in read_records(str(path))] == [
        record.messages for record in encoded.records
    ]


def test_a_run_that_was_interrupted_ends_with_the_answers_of_one_that_was_not(
    proposal, encoded, whole, tmp_path
):
    path = tmp_path / "synthesis.jsonl"
    for step in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            synthesize(CONFIG, proposal, encoded, path, StopAt(step))
        assert len(read_answers(path)) == step
        # The process was killed while it wrote a line.
        path.write_bytes(path.read_bytes() + b'{"index":11,"prompt":[{"ro')
    summary = synthesize(CONFIG, proposal, encoded, path, ignore_progress)
    assert (summary.num_answers, summary.num_sampled) == (12, 4)
    assert path.read_bytes() == whole


def test_another_seed_gives_other_answers(proposal, encoded, whole, tmp_path):
    path = tmp_path / "synthesis.jsonl"
    synthesize(msgspec.structs.replace(CONFIG, seed=4), proposal, encoded, path, ignore_progress)
    assert path.read_bytes() != whole


def test_blocks_make_no_difference(proposal, encoded, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "_BLOCK_BATCHES", 1)
    path = tmp_path / "synthesis.jsonl"
    synthesize(CONFIG, proposal, encoded, path, ignore_progress)
    assert path.read_bytes() == whole


def test_a_finished_file_is_kept_without_an_engine(encoded, whole, tmp_path):
    path = tmp_path / "synthesis.jsonl"
    path.write_bytes(whole)
    summary = synthesize(CONFIG, "no such proposal", encoded, path, ignore_progress)
    assert (summary.num_answers, summary.num_sampled) == (12, 0)


def test_a_full_disk_loses_nothing_that_was_whole(proposal, encoded, whole, tmp_path, monkeypatch):
    path = tmp_path / "synthesis.jsonl"
    write = synthesis._Writer._write

    def fill(self, index, *rest):
        if len(self._done) == 5:
            self._file.write(b'{"index":')
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(self, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(synthesis._Writer, "_write", fill)
        with pytest.raises(OSError, match="No space left"):
            synthesize(CONFIG, proposal, encoded, path, ignore_progress)
    assert synthesize(CONFIG, proposal, encoded, path, ignore_progress).num_sampled == 7
    assert path.read_bytes() == whole


def test_rejected_answers_stand_in_and_the_others_are_sampled(proposal, whole, tmp_path):
    records = [
        Record(({"role": "user", "content": text},), "So.", "No." if at % 2 else "")
        for at, text in enumerate(QUESTIONS)
    ]
    config = msgspec.structs.replace(
        CONFIG, synthesize=msgspec.structs.replace(CONFIG.synthesize, from_rejected=True)
    )
    tokenizer = make_tokenizer()
    encoded = encode_records(records, tokenizer, config.data)
    path = tmp_path / "synthesis.jsonl"
    summary = synthesize(config, proposal, encoded, path, ignore_progress)
    assert summary.num_sampled == 6
    lines = whole.splitlines()
    for index, line in enumerate(path.read_bytes().splitlines()):
        answer = read_answers(path)[index]
        if index % 2:
            assert (answer.completion, answer.finish_reason) == ("No.", REJECTED)
            assert answer.token_ids == (*tokenizer.encode("No."), tokenizer.eos_token_id)
        else:
            assert line == lines[index]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{}\n", "line 2"),
        (b'{"index": 1}\n', "line 2"),
        (b"\xff\n", "line 2"),
    ],
)
def test_a_line_that_is_no_answer_is_named(whole, tmp_path, line, named):
    path = tmp_path / "synthesis.jsonl"
    path.write_bytes(whole.splitlines(keepends=True)[0] + line)
    with pytest.raises(DataError, match=named):
        read_answers(path)


def test_two_answers_to_a_prompt_or_one_to_none_are_refused(proposal, encoded, whole, tmp_path):
    path = tmp_path / "synthesis.jsonl"
    first = whole.splitlines(keepends=True)[0]
    path.write_bytes(first * 2)
    with pytest.raises(DataError, match="second answer to prompt 0"):
        read_answers(path)
    path.write_bytes(json.dumps(json.loads(first) | {"index": 12}).encode() + b"\n")
    with pytest.raises(DataError, match="prompt 12"):
        synthesize(CONFIG, proposal, encoded, path, ignore_progress)
