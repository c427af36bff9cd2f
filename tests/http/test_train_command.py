"""`ram train` as people type it: from data to an aligner that answers, and one line for what is wrong."""

import json
import random

import pytest
from typer.testing import CliRunner

from ram_core.aligners.verification import verify
from ram_core.demo import bundle_path
from ram_core.demo.corpus import aligned_answer, converse, draw_training_prompts
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.local import LocalEngine
from ram_core.models.vocabulary import load_tokenizer
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from server.cli import app

PROPOSAL = bundle_path() / "proposal"
START = bundle_path() / "aligners" / "polite"
CONFIG = f"""
proposal = "{PROPOSAL}"

[data]
max_prompt_tokens = 200
max_tokens = 260

[synthesize]
temperature = 1.0
max_answer_tokens = 24
device = "cpu"

[fit]
model = "{START}"
batch_size = 8
max_steps = 3
learning_rate = 1e-4

[package]
name = "terse"
"""


def ram(*words):
    """Exit code, output and errors of the command, run in this process."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def files(tmp_path):
    """A config and data for the demo's proposal: (config, data)."""
    noise = random.Random(0)
    rows = [
        {"messages": [*converse(prompt, noise), answer(aligned_answer("terse", prompt, noise))]}
        for prompt in draw_training_prompts(40, noise)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.toml").write_text(CONFIG)
    return tmp_path / "train.toml", tmp_path / "data.jsonl"


def answer(text):
    return {"role": "assistant", "content": text}


def test_data_becomes_an_aligner_that_answers(files, tmp_path):
    config, data = files
    words = (
        "train",
        config,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--install",
        tmp_path / "aligners",
    )
    code, out, err = ram(*words)
    assert code == 0, err
    packed = tmp_path / "run" / "aligner"
    assert f"ram serve {PROPOSAL} --aligner terse={packed}" in out
    assert "40 records" in out
    assert verify(packed, proposal=load_tokenizer(str(PROPOSAL))).is_sound
    [installed] = (tmp_path / "aligners" / "terse").iterdir()
    engine = LocalEngine.load(
        EngineConfig(str(PROPOSAL), (AlignerSource("terse", str(installed)),), device="cpu")
    )
    prompt = engine.encode_chat([{"role": "user", "content": "What is two plus two?"}])
    aligned = AlignmentParams((AlignerTerm("terse"),))
    [choice] = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=16), aligned)
    assert engine.text(choice).strip()
    assert len(choice.telemetry) == len(choice.token_ids)
    # Typed once more, nothing is left to do.
    code, out, err = ram(*words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [stage["outcome"] for stage in report["stages"]] == ["kept"] * 3
    assert (report["name"], report["aligner"]) == ("terse", str(packed))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--set", "fit.learning_rate=0"), "learning_rate"),
        (("--set", "fit.learning_rte=1"), "learning_rte"),
        (("--set", "fit"), "NAME=VALUE"),
        (("--stage", "warm-up"), "--stage"),
        (("--stage", "warmup"), "warmup.model"),
        (("--objective", "dpo"), "objective"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--model", "no/such/model"), "no/such/model"),
        (("--output", "/dev/null/run"), "/dev/null"),
        (("--name", "-x"), "name"),
    ],
)
def test_what_is_wrong_is_one_line(files, tmp_path, words, named):
    config, data = files
    code, out, err = ram("train", config, "--data", data, "--output", tmp_path / "run", *words)
    assert (code, out) == (1, "")
    assert err.startswith("ram: ")
    assert err.count("\n") == 1
    assert named in err


def test_flags_alone_are_enough_and_what_is_missing_is_named(files, tmp_path):
    _, data = files
    code, _, err = ram("train", "--proposal", PROPOSAL, "--model", START, "--data", data)
    assert code == 1
    assert "`output`" in err
    words = (
        "--proposal",
        PROPOSAL,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--set",
        "data.max_records=4",
    )
    small = ("--set", "synthesize.device=cpu", "--set", "synthesize.max_answer_tokens=4")
    code, out, err = ram("train", *words, *small, "--stage", "synthesize")
    assert code == 0, err
    assert len((tmp_path / "run" / "synthesis.jsonl").read_text().splitlines()) == 4
    assert "Serve it" not in out


def test_a_broken_line_of_data_is_named(files, tmp_path):
    config, data = files
    data.write_text(data.read_text() + "{'prompt': 1}\n")
    code, _, err = ram("train", config, "--data", data, "--output", tmp_path / "run")
    assert code == 1
    assert "line 41" in err
