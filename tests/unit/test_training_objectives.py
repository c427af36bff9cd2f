"""Equation 8, against its definition written out token by token."""

import math

import pytest
import torch

from ram_core.training.objectives import answer_log_probs, mean_token_loss, residual_alignment_loss

VOCAB = 5
WANTED = [[1, 2, 4], [3]]
PROPOSED = [[2], [0, 0, 1, 4]]


def pack(answers):
    """Targets and rows of packed answers."""
    targets = torch.tensor([token for answer in answers for token in answer])
    rows = torch.tensor([row for row, answer in enumerate(answers) for _ in answer])
    return targets, rows


def brute_force_log_prob(logits, answer):
    """Sum of log softmax, in plain floats."""
    total = 0.0
    for scores, token in zip(logits.tolist(), answer, strict=True):
        total += scores[token] - math.log(sum(math.exp(score) for score in scores))
    return total


def random_logits(answers, seed):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(sum(map(len, answers)), VOCAB, generator=noise)


def test_answer_log_probs_are_sums_over_each_answer():
    logits = random_logits(WANTED, 0)
    targets, rows = pack(WANTED)
    expected = [brute_force_log_prob(logits[:3], WANTED[0]), brute_force_log_prob(logits[3:], WANTED[1])]
    assert answer_log_probs(logits, targets, rows, 2).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_answer_without_tokens_is_certain():
    targets, rows = pack([[1], [], [2]])
    assert answer_log_probs(torch.zeros(2, VOCAB), targets, rows, 3)[1] == 0


def test_half_precision_logits_are_summed_in_single_precision():
    targets, rows = pack([[1] * 300])
    log_probs = answer_log_probs(torch.zeros(300, VOCAB, dtype=torch.bfloat16), targets, rows, 1)
    assert log_probs.dtype == torch.float32
    assert log_probs.item() == pytest.approx(-300 * math.log(VOCAB), rel=1e-5)


def test_the_loss_is_equation_8():
    wanted, proposed, alpha = torch.tensor([-3.0, -5.0]), torch.tensor([-2.0, -8.0]), 0.01
    loss = residual_alignment_loss(wanted, proposed, ascent_weight=alpha)
    assert loss.wanted.item() == 4.0
    assert loss.proposed.item() == -5.0
    assert loss.total.item() == pytest.approx(4.0 + alpha * -5.0)


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3])
def test_the_gradient_is_that_of_the_definition(alpha):
    """Softmax minus one-hot on wanted tokens, the opposite, scaled by alpha, on proposed ones; over the
    batch.
    """
    wanted_logits = random_logits(WANTED, 1).requires_grad_()
    proposed_logits = random_logits(PROPOSED, 2).requires_grad_()
    loss = residual_alignment_loss(
        answer_log_probs(wanted_logits, *pack(WANTED), 2),
        answer_log_probs(proposed_logits, *pack(PROPOSED), 2),
        ascent_weight=alpha,
    )
    loss.total.backward()
    for logits, answers, scale in ((wanted_logits, WANTED, 1 / 2), (proposed_logits, PROPOSED, -alpha / 2)):
        one_hot = torch.nn.functional.one_hot(pack(answers)[0], VOCAB)
        torch.testing.assert_close(logits.grad, scale * (logits.detach().softmax(-1) - one_hot))


def test_ascent_lowers_the_probability_of_the_proposals_answer():
    """One step on a table of logits shared by both terms: the proposal's token loses to a bystander."""
    logits = torch.zeros(1, VOCAB, requires_grad=True)
    wanted = answer_log_probs(logits, torch.tensor([1]), torch.tensor([0]), 1)
    proposed = answer_log_probs(logits, torch.tensor([2]), torch.tensor([0]), 1)
    residual_alignment_loss(wanted, proposed, ascent_weight=0.1).total.backward()
    after = (logits - logits.grad).detach().softmax(-1)[0]
    assert after[1] > after[3] > after[2]


def test_the_warm_up_loss_is_a_mean_over_tokens():
    targets, rows = pack(WANTED)
    logits = random_logits(WANTED, 3)
    expected = -answer_log_probs(logits, targets, rows, 2).sum() / len(targets)
    torch.testing.assert_close(mean_token_loss(logits, targets), expected)
