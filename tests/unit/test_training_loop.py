"""The loop: its updates are those of the definition, however they are cut up, stopped and gone on with."""

import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from ram_core.progress import ignore_progress
from ram_core.training.batches import BatchPlan, Sharing, like_lengths
from ram_core.training.config import LoopConfig
from ram_core.training.errors import ConfigError, DataError, DivergedError, RunawayAscentError
from ram_core.training.examples import Example, collate
from ram_core.training.fit import fit_model
from ram_core.training.optimizers import MuonAndAdamW, rate_factor
from tests.training import (
    PAIRS,
    VOCAB,
    fit_config,
    log_prob,
    log_probs_alone,
    save_small,
    weights_of,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def proposal(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("proposal") / "model", seed=5)


def fitted(directory, start, pairs=PAIRS, on_progress=ignore_progress, **options):
    config = fit_config(directory, start, **options)
    fit_model(config, pairs, directory / "fit", on_progress)
    return directory / "fit" / "model"


def lines_of(directory):
    return [json.loads(line) for line in (directory / "fit" / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one, other, tolerance=0.0):
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


def product_loss(start, proposal, strength):
    """The token objective's definition over all pairs, one after another and with the whole of p."""
    total = tokens = 0
    for pair in PAIRS:
        log_q, log_p = (log_probs_alone(each, pair.prompt, pair.wanted) for each in (start, proposal))
        aligned = (log_p + strength * log_q).log_softmax(-1)
        total -= aligned.gather(-1, torch.tensor(pair.wanted)[:, None]).sum().item()
        tokens += len(pair.wanted)
    return total / tokens


@pytest.mark.parametrize("objective", ["sft", "ram", "ram-dpo", "ram-token"])
def test_padding_changes_nothing(objective, start, proposal, tmp_path):
    """The first loss of a mixed batch is that of its pairs, one by one."""
    numbers = {"ascent_weight": 0.3, "dpo_beta": 0.1, "strength": 0.7, "top_k_log_probs": VOCAB}
    fitted(
        tmp_path,
        start,
        objective=objective,
        proposal=proposal,
        batch_size=13,
        max_steps=1,
        learning_rate=1e-9,
        **numbers,
    )
    wanted = torch.tensor([log_prob(start, pair.prompt, pair.wanted) for pair in PAIRS])
    proposed = torch.tensor([log_prob(start, pair.prompt, pair.proposed) for pair in PAIRS])
    expected = {
        "sft": lambda: -wanted.mean().item(),
        "ram": lambda: (-wanted + 0.3 * proposed).mean().item(),
        "ram-dpo": lambda: -torch.nn.functional.logsigmoid(0.1 * (wanted - proposed)).mean().item(),
        "ram-token": lambda: product_loss(start, proposal, 0.7),
    }[objective]()
    (line,) = lines_of(tmp_path)
    assert line["loss"] == pytest.approx(expected, rel=1e-4)
    if objective.startswith("ram") and objective != "ram-token":
        assert line["wanted_nats"] == pytest.approx(-wanted.mean().item(), rel=1e-4)
        assert line["proposed_nats"] == pytest.approx(-proposed.mean().item(), rel=1e-4)
        assert line["margin_nats"] == pytest.approx((wanted - proposed).mean().item(), rel=1e-3)


def test_a_batch_points_at_where_answers_are_predicted():
    batch = collate([Example((5, 6), (7,)), Example((8,), (9, 10, 11))])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [8, 9, 10]]
    assert batch["input_ids"].flatten()[batch["positions"]].tolist() == [6, 8, 9, 10]
    assert batch["targets"].tolist() == [7, 9, 10, 11]
    assert batch["rows"].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("objective", "optimizer"), [("sft", "adamw"), ("ram", "rmsprop"), ("ram-dpo", "muon")]
)
def test_training_moves_where_its_objective_points(objective, optimizer, start, tmp_path):
    """What is wanted becomes likely, or likelier than what was proposed."""
    done = fitted(tmp_path, start, objective=objective, optimizer=optimizer, max_steps=30, ascent_weight=1e-3)
    pair = PAIRS[3]
    before, after = (log_prob(each, pair.prompt, pair.wanted) for each in (start, done))
    margin = after - log_prob(done, pair.prompt, pair.proposed)
    if objective == "ram-dpo":
        assert margin > before - log_prob(start, pair.prompt, pair.proposed) + 5
    else:
        assert after > max(-2.0, before + 5)
        assert margin > 5


