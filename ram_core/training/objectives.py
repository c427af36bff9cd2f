"""The losses of training, as pure functions of log-probabilities (natural, float32).

A sequence's log-probability is the *sum* over its answer tokens: Eq. 8 of arXiv 2505.19700 is a loss on
sequences, not on tokens. Prompts are masked by never being passed in. Losses come one to a pair; the loop
adds them up and divides by the pairs, or answer tokens, of the whole update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ram_core.training.config import FitConfig


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)` of each target: logits [token, vocab], targets int64 [token]."""
    return -functional.cross_entropy(logits.float(), targets, reduction="none")


def residual_alignment_losses(log_q_wanted: Tensor, log_q_proposed: Tensor, ascent_weight: float) -> Tensor:
    """Eq. 8 of arXiv 2505.19700 for each pair: `-log Q(y|x) + ascent_weight * log Q(y'|x)`, [pair].

    `log_q_wanted` and `log_q_proposed`, [pair], are of the wanted answer and of the proposal's own to the
    same prompt. The second term is a gradient ascent on the negative log-likelihood, without a bound: hence
    the small weight (the paper's alpha).
    """
    return ascent_weight * log_q_proposed - log_q_wanted


def preference_losses(log_q_wanted: Tensor, log_q_proposed: Tensor, beta: float) -> Tensor:
    """`-log sigmoid(beta * (log Q(y|x) - log Q(y'|x)))`, [pair]: DPO without a reference model."""
    return -functional.logsigmoid(beta * (log_q_wanted - log_q_proposed))


def filled_log_probs(
    top_ids: Tensor, top_log_probs: Tensor, targets: Tensor, target_log_probs: Tensor, vocab_size: int
) -> Tensor:
    """Log-probabilities, [token, vocab], made of those of the most probable tokens and of one more.

    `top_ids` (int64) and `top_log_probs` are [token, top], `targets` (int64) and `target_log_probs` [token].
    The mass that they leave is spread evenly over all other tokens, the choice of greatest entropy.
    """
    has_target = (top_ids == targets[:, None]).any(-1)
    known = top_log_probs.exp().sum(-1) + target_log_probs.exp().masked_fill(has_target, 0.0)
    num_others = vocab_size - top_ids.shape[-1] - (~has_target).long()
    others = (1 - known).clamp(min=0.0).log() - num_others.clamp(min=1).log()
    filled = others[:, None].expand(-1, vocab_size)
    filled = filled.scatter(-1, top_ids, top_log_probs)
    return filled.scatter(-1, targets[:, None], target_log_probs[:, None])


def product_log_probs(logits: Tensor, log_p: Tensor, targets: Tensor, strength: float) -> Tensor:
    """`log softmax(log p + strength * log q)` of each target, [token]: the aligned model's own.

    `logits` are the aligner's and `log_p` the proposal's log-probabilities, both [token, vocab]; the
    normaliser of q cancels. Where `log_p` is `filled_log_probs`, with mass m spread over the tail, the result
    is off by at most `log(1 + m * max_tail(q**strength) / Z)`, Z being the sum of `p * q**strength` over what
    is known of p: both normalisers lie between Z and Z plus that product.
    """
    return token_log_probs(log_p + strength * logits.float(), targets)


class Objective:
    """What a model is trained for: log-probabilities of answers, and a loss for each pair of them.

    `reads_proposed`: whether the proposal's answers take part. `is_per_token`: whether the update's loss is
    a mean over wanted answer tokens instead of over pairs. `advice` is what to lower if it runs away.
    """

    reads_proposed: ClassVar[bool] = False
    is_per_token: ClassVar[bool] = False

    @property
    def advice(self) -> str:
        return "`learning_rate`"

    def token_log_probs(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities of `batch["targets"]`, [token], under `logits`, [token, vocab]."""
        return token_log_probs(logits, batch["targets"])

    def losses(self, log_q_wanted: Tensor, log_q_proposed: Tensor) -> Tensor:
        """One loss to a pair, [pair], of summed log-probabilities; the second is empty if none are read."""
        return -log_q_wanted


@dataclass(frozen=True)
class TokenLikelihood(Objective):
    """Ordinary supervised training, as of a warm-up: mean `-log q` of a wanted answer token."""

    is_per_token: ClassVar[bool] = True


@dataclass(frozen=True)
class SequenceLikelihood(Objective):
    """ "sft": Eq. 8 without its ascent term, mean `-log Q(y|x)` of a wanted answer."""


@dataclass(frozen=True)
class ResidualAlignment(Objective):
    """ "ram": Eq. 8 of arXiv 2505.19700."""

    reads_proposed: ClassVar[bool] = True
    ascent_weight: float

    @property
    def advice(self) -> str:
        return f"`ascent_weight` ({self.ascent_weight:g}) or `learning_rate`"

    def losses(self, log_q_wanted: Tensor, log_q_proposed: Tensor) -> Tensor:
        return residual_alignment_losses(log_q_wanted, log_q_proposed, self.ascent_weight)


@dataclass(frozen=True)
class Preference(Objective):
    """ "ram-dpo": the wanted answer over the proposal's, without a reference model."""

    reads_proposed: ClassVar[bool] = True
    beta: float

    def losses(self, log_q_wanted: Tensor, log_q_proposed: Tensor) -> Tensor:
        return preference_losses(log_q_wanted, log_q_proposed, self.beta)


@dataclass(frozen=True)
class ProductLikelihood(Objective):
    """ "ram-token": mean `-log` of a wanted answer token under the product of proposal and aligner."""

    is_per_token: ClassVar[bool] = True
    strength: float

    def token_log_probs(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        log_p = filled_log_probs(
            batch["proposal_ids"],
            batch["proposal_log_probs"],
            batch["targets"],
            batch["proposal_target_log_probs"],
            logits.shape[-1],
        )
        return product_log_probs(logits, log_p, batch["targets"], self.strength)


def objective_of(config: FitConfig) -> Objective:
    """The objective that a config names, with its numbers."""
    match config.objective:
        case "sft":
            return SequenceLikelihood()
        case "ram":
            return ResidualAlignment(config.ascent_weight)
        case "ram-dpo":
            return Preference(config.dpo_beta)
        case "ram-token":
            return ProductLikelihood(config.strength)
