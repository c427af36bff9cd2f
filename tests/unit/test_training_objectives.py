"""The objectives, each against its definition written out token by token in float64."""

import math

import pytest
import torch

from ram_core.training.config import FitConfig
from ram_core.training.objectives import (
    Preference,
    ProductLikelihood,
    ResidualAlignment,
    SequenceLikelihood,
    TokenLikelihood,
    filled_log_probs,
    objective_of,
    product_log_probs,
    token_log_probs,
)

VOCAB, ROWS, ANSWER = 7, 3, 4
STRENGTH = 0.7


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets():
    return torch.tensor([[1, 2, 6, 0], [3, 3, 0, 5], [6, 4, 4, 1]])


def brute_force_log_prob(scores, target):
    """log softmax, in plain sums."""
    return scores[target] - sum(score.exp() for score in scores).log()


def brute_force_sequences(logits, targets, log_p=None):
    """Log-probabilities of whole answers, by a loop over their tokens."""
    rows = []
    for row in range(len(targets)):
        total = logits.new_zeros(())
        for at in range(targets.shape[1]):
            scores = logits[row, at] if log_p is None else log_p[row, at] + STRENGTH * logits[row, at]
            total = total + brute_force_log_prob(scores, targets[row, at])
        rows.append(total)
    return torch.stack(rows)


DEFINITIONS = {
    "sft": (SequenceLikelihood(), lambda wanted, _: -wanted),
    "warm-up": (TokenLikelihood(), lambda wanted, _: -wanted),
    "ram": (ResidualAlignment(0.3), lambda wanted, proposed: -wanted + 0.3 * proposed),
    "ram-dpo": (
        Preference(0.5),
        lambda wanted, proposed: -(1 / (1 + (-0.5 * (wanted - proposed)).exp())).log(),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_gradient_is_that_of_the_definition(name, targets, monkeypatch):
    """In float64, of a table of logits for wanted answers and one for the proposal's."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    objective, definition = DEFINITIONS[name]
    tables = [noise(ROWS, ANSWER, VOCAB, seed=seed).requires_grad_() for seed in (1, 2)]
    others = targets.flip(0)
    ours = objective.losses(
        *(
            objective.token_log_probs(table.flatten(0, 1), {"targets": ids.flatten()}).view_as(ids).sum(-1)
            for table, ids in zip(tables, (targets, others), strict=True)
        )
    )
    theirs = definition(brute_force_sequences(tables[0], targets), brute_force_sequences(tables[1], others))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((losses * weights).sum(), tables, allow_unused=True, materialize_grads=True)
        for losses in (ours, theirs)
    ]
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def cached(log_p, targets, num_top):
    """What is kept of a proposal, as a batch of packed tokens."""
    log_p, targets = log_p.flatten(0, -2), targets.flatten()
    top = log_p.topk(num_top, -1)
    return {
        "targets": targets,
        "proposal_ids": top.indices,
        "proposal_log_probs": top.values,
        "proposal_target_log_probs": log_p.gather(-1, targets[:, None]).squeeze(-1),
    }


def test_the_token_objective_is_the_products_likelihood_with_its_gradient(targets, monkeypatch):
    """With all of p cached, in float64: `-log softmax(log p + strength * log q)`, and through q alone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    logits = noise(ROWS, ANSWER, VOCAB, seed=3).requires_grad_()
    log_p = noise(ROWS, ANSWER, VOCAB, seed=4).log_softmax(-1)
    objective = ProductLikelihood(STRENGTH)
    batch = cached(log_p, targets, VOCAB)
    log_probs = objective.token_log_probs(logits.flatten(0, 1), batch).view_as(targets).sum(-1)
    ours = objective.losses(log_probs, log_probs[:0])
    theirs = -brute_force_sequences(logits.log_softmax(-1), targets, log_p)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine, expected = (torch.autograd.grad(losses.sum(), logits)[0] for losses in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_top", [1, 2, 4, 6])
@pytest.mark.parametrize("strength", [1.0, 2.5, -0.5])
def test_a_cut_proposal_is_off_by_no_more_than_the_bound(num_top, strength):
    """The missing mass times the tail's largest weight, over the sum that is known: for any strength."""
    logits, log_p = noise(800, 12, seed=5) * 2, (noise(800, 12, seed=6) * 2).log_softmax(-1)
    targets = torch.randint(12, (800,), generator=torch.Generator().manual_seed(7))
    batch = cached(log_p, targets, num_top)
    filled = filled_log_probs(
        batch["proposal_ids"],
        batch["proposal_log_probs"],
        targets,
        batch["proposal_target_log_probs"],
        12,
    )
    exact = product_log_probs(logits, log_p, targets, strength)
    error = (product_log_probs(logits, filled, targets, strength) - exact).abs()
    is_known = torch.zeros_like(log_p, dtype=torch.bool)
    is_known.scatter_(-1, batch["proposal_ids"], True).scatter_(-1, targets[..., None], True)
    weights = (strength * logits.log_softmax(-1)).exp()
    missing = log_p.exp().masked_fill(is_known, 0).sum(-1)
    known = (log_p.exp() * weights).masked_fill(~is_known, 0).sum(-1)
    bound = torch.log1p(missing * weights.masked_fill(is_known, 0).amax(-1) / known)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 0.01


def test_a_filled_proposal_is_a_distribution_that_keeps_what_is_known(targets):
    log_p, targets = noise(ROWS * ANSWER, VOCAB, seed=8).log_softmax(-1), targets.flatten()
    batch = cached(log_p, targets, 3)
    filled = filled_log_probs(
        batch["proposal_ids"],
        batch["proposal_log_probs"],
        targets,
        batch["proposal_target_log_probs"],
        VOCAB,
    )
    torch.testing.assert_close(filled.exp().sum(-1), torch.ones(ROWS * ANSWER, dtype=torch.float64))
    torch.testing.assert_close(filled.gather(-1, batch["proposal_ids"]), batch["proposal_log_probs"])
    torch.testing.assert_close(
        filled.gather(-1, targets[:, None]).squeeze(-1), batch["proposal_target_log_probs"]
    )


def test_half_precision_logits_are_summed_in_single_precision():
    log_probs = token_log_probs(torch.zeros(300, 5, dtype=torch.bfloat16), torch.ones(300).long())
    assert log_probs.dtype == torch.float32
    assert log_probs.sum().item() == pytest.approx(-300 * math.log(5), rel=1e-5)


def test_ascent_lowers_the_probability_of_the_proposals_answer():
    """One step on a table of logits shared by both terms: the proposal's token loses to a bystander."""
    logits = torch.zeros(1, 5, requires_grad=True)
    wanted, proposed = (token_log_probs(logits, torch.tensor([token])) for token in (1, 2))
    ResidualAlignment(0.1).losses(wanted, proposed).sum().backward()
    after = (logits - logits.grad).detach().softmax(-1)[0]
    assert after[1] > after[3] > after[2]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FitConfig(objective="sft"), SequenceLikelihood()),
        (FitConfig(objective="ram", ascent_weight=0.02), ResidualAlignment(0.02)),
        (FitConfig(objective="ram-dpo", dpo_beta=3.0), Preference(3.0)),
        (FitConfig(objective="ram-token", strength=0.5), ProductLikelihood(0.5)),
    ],
)
def test_a_config_names_its_objective(config, expected):
    assert objective_of(config) == expected