def test_the_token_objective_raises_the_products_likelihood(start, proposal, tmp_path):
    done = fitted(tmp_path, start, objective="ram-token", proposal=proposal, max_steps=30, top_k_log_probs=32)
    assert product_loss(done, proposal, 1.0) < 0.3 * product_loss(start, proposal, 1.0)


@pytest.mark.parametrize("objective", ["ram", "ram-token"])
def test_an_update_in_small_parts_is_the_same_update(objective, start, proposal, tmp_path):
    """Also where an epoch's last batch is smaller than the others, and leaves a part without examples."""
    options = {"objective": objective, "proposal": proposal, "epochs": 2, "optimizer": "adamw"}
    whole = fitted(tmp_path / "whole", start, **options)
    parts = fitted(tmp_path / "parts", start, micro_batch_size=1, **options)
    assert_same_weights(whole, parts, tolerance=2e-5)
    first, second = (lines_of(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in second] == pytest.approx([line["loss"] for line in first], rel=1e-3)


class _Stop(Exception):
    pass


def stop_at(step):
    def stop(progress):
        if progress.step == step:
            raise _Stop

    return stop


@pytest.mark.parametrize("optimizer", ["rmsprop", "muon"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(optimizer, start, tmp_path):
    options = {"optimizer": optimizer, "max_steps": 9, "save_steps": 3, "micro_batch_size": 4}
    whole = fitted(tmp_path / "whole", start, **options)
    with pytest.raises(_Stop):
        fitted(tmp_path / "cut", start, on_progress=stop_at(5), **options)
    assert len(lines_of(tmp_path / "cut")) == 5
    steps = []
    cut = fitted(tmp_path / "cut", start, on_progress=lambda progress: steps.append(progress.step), **options)
    assert steps == list(range(3, 10))
    assert_same_weights(whole, cut)
    lines = lines_of(tmp_path / "cut")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_run_that_is_killed_goes_on_from_its_last_whole_save(start, tmp_path):
    """Killed with a save half written: it counts as none."""
    options = {"max_steps": 8, "save_steps": 2, "keep_saves": 2}
    whole = fitted(tmp_path / "whole", start, **options)

    def die(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=fitted, args=(tmp_path / "cut", start, PAIRS, die), kwargs=options
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    last = tmp_path / "cut" / "fit" / "checkpoint-4"
    weights = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(weights[:-100])
    steps = []
    cut = fitted(tmp_path / "cut", start, on_progress=lambda progress: steps.append(progress.step), **options)
    assert steps[0] == 2
    assert_same_weights(whole, cut)
    saves = sorted(path.name for path in (tmp_path / "cut" / "fit").glob("checkpoint-*"))
    assert saves == ["checkpoint-6", "checkpoint-8"]


def test_what_another_run_has_left_is_not_gone_on_with(start, tmp_path):
    fitted(tmp_path, start, max_steps=2)
    with pytest.raises(ConfigError, match="other data or settings"):
        fitted(tmp_path, start, max_steps=2, learning_rate=0.5)
    with pytest.raises(_Stop):
        fitted(tmp_path / "cut", start, max_steps=4, save_steps=2, on_progress=stop_at(3))
    with pytest.raises(ConfigError, match="other data or settings"):
        fitted(tmp_path / "cut", start, pairs=PAIRS[1:], max_steps=4, save_steps=2)


def test_a_runaway_ascent_is_stopped_with_advice(start, tmp_path):
    with pytest.raises(RunawayAscentError, match=r"`ascent_weight` \(50\) or `learning_rate` \(0\.01\)"):
        fitted(tmp_path, start, ascent_weight=50.0, learning_rate=1e-2, max_steps=200, max_ascent_nats=20.0)


def test_a_loss_that_is_no_number_leaves_the_last_good_save(start, tmp_path, monkeypatch):
    from ram_core.training import loop

    calls = []
    token_log_probs = loop.AnswerHead.logits

    def spoil(head, *arguments):
        calls.append(1)
        return token_log_probs(head, *arguments) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(loop.AnswerHead, "logits", spoil)
    with pytest.raises(DivergedError, match=r"at step 6 the loss is nan.*last good save is .*checkpoint-4"):
        fitted(tmp_path, start, max_steps=10, save_steps=2)
    monkeypatch.undo()
    assert all(weights.isfinite().all() for weights in weights_of(tmp_path / "fit" / "checkpoint-4").values())
    assert not (tmp_path / "fit" / "model").exists()
    fitted(tmp_path, start, max_steps=10, save_steps=2)


def test_weights_that_are_no_numbers_are_never_saved(start, tmp_path):
    """A step so long that weights overflow, though its gradient is finite."""
    with pytest.raises(DivergedError, match=r"weights are not finite.*no save yet"):
        fitted(tmp_path, start, max_steps=1, learning_rate=3e38, warmup_fraction=0.0)
    assert not list((tmp_path / "fit").glob("checkpoint-*"))


def test_an_epoch_sees_every_example_once_in_batches_of_like_length():
    lengths = [random.Random(i).randrange(5, 90) for i in range(500)]
    batches = list(like_lengths(lengths, 16, random.Random(0)))
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert batches != list(like_lengths(lengths, 16, random.Random(1)))


@pytest.mark.parametrize(("num_processes", "part_size"), [(1, 0), (2, 0), (3, 2), (2, 1)])
def test_processes_and_parts_share_out_an_update(num_processes, part_size):
    loop = LoopConfig(batch_size=8, micro_batch_size=part_size, epochs=2)
    plan = BatchPlan.of(PAIRS, loop, seed=3)
    assert (len(plan.steps), plan.steps_per_epoch) == (4, 2)
    sharings = [Sharing.of(loop, process, num_processes) for process in range(num_processes)]
    for step in plan.steps:
        shares = [
            sharing.share(PAIRS, step, part) for sharing in sharings for part in range(sharing.num_parts)
        ]
        counted = [index for share in shares if share.is_counted for index in share.indices]
        assert sorted(counted) == sorted(step)
        assert all(share.indices for share in shares)
        assert all(len(share.indices) <= (part_size or 8) for share in shares)


def test_there_must_be_something_to_train_on():
    with pytest.raises(DataError, match="no example"):
        BatchPlan.of([], LoopConfig(), seed=0)
    with pytest.raises(DataError, match="example 1 has a wanted answer without tokens"):
        BatchPlan.of([PAIRS[0], replace(PAIRS[1], wanted=())], LoopConfig(), seed=0)


def test_the_rate_rises_and_then_falls_to_its_floor():
    loop = LoopConfig(warmup_fraction=0.2, final_rate_fraction=0.1)
    factors = [rate_factor(step, 50, loop) for step in range(50)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[30] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert rate_factor(49, 50, LoopConfig(schedule="constant")) == 1.0


def test_muon_beside_adamw_is_each_of_them_alone():
    """Also after its state went through a file's form."""
    torch.manual_seed(0)
    matrix, other = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))
    twins = [torch.nn.Parameter(each.detach().clone()) for each in (matrix, other)]
    ours = MuonAndAdamW([matrix], [other], lr=0.1, weight_decay=0.01)
    theirs = [
        torch.optim.Muon([twins[0]], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([twins[1]], lr=0.1, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for step in range(4):
        for mine, twin in zip((matrix, other), twins, strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
            twin.grad = mine.grad.clone()
        ours.step()
        for each in theirs:
            each.step()
        state = ours.state_dict()
        ours = MuonAndAdamW([matrix], [other], lr=9.0, weight_decay=0.5)
        ours.load_state_dict(state)
    torch.testing.assert_close([matrix, other], twins, rtol=0, atol=0)
