"""The one entry to the step: compiled on the host, a kernel on CUDA, tensors for what is rarely asked."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ram_core.resampling.draw_on_device import draw_with_kernel, has_kernel_for
from ram_core.resampling.draws import Draws
from ram_core.resampling.fused import covered_rows, draw_compiled
from ram_core.resampling.kernel import MAX_VOCAB_SIZE
from ram_core.resampling.logits import AlignerLogits
from ram_core.resampling.params import StepFeatures, StepParams
from ram_core.resampling.step import draw_with_tensors


def draw_tokens(
    proposal_logits: Float[Tensor, "batch padded_vocab"],
    aligner_logits: list[AlignerLogits],
    params: StepParams,
    features: StepFeatures,
    *,
    vocab_size: int,
    eos_ids: Int64[Tensor, " eos"],
    allowed: Bool[Tensor, "batch vocab"] | None = None,
    bias: Float[Tensor, "batch vocab"] | None = None,
) -> Draws:
    """Draw every row's next token.

    On the host, each row takes the compiled or the tensors' way by what its own request asks for, so that its
    bits never depend on its neighbours. On CUDA, all rows take the kernel's way, or all the tensors'.

    Args:
        proposal_logits: the proposal's raw logits, any float dtype, padding rows of the embedding included.
        aligner_logits: each aligner's raw logits for the rows that it takes part in.
        params: what each row asked for.
        features: which parts of the step any row needs.
        vocab_size: size of the shared vocabulary; ids beyond it are never drawn.
        eos_ids: tokens that end a text, for end-of-text priority.
        allowed: a grammar's mask, put on both models before anything else.
        bias: penalties and logit bias, added to the aligned scores.
    """
    has_masks = allowed is not None or bias is not None
    if proposal_logits.is_cuda and not has_masks and has_kernel_for(aligner_logits, features, vocab_size):
        return draw_with_kernel(proposal_logits, aligner_logits, params, vocab_size=vocab_size)
    if proposal_logits.device.type != "cpu" or vocab_size > MAX_VOCAB_SIZE:
        return draw_with_tensors(
            proposal_logits,
            aligner_logits,
            params,
            features,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            allowed=allowed,
            bias=bias,
        )
    is_covered = covered_rows(aligner_logits, params, features, allowed, bias)
    draws = draw_compiled(
        proposal_logits,
        aligner_logits,
        params,
        is_covered.nonzero()[:, 0],
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        num_top=features.max_top_log_probs,
    )
    if not is_covered.all():
        rest = (~is_covered).nonzero()[:, 0]
        draws.put(
            rest,
            draw_with_tensors(
                proposal_logits[rest],
                _of_rows(aligner_logits, rest, len(is_covered)),
                params.take(rest),
                features,
                vocab_size=vocab_size,
                eos_ids=eos_ids,
                allowed=None if allowed is None else allowed[rest],
                bias=None if bias is None else bias[rest],
            ),
        )
    return draws


def _of_rows(
    aligner_logits: list[AlignerLogits], rows: Int64[Tensor, " rows"], num_rows: int
) -> list[AlignerLogits]:
    """What the aligners say of some rows, as if these were the whole batch."""
    place = torch.full((num_rows + 1,), len(rows))
    place[rows] = torch.arange(len(rows))
    terms = []
    for term in aligner_logits:
        own = place[term.rows]
        is_wanted = own < len(rows)
        if is_wanted.any():
            terms.append(AlignerLogits(own[is_wanted], term.logits[is_wanted], term.strength[is_wanted]))
    return terms
