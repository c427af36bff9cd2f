"""The step on a device: one kernel for what nearly everybody asks, tensor operations for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ram_core.resampling.draws import Draws
from ram_core.resampling.logits import AlignerLogits
from ram_core.resampling.noise import Purpose
from ram_core.resampling.params import StepFeatures, StepParams
from ram_core.resampling.telemetry import Telemetry

_BLOCK = 4096
# The kernel's sums of weights would overflow above that.
_MAX_VOCAB_SIZE = 1 << 18


def has_kernel_for(aligner_logits: Sequence[AlignerLogits], features: StepFeatures, vocab_size: int) -> bool:
    """Whether the kernel does all that the step needs: at most one aligner's logits, and no rare wishes."""
    usual = ("is_aligned", "has_proposal_top_p", "has_greedy")
    is_usual = replace(features, **dict.fromkeys(usual, False)) == StepFeatures()
    return is_usual and len(aligner_logits) <= 1 and vocab_size <= _MAX_VOCAB_SIZE


def draw_with_kernel(
    proposal_logits: Float[Tensor, "batch padded_vocab"],
    aligner_logits: Sequence[AlignerLogits],
    params: StepParams,
    *,
    vocab_size: int,
) -> Draws:
    """Draw every row of a step that there is a kernel for; `draw_with_tensors` but for the last digits."""
    from ram_core.resampling.draw_kernel import draw_rows

    num_rows, device = len(proposal_logits), proposal_logits.device
    # The aligner's padding rows belong to the row after the last.
    aligner_row = torch.full((num_rows + 1,), -1, device=device)
    strength = torch.zeros(num_rows + 1, dtype=torch.float32, device=device)
    aligner = proposal_logits
    for term in aligner_logits:
        aligner = term.logits
        aligner_row.index_copy_(0, term.rows, torch.arange(len(aligner), device=device))
        strength.index_copy_(0, term.rows, term.strength)
    flags = torch.zeros(2, num_rows, dtype=torch.bool, device=device)
    floats = torch.zeros(5, num_rows, dtype=torch.float32, device=device)
    token = torch.empty(num_rows, dtype=torch.int64, device=device)
    given = ("mode", "temperature", "proposal_top_p", "kl_threshold", "seed", "position")
    draw_rows[(num_rows,)](
        proposal_logits,
        aligner,
        aligner_row,
        strength,
        *[getattr(params, name) for name in given],
        token,
        flags[0],
        flags[1],
        floats,
        proposal_logits.stride(0),
        aligner.stride(0),
        vocab_size,
        num_rows,
        purpose=int(Purpose.TOKEN),
        block=_BLOCK,
        num_warps=16,
        # Two passes must see the same weights.
        enable_fp_fusion=False,
    )
    log_prob, kl_p_q, kl_pi_p, ess, mass = floats
    nothing = token.new_empty((num_rows, 0))
    telemetry = Telemetry(kl_p_q, kl_pi_p, ess, mass, flags[1])
    return Draws(token, log_prob, nothing, nothing.float(), telemetry, flags[0])
