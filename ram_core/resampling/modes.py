"""The score of every token under each resampling mode (docs/method.md; arXiv 2505.19700, Eq. 3 and Eq. 10).

A score is an unnormalised log-probability at temperature 1; -inf is out of the support.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ram_core.resampling.noise import Purpose, uniform_noise
from ram_core.resampling.nucleus import as_units, log_mask
from ram_core.resampling.params import MIN_TEMPERATURE, StepParams


def score_product(
    log_p: Float[Tensor, "batch vocab"],
    log_weight: Float[Tensor, "batch vocab"],
    log_nucleus: Float[Tensor, "batch vocab"],
) -> Float[Tensor, "batch vocab"]:
    """`log (p · w)` on the nucleus, with the importance weight `w = q^strength`.

    The exact target of Eq. 3, token by token: the limit of `candidates` for many candidates.
    """
    return log_p + log_weight + log_nucleus


def score_nucleus(
    log_weight: Float[Tensor, "batch vocab"], log_nucleus: Float[Tensor, "batch vocab"]
) -> Float[Tensor, "batch vocab"]:
    """`log w` on the nucleus: the proposal only vetoes, the aligner chooses (the authors' code, "par")."""
    return log_weight + log_nucleus


def draw_from(
    mass: Float[Tensor, "batch vocab"], noise: Float[Tensor, "batch lanes"]
) -> Int64[Tensor, "batch lanes"]:
    """Inverse-CDF draws: `noise` in [0, 1) picks tokens in proportion to `mass`, which sums to about 1 a row.

    A token without mass is never drawn; a row of NaN gets any token. Masses are added up as integers, so the
    sums do not depend on the order in which a device adds, and with it on the other rows: a row's draw is
    the same in any batch.
    """
    cumulative = as_units(mass).cumsum(-1)
    # Below the total, as noise is below 1 and rounding keeps that for doubles of 53 bits.
    wanted = (noise * cumulative[:, -1:]).long()
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=mass.shape[-1] - 1)


def score_candidates(
    log_p: Float[Tensor, "batch vocab"],
    log_weight: Float[Tensor, "batch vocab"],
    log_nucleus: Float[Tensor, "batch vocab"],
    params: StepParams,
    max_candidates: int,
) -> Float[Tensor, "batch vocab"]:
    """The empirical law of the paper's algorithm as printed (Eq. 10), drawn afresh each step.

    `num_candidates` (at most `max_candidates`) independent draws from `p^(1/T)` renormalised on the nucleus,
    each with importance weight `w^(1/T)`; a token drawn twice counts twice. Returned as a score at
    temperature 1, hence `T · log(count)`. Greedy rows get scores that mean nothing.
    """
    temperature = params.temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    tempered = (log_p / temperature + log_nucleus).softmax(-1)
    noise = uniform_noise(params.seed, params.position, Purpose.CANDIDATES, max_candidates)
    candidates = draw_from(tempered, noise)
    is_wanted = torch.arange(max_candidates, device=log_p.device) < params.num_candidates[:, None]
    count = torch.zeros_like(log_p).scatter_add_(1, candidates, is_wanted.float())
    return score_product(temperature * count.log(), log_weight, log_mask(count > 0))
