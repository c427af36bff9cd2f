"""What the aligner did to a step, in float32 and per row (a batch-summed KL would gate neighbours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One entry a row; rows without an aligner hold zeros. Divergences in nats, the rest fractions."""

    kl_p_q: Float[Tensor, " batch"]
    kl_pi_p: Float[Tensor, " batch"]
    ess: Float[Tensor, " batch"]
    aligner_mass: Float[Tensor, " batch"]
    is_fallback: Bool[Tensor, " batch"]


def kl_divergence(
    a: Float[Tensor, "batch vocab"], log_a: Float[Tensor, "batch vocab"], log_b: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """`KL(a‖b)` in nats over the whole vocabulary, with `0 · log 0 = 0`; +inf where b lacks a's support."""
    # NaN stands only where a is zero: 0 · ∞. Summed in float64: devices split a lone row differently than one
    # of many, and a gate must not notice.
    total = (a * (log_a - log_b)).nansum(-1, dtype=torch.float64)
    # Rounding can turn a true zero into -1e-8.
    return total.float().clamp(min=0.0)


def effective_sample_size(
    mass: Float[Tensor, "batch vocab"], weight: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """`(Σ m w)² / Σ m w²` with `m` the proposal's mass on the nucleus, renormalised; in (0, 1].

    1 says that the aligner is indifferent; near 0 that it hangs on tokens which the proposal hardly offers.
    0 where no token of the nucleus has any weight. Neither argument need be normalised.
    """
    weighted = mass * weight
    square = mass.sum(-1) * (weighted * weight).sum(-1)
    return torch.where(square > 0, weighted.sum(-1) ** 2 / square.clamp(min=1e-38), 0.0).clamp(max=1.0)
