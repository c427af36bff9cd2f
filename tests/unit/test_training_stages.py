"""Stages: done once, kept while their inputs are the same, resumed, refused when the inputs are others."""

import json
import shutil
from pathlib import Path

import pytest

from ram_core.aligners.manifest import read_manifest
from ram_core.aligners.verification import verify
from ram_core.errors import VocabularyMismatch
from ram_core.models.vocabulary import fingerprint, load_tokenizer
from ram_core.training.config import TrainConfig, read_config
from ram_core.training.errors import ConfigError, DataError, TrainingError
from ram_core.training.ledger import Ledger, only_run_in
from ram_core.training.stages import run_stages
from tests.models import make_tokenizer, save_pair

SETTINGS = {
    "data.max_prompt_tokens": 40,
    "data.max_tokens": 80,
    "synthesize.max_answer_tokens": 8,
    "synthesize.max_batch": 4,
    "synthesize.device": "cpu",
    "fit.batch_size": 4,
    "fit.max_steps": 2,
    "fit.learning_rate": 1e-3,
    "warmup.batch_size": 4,
    "warmup.max_steps": 2,
    "package.license": "apache-2.0",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A proposal, a model to become an aligner, and data: (proposal, model, file)."""
    directory = tmp_path_factory.mktemp("pair")
    proposal, saved = save_pair(directory, std=0.1)
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(8)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(proposal), str(saved["terse"]), str(directory / "data.jsonl")


@pytest.fixture
def config(pair, tmp_path):
    """A function that makes a config for this test's directory, with some fields set."""
    proposal, model, data = pair

    def make(**settings) -> TrainConfig:
        given = {
            "output": str(tmp_path / "run"),
            "proposal": proposal,
            "fit.model": model,
            "data.train": data,
        }
        named = {name.replace("__", "."): value for name, value in settings.items()}
        return read_config(None, list((given | SETTINGS | named).items()))

    return make


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """The directory of a run that is done, to be copied."""
    proposal, model, data = pair
    output = tmp_path_factory.mktemp("finished") / "run"
    given = {"output": str(output), "proposal": proposal, "fit.model": model, "data.train": data}
    report = run_stages(read_config(None, list((given | SETTINGS).items())))
    assert outcomes(report) == {"synthesize": "done", "fit": "done", "package": "done"}
    return output


@pytest.fixture
def done(finished, tmp_path):
    """A run that is done, in this test's directory."""
    return shutil.copytree(finished, tmp_path / "run")


def outcomes(report):
    return {stage.stage: stage.outcome for stage in report.stages}


def test_a_run_ends_with_an_aligner_that_says_where_it_comes_from(done, pair):
    proposal, _, _ = pair
    manifest = read_manifest(done / "aligner")
    assert verify(done / "aligner", proposal=load_tokenizer(proposal)).is_sound
    assert (manifest.name, manifest.license, manifest.strength) == ("run", "apache-2.0", 1.0)
    assert manifest.tokenizer == fingerprint(load_tokenizer(proposal))
    told = manifest.provenance
    assert (told["proposal"], told["objective"], told["data"]) == ("proposal", "ram", "data.jsonl")
    assert (told["fit.learning_rate"], told["fit.ascent_weight"], told["metrics.steps"]) == (
        "0.001",
        "0.0001",
        "2",
    )
    assert (told["data_records"], len(told["data_fingerprint"]), len(told["proposal_fingerprint"])) == (
        "8",
        64,
        64,
    )
    assert told["synthesize.temperature"] == "0.5"
    assert all(math_is_finite(value) for key, value in told.items() if key.startswith("metrics."))
    assert len((done / "synthesis.jsonl").read_text().splitlines()) == 8
    assert not list(done.glob("*.partial"))


def math_is_finite(text):
    return abs(float(text)) < float("inf")


def test_what_is_done_is_not_repeated(done, config):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name != ".lock"}
    report = run_stages(config(fit__save_steps=3, synthesize__max_batch=2))
    assert outcomes(report) == {"synthesize": "kept", "fit": "kept", "package": "kept"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (report.name, report.aligner) == ("run", done / "aligner")


def test_an_interrupted_stage_goes_on(config, finished, tmp_path):
    def stop(progress):
        if (progress.stage, progress.step) == ("synthesize", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(config(), on_progress=stop)
    assert outcomes(run_stages(config())) == {"synthesize": "resumed", "fit": "done", "package": "done"}
    answers = [(path / "synthesis.jsonl").read_bytes() for path in (finished, tmp_path / "run")]
    assert answers[0] == answers[1]


def test_other_inputs_are_refused_by_name_until_it_may_begin_anew(done, config):
    weights = done / "fit" / "model" / "model.safetensors"
    before = weights.read_bytes()
    other = config(fit__learning_rate=2e-3)
    with pytest.raises(TrainingError, match=r"`fit` .*learning_rate was 0.001 and is 0.002.*--restart"):
        run_stages(other)
    assert weights.read_bytes() == before
    assert outcomes(run_stages(other, restart=True)) == {
        "synthesize": "kept",
        "fit": "done",
        "package": "done",
    }
    assert weights.read_bytes() != before
    assert outcomes(run_stages(other)) == {"synthesize": "kept", "fit": "kept", "package": "kept"}


def test_other_data_is_noticed(done, config, pair, tmp_path):
    text = Path(pair[2]).read_text()
    (tmp_path / "data.jsonl").write_text(text.replace("It is 3.", "Three."))
    # The prompts are the same, so their answers are.
    with pytest.raises(TrainingError, match=r"`fit` .*data has changed"):
        run_stages(config(data__train=str(tmp_path / "data.jsonl")))
    (tmp_path / "data.jsonl").write_text(text.replace("What is 3?", "Is it 3?"))
    with pytest.raises(TrainingError, match=r"`synthesize` .*prompts has changed"):
        run_stages(config(data__train=str(tmp_path / "data.jsonl")))
    with pytest.raises(TrainingError, match=r"`synthesize` .*temperature was 0.5 and is 0.7"):
        run_stages(config(synthesize__temperature=0.7))


def test_a_named_stage_is_restarted_even_with_the_same_inputs(done, config):
    assert outcomes(run_stages(config(), ["synthesize"], restart=True)) == {"synthesize": "done"}
    # The same answers again: nothing that was made of them is stale.
    assert outcomes(run_stages(config(), ["fit", "package"])) == {"fit": "kept", "package": "kept"}


def test_an_aligner_is_packed_anew_when_it_is_to_say_something_else(done, config):
    wishes = {"strength": 1.5, "version": "2", "kl_threshold": 0.25, "candidates": 7}
    report = run_stages(config(**{f"package__{name}": value for name, value in wishes.items()}))
    assert outcomes(report) == {"synthesize": "kept", "fit": "kept", "package": "done"}
    manifest = read_manifest(done / "aligner")
    assert {name: getattr(manifest, name) for name in wishes} == wishes


def test_what_somebody_else_made_is_not_touched(config, tmp_path):
    (tmp_path / "run" / "fit").mkdir(parents=True)
    (tmp_path / "run" / "fit" / "thesis.txt").write_text("years of work")
    run_stages(config(), ["synthesize"])
    for restart in (False, True):
        for stages in ((), ("fit",)):
            with pytest.raises(TrainingError, match="not by this run"):
                run_stages(config(), stages, restart=restart)
    assert (tmp_path / "run" / "fit" / "thesis.txt").exists()


def test_a_stage_says_which_one_comes_first(config):
    with pytest.raises(TrainingError, match="--stage synthesize"):
        run_stages(config(), ["fit"])
    with pytest.raises(TrainingError, match="--stage fit"):
        run_stages(config(), ["package"])


def test_only_one_run_works_in_a_directory(config, tmp_path):
    with only_run_in(tmp_path / "run"), pytest.raises(TrainingError, match="another run"):
        run_stages(config())


def test_a_broken_record_is_named(done, config):
    (done / "stages" / "fit.json").write_text("{")
    with pytest.raises(TrainingError, match=r"fit\.json` is broken"):
        run_stages(config())


def test_another_vocabulary_is_refused_before_anything_is_done(config, pair, tmp_path):
    stranger = shutil.copytree(pair[1], tmp_path / "stranger")
    make_tokenizer(sentences=["quite other sentences than these"] * 3).save_pretrained(stranger)
    with pytest.raises(VocabularyMismatch, match="stranger` cannot follow"):
        run_stages(config(fit__model=str(stranger)))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data__train": ""}, "data.train"),
        ({"proposal": ""}, "`proposal`"),
        ({"fit__model": ""}, "fit.model"),
        ({"fit__lora": {"rank": 65}}, "fit.lora.rank"),
    ],
)
def test_what_is_not_named_is_asked_for(config, settings, named):
    with pytest.raises(ConfigError, match=named):
        run_stages(config(**settings))


