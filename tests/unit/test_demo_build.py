"""Building the bundle at toy size: every stage runs, progress is told, what comes out loads."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer

from ram_core.demo import ALIGNERS
from ram_core.demo.build import BuildPlan, ModelShape, build_bundle
from ram_core.demo.evaluate import evaluate_bundle
from ram_core.progress import Progress, terminal_progress
from ram_core.training.config import FitConfig, WarmupConfig
from ram_core.training.errors import RunawayAscentError

TOY_WARMUP = WarmupConfig(max_steps=2, batch_size=4, optimizer="muon", learning_rate=1e-3)
TOY_FIT = FitConfig(max_steps=2, batch_size=4, learning_rate=1e-3)
TOY = BuildPlan(
    vocab_size=320,
    proposal=ModelShape(32, 1, 2, 1, 16, 32),
    aligner=ModelShape(16, 1, 2, 1, 8, 16),
    num_conversations=40,
    num_aligner_prompts=12,
    proposal_training=TOY_WARMUP,
    base_training=TOY_WARMUP,
    aligner_training=TOY_FIT,
)


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory):
    """A built toy bundle and what was told meanwhile."""
    path, told = tmp_path_factory.mktemp("bundle"), []
    build_bundle(path, seed=0, plan=TOY, on_progress=told.append)
    return path, told


def test_a_build_leaves_directories_that_transformers_loads(toy_bundle):
    path, _ = toy_bundle
    for directory in (
        path / "proposal",
        path / "aligner-base",
        *(path / "aligners" / name for name in ALIGNERS),
    ):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == len(tokenizer)


def test_a_build_tells_every_stage_to_its_end(toy_bundle):
    _, told = toy_bundle
    last = {progress.stage: progress for progress in told}
    warmups = {"proposal-1: warm-up", "proposal-2: warm-up", "aligner-base: warm-up"}
    assert {"tokenizer"} | warmups | {f"{name}: fit" for name in ALIGNERS} <= set(last)
    assert all(progress.step == progress.steps for progress in last.values())
    assert "loss" in last["polite: fit"].note


def test_the_aligners_differ(toy_bundle):
    path, _ = toy_bundle
    weights = {(path / "aligners" / name / "model.safetensors").read_bytes() for name in ALIGNERS}
    assert len(weights) == len(ALIGNERS)


def test_a_rebuild_gives_the_same_weights_whichever_aligners_are_trained(toy_bundle, tmp_path, monkeypatch):
    path, _ = toy_bundle
    monkeypatch.setattr("ram_core.demo.build.ALIGNERS", ("pirate",))
    weights = "aligners/pirate/model.safetensors"
    (tmp_path / "aligners" / "gone").mkdir(parents=True)
    build_bundle(tmp_path, seed=0, plan=TOY)
    assert (tmp_path / weights).read_bytes() == (path / weights).read_bytes()
    assert not (tmp_path / "aligners" / "gone").exists()


def test_a_build_refuses_to_overwrite_anything_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        build_bundle(tmp_path, plan=TOY)


def test_a_failed_build_leaves_no_bundle(tmp_path):
    hopeless = replace(TOY, aligner_training=structs.replace(TOY_FIT, max_ascent_nats=1e-3))
    with pytest.raises(RunawayAscentError):
        build_bundle(tmp_path, plan=hopeless)
    assert not list(tmp_path.iterdir())


def test_a_bad_bundle_fails_its_bars(toy_bundle):
    path, _ = toy_bundle
    report = evaluate_bundle(path, max_prompts=20)
    assert report.failures()
    assert "| terse |" in report.render()


def test_progress_shows_on_a_terminal(capsys):
    with terminal_progress() as on_progress:
        on_progress(Progress("proposal", 1, 2, "loss 1.234"))
        on_progress(Progress("proposal", 2, 2, "loss 0.987"))
    assert "proposal" in capsys.readouterr().err


def test_importing_the_demo_is_cheap():
    code = "import sys, ram_core.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
