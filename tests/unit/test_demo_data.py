"""The demo's data as files: readable as training data, the same every time, honest about what is held out."""

import pytest

from ram_core.demo import ALIGNERS, bundle_path
from ram_core.demo.data import write_aligner_data, write_corpus, write_demo_data, write_held_out_data
from ram_core.demo.prompts import held_out_prompts
from ram_core.demo.styles import follows
from ram_core.training.records import read_records


def written(path, write, *arguments, seed=0):
    write(path, *arguments, seed=seed)
    return read_records(str(path))


def test_an_aligners_records_want_its_style(tmp_path):
    for name in sorted(set(ALIGNERS) - {"safe"}):
        records = written(tmp_path / name, write_aligner_data, name, 50)
        assert len(records) == 50
        assert all(follows(name, record.wanted) for record in records)


def test_styles_share_their_prompts_and_refusals_have_their_own(tmp_path):
    prompts = {
        name: [record.messages for record in written(tmp_path / name, write_aligner_data, name, 30)]
        for name in ALIGNERS
    }
    assert prompts["pirate"] == prompts["json"]
    assert prompts["pirate"] != prompts["safe"]


def test_a_seed_draws_the_same_again(tmp_path):
    one, again, other = (
        written(tmp_path / "data", write_aligner_data, "polite", 30, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_held_out_records_are_held_out(tmp_path):
    texts = {prompt.text for prompt in held_out_prompts()}
    records = written(tmp_path / "data", write_held_out_data, "terse", 60)
    assert {record.messages[-1]["content"] for record in records} <= texts
    corpus = written(tmp_path / "corpus", write_corpus, 200)
    assert all(record.wanted for record in corpus)


@pytest.mark.skipif(not (bundle_path() / "aligner-base").is_dir(), reason="the demo is not built here")
def test_all_of_it_lies_in_one_directory(tmp_path):
    write_demo_data(tmp_path, num_prompts=5, max_held_out=20, seed=0)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"proposal", "aligner-base", "safe.train.jsonl", "safe.held-out.jsonl"} <= names