def test_a_directory_without_a_fit_name_needs_a_name(config, tmp_path):
    with pytest.raises(ConfigError, match=r"`package\.name`"):
        run_stages(config(output=str(tmp_path / "-run")))


def test_a_record_without_an_answer_is_named_where_one_is_learnt(config, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n{"prompt": "Who?"}\n')
    prompts = config(data__train=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(DataError, match=r"prompts\.jsonl`, line 2"):
        run_stages(prompts)
    assert outcomes(run_stages(prompts, ["synthesize"])) == {"synthesize": "done"}


def test_the_limits_are_those_of_the_models(config):
    report = run_stages(config(data__max_tokens=2048, data__max_prompt_tokens=1024), ["synthesize"])
    assert "256 tokens" in report.notes[1]


@pytest.mark.parametrize("objective", ["sft", "ram-token"])
def test_some_objectives_need_no_answers_of_the_proposal(config, tmp_path, objective):
    report = run_stages(config(fit__objective=objective))
    assert outcomes(report) == {"fit": "done", "package": "done"}
    assert not (tmp_path / "run" / "synthesis.jsonl").exists()
    told = read_manifest(report.aligner).provenance
    assert ("fit.strength" in told) == (objective == "ram-token")


# PEFT's own use of what transformers will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_rejected_answers_and_an_adapter_need_neither_engine_nor_another_model(config, pair, tmp_path):
    rows = [{"prompt": f"What is {at}?", "chosen": f"It is {at}.", "rejected": "No."} for at in range(8)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferences = config(
        data__train=str(tmp_path / "preferences.jsonl"),
        synthesize__from_rejected=True,
        fit__objective="ram-dpo",
        fit__lora={"rank": 2},
    )
    report = run_stages(preferences)
    assert outcomes(report) == {"synthesize": "done", "fit": "done", "package": "done"}
    assert report.stages[0].summary["num_sampled"] == 0
    adapter = json.loads((report.aligner / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(Path(pair[1]).resolve())
    assert verify(report.aligner, proposal=load_tokenizer(pair[0])).is_sound
    told = read_manifest(report.aligner).provenance
    assert (told["fit.lora.rank"], told["synthesize.from_rejected"]) == ("2", "true")


def test_a_warmed_up_proposal_is_that_of_all_later_stages(config, pair, tmp_path):
    warm = config(proposal="", warmup__model=pair[0])
    with pytest.raises(TrainingError, match="--stage warmup"):
        run_stages(warm, ["synthesize"])
    report = run_stages(warm, install_into=tmp_path / "aligners")
    assert outcomes(report) == dict.fromkeys(("warmup", "synthesize", "fit", "package"), "done")
    assert report.proposal == str(tmp_path / "run" / "warmup" / "model")
    record = Ledger(tmp_path / "run" / "stages").read("synthesize")
    told = read_manifest(report.installed).provenance
    assert told["proposal_fingerprint"] == record.inputs["proposal"]
    assert told["proposal"] == "proposal, warmed up"
    assert report.installed == tmp_path / "aligners" / "run" / report.version
    assert set(outcomes(run_stages(warm)).values()) == {"kept"}
