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
    log_a: Float[Tensor, "batch vocab"], log_b: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """`KL(a‖b)` in nats over the whole vocabulary, with `0 · log 0 = 0`; +inf where b lacks a's support."""
    a = log_a.softmax(-1)
    # NaN stands only where a is zero: 0 · ∞. Summed in float64: devices split a lone row differently than one
    # of many, and a gate must not notice.
    total = (a * (log_a - log_b)).nansum(-1, dtype=torch.float64).float()
    # Rounding can turn a true zero into -1e-8.
    return total.clamp(min=0.0)


def effective_sample_size(
    log_p: Float[Tensor, "batch vocab"],
    log_weight: Float[Tensor, "batch vocab"],
    log_nucleus: Float[Tensor, "batch vocab"],
) -> Float[Tensor, " batch"]:
    """`(Σ m w)² / Σ m w²` over the nucleus, with `m` its renormalised proposal mass; in (0, 1].

    1 says that the aligner is indifferent; near 0 that it hangs on tokens which the proposal hardly offers.
    0 where no token of the nucleus has any weight.
    """
    mass = (log_p + log_nucleus).softmax(-1)
    # A common factor of the weights cancels; normalised on the nucleus, their squares do not underflow.
    weight = (log_weight + log_nucleus).softmax(-1)
    weighted = mass * weight
    square = (weighted * weight).sum(-1)
    return torch.where(square > 0, weighted.sum(-1) ** 2 / square.clamp(min=1e-38), 0.0).clamp(max=1.0)


def aligner_mass(
    log_q: Float[Tensor, "batch vocab"], nucleus: Bool[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """`Σ q(v)` over the nucleus; near 0 the proposal never offers what the aligner wants."""
    # A row without any mass has no softmax.
    return (log_q.softmax(-1) * nucleus).nansum(-1).clamp(max=1.0)
