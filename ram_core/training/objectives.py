"""The losses of aligner training, as pure functions of log-probabilities.

Log-probabilities are natural, fp32, and *summed* over the tokens of an answer: Eq. 8 of arXiv 2505.19700 is
a loss on sequences, not on tokens. Prompts are masked by never being passed in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResidualLoss:
    """`total = wanted + ascent_weight * proposed`, each a scalar tensor in nats per answer.

    `wanted` is the negative log-likelihood of the wanted answers, positive and going down; `proposed` is the
    log-likelihood of the proposal's own answers, negative and going down too, without a lower bound.
    """

    total: Tensor
    wanted: Tensor
    proposed: Tensor


def residual_alignment_loss(
    log_q_wanted: Tensor, log_q_proposed: Tensor, *, ascent_weight: float
) -> ResidualLoss:
    """Eq. 8 of arXiv 2505.19700: `-E[log Q(y|x)] + ascent_weight * E[log Q(y'|x)]`.

    `log_q_wanted` (float, [batch]) holds `log Q(y|x)` of the wanted answers, `log_q_proposed` (float,
    [batch]) `log Q(y'|x)` of the answers that the proposal gave to the same prompts. The second term is a
    gradient ascent on the negative log-likelihood of the proposal's answers, hence the small weight (the
    paper's alpha).
    """
    wanted = -log_q_wanted.mean()
    proposed = log_q_proposed.mean()
    return ResidualLoss(wanted + ascent_weight * proposed, wanted, proposed)


def answer_log_probs(logits: Tensor, targets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Summed log-probabilities of answers whose tokens lie packed, [num_rows].

    `logits` ([token, vocab], any float dtype) predict `targets` (int64, [token]); `rows` (int64, [token])
    says which answer each token belongs to, in [0, num_rows). An answer without tokens has log-probability
    0.
    """
    log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return log_probs.new_zeros(num_rows).index_add(0, rows, log_probs)


def mean_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of packed tokens in nats per token, a scalar; plain supervised training (the warm-up)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets)
