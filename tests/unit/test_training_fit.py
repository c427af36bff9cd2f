"""What a fit leaves: a checkpoint that is served as it is, with LoRA or without, and an account of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.local import LocalEngine
from ram_core.errors import CheckpointError
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from ram_core.progress import ignore_progress
from ram_core.training.checkpoints import Starting, write_checkpoint
from ram_core.training.config import LoraConfig, TrainConfig, WarmupConfig
from ram_core.training.errors import ConfigError, DataError
from ram_core.training.examples import TrainingPair
from ram_core.training.fit import fit_model, warm_up_model
from tests.training import PAIRS, fit_config, log_prob, save_small, weights_of

HIDDEN, LAYERS, VOCAB = 32, 2, 300


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("start") / "model")


def greedy(proposal: Path, aligner: Path) -> tuple[int, ...]:
    """What the engine answers under an aligner."""
    engine = LocalEngine.load(
        EngineConfig(
            proposal=str(proposal),
            aligners=(AlignerSource("it", str(aligner)),),
            device="cpu",
            dtype="float32",
        )
    )
    (choice,) = engine.generate(
        [(10, 11, 12)],
        SamplingParams(temperature=0.0, max_tokens=12),
        AlignmentParams((AlignerTerm("it", 3.0),), proposal_top_p=1.0),
    )
    return choice.token_ids


def test_lora_merged_or_not_is_served_and_says_the_same(start, tmp_path):
    """The engine reads both; the adapter's weights are those that were merged."""
    done = {}
    for is_merged in (True, False):
        lora = LoraConfig(rank=4, alpha=16.0, is_merged=is_merged)
        config = fit_config(
            tmp_path / str(is_merged), start, lora=lora, objective="sft", max_steps=12, learning_rate=2e-2
        )
        fit_model(config, PAIRS, tmp_path / str(is_merged) / "fit", ignore_progress)
        done[is_merged] = tmp_path / str(is_merged) / "fit" / "model"
    assert sorted(path.name for path in done[False].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (done[True] / "adapter_config.json").exists()
    pair = PAIRS[0]
    assert log_prob(done[True], pair.prompt, pair.wanted) > log_prob(start, pair.prompt, pair.wanted) + 3
    proposal = save_small(tmp_path / "proposal", seed=9)
    merged, adapter, untrained = (greedy(proposal, each) for each in (done[True], done[False], start))
    assert merged == adapter != untrained


def test_lora_is_refused_where_it_could_not_be_served(start, tmp_path):
    config = fit_config(tmp_path, start, lora=LoraConfig(rank=65))
    with pytest.raises(ConfigError, match="above 64"):
        fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)
    config = fit_config(tmp_path, start, lora=LoraConfig(rank=2, targets=("nowhere",)))
    with pytest.raises(ConfigError, match="nowhere"):
        fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_left_as_it_came(dtype, tmp_path):
    """Its dtype, its config but for its version, its tokenizer byte by byte."""
    start = save_small(tmp_path / "start", dtype=dtype)
    config = fit_config(tmp_path, start, max_steps=2, objective="sft", activation_checkpointing=True)
    fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)
    done = tmp_path / "fit" / "model"
    with safe_open(done / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {dtype}  # noqa: SIM118
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (done, start))
    assert ours == theirs
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (done / name).read_bytes() == (start / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(done).dtype == dtype


def test_weights_that_were_gathered_make_the_same_checkpoint(start, tmp_path):
    """As from a model that lay apart on several devices, with and without LoRA."""
    for rank in (0, 4):
        starting = Starting(str(start), LoraConfig(rank=rank, is_merged=True), False, 0)
        model = starting.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.requires_grad
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        write_checkpoint(None, state, starting, tmp_path / f"gathered-{rank}")
        write_checkpoint(model, None, starting, tmp_path / f"whole-{rank}")
        gathered, whole = (weights_of(tmp_path / f"{name}-{rank}") for name in ("gathered", "whole"))
        assert gathered.keys() == whole.keys()
        assert all(torch.equal(gathered[name], whole[name]) for name in whole)
        assert not torch.equal(whole["lm_head.weight"], weights_of(start)["lm_head.weight"]) or rank


def test_a_finished_run_is_not_repeated(start, tmp_path):
    config = fit_config(tmp_path, start, max_steps=2)
    first = fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)
    weights = tmp_path / "fit" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    steps = []
    again = fit_model(config, PAIRS, tmp_path / "fit", steps.append)
    assert (again, steps, weights.stat().st_mtime_ns) == (first, [], written)


