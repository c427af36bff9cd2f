"""A fit on CUDA: the updates of the CPU in float32, and one that learns in bfloat16."""

import pytest
import torch

from ram_core.progress import ignore_progress
from ram_core.training.fit import fit_model
from tests.training import PAIRS, fit_config, log_prob, save_small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("objective", ["ram", "ram-token"])
def test_the_first_update_is_that_of_the_definition(objective, tmp_path):
    """In float32, as summed from answers one at a time on the CPU."""
    start = save_small(tmp_path / "start")
    config = fit_config(
        tmp_path,
        start,
        objective=objective,
        proposal=start,
        dtype="float32",
        batch_size=13,
        max_steps=1,
        top_k_log_probs=300,
        strength=0.0,
    )
    summary = fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)
    wanted = -sum(log_prob(start, pair.prompt, pair.wanted) for pair in PAIRS)
    tokens = sum(len(pair.wanted) for pair in PAIRS)
    assert summary.metrics["wanted_nats_per_token"] == pytest.approx(wanted / tokens, rel=1e-3)


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_bfloat16_learns(is_recomputed, tmp_path):
    start = save_small(tmp_path / "start")
    config = fit_config(
        tmp_path, start, max_steps=40, activation_checkpointing=is_recomputed, optimizer="adamw"
    )
    fit_model(config, PAIRS, tmp_path / "fit", ignore_progress)
    pair, done = PAIRS[3], tmp_path / "fit" / "model"
    assert log_prob(done, pair.prompt, pair.wanted) > log_prob(start, pair.prompt, pair.wanted) + 5