def test_the_account_is_that_of_what_was_computed(start, tmp_path):
    """Two rows a pair for Eq. 8, six operations for a parameter and token, the head on answers alone."""
    pairs = [TrainingPair((10, 11, 12), (20, 1), (30, 31, 32, 1))] * 4
    summary = fit_model(
        fit_config(tmp_path, start, batch_size=4, max_steps=3), pairs, tmp_path / "fit", ignore_progress
    )
    model = AutoModelForCausalLM.from_pretrained(start)
    head = model.lm_head.weight.numel()
    body = sum(each.numel() for each in model.parameters()) - 2 * head
    assert summary.flops == 3 * 6 * (body * 8 * 6 + head * 4 * (2 + 4))
    assert summary.steps == 3
    assert summary.cpu_seconds > 0
    assert summary.seconds > 0
    assert summary.metrics["step"] == 3


def test_what_the_proposal_says_is_in_the_account(start, tmp_path):
    pairs = [TrainingPair((10, 11, 12), (20, 1))] * 4
    costs = {}
    for objective in ("sft", "ram-token"):
        config = fit_config(
            tmp_path / objective, start, proposal=start, objective=objective, batch_size=4, max_steps=2
        )
        costs[objective] = fit_model(config, pairs, tmp_path / objective / "fit", ignore_progress).flops
    one_epoch_forwards = costs["sft"] / 2 / 3
    assert costs["ram-token"] == pytest.approx(costs["sft"] + one_epoch_forwards, rel=0.2)


def test_a_warm_up_counts_tokens_alike(start, tmp_path):
    """The mean over answer tokens; the result is the first of the later stages' proposals."""
    config = TrainConfig(
        output=str(tmp_path), warmup=WarmupConfig(model=str(start), batch_size=13, max_steps=1, log_steps=1)
    )
    summary = warm_up_model(config, PAIRS, tmp_path / "warmup", ignore_progress)
    total = sum(log_prob(start, pair.prompt, pair.wanted) for pair in PAIRS)
    tokens = sum(len(pair.wanted) for pair in PAIRS)
    assert summary.metrics["loss"] == pytest.approx(-total / tokens, rel=1e-4)
    later = fit_config(tmp_path, start, objective="ram-token", max_steps=1)
    assert (tmp_path / "warmup" / "model" / "config.json").is_file()
    assert later.proposal == ""
    with_warmup = TrainConfig(output=str(tmp_path), warmup=config.warmup, fit=later.fit)
    fit_model(with_warmup, PAIRS, tmp_path / "fit", ignore_progress)
    with pytest.raises(ConfigError, match="reads the proposal"):
        fit_model(later, PAIRS, tmp_path / "other", ignore_progress)


def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(start, tmp_path):
    directory = tmp_path / "fit"
    with pytest.raises(ConfigError, match=r"`fit\.model` must name"):
        fit_model(fit_config(tmp_path, Path()).__class__(output="o"), PAIRS, directory, ignore_progress)
    with pytest.raises(CheckpointError, match="no such directory"):
        fit_model(fit_config(tmp_path, tmp_path / "none"), PAIRS, directory, ignore_progress)
    bare = [TrainingPair(pair.prompt, pair.wanted) for pair in PAIRS[:3]] + PAIRS[3:]
    with pytest.raises(DataError, match="3 of 13 examples have no answer of the proposal's"):
        fit_model(fit_config(tmp_path, start), bare, directory, ignore_progress)
    long = [TrainingPair((10,) * 250, (20,) * 7, (20, 1))]
    with pytest.raises(ConfigError, match=r"has 257 tokens.*made for 256"):
        fit_model(fit_config(tmp_path, start), long, directory, ignore_progress)
    assert not directory.exists()
