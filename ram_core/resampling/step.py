"""One decoding step: propose, align, reduce.

The order is: grammar mask, nucleus, score, gate, bias, temperature, truncation, draw. Rows are independent,
everything is float32, there is no loop over rows and no look at the device's data from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ram_core.resampling.draws import Draws
from ram_core.resampling.logits import Aligner, AlignerLogits, combine_aligners, log_probs
from ram_core.resampling.modes import draw_from, score_candidates, score_nucleus, score_product
from ram_core.resampling.noise import Purpose, uniform_noise
from ram_core.resampling.nucleus import log_mask, masked, truncate
from ram_core.resampling.params import MIN_TEMPERATURE, Mode, StepFeatures, StepParams
from ram_core.resampling.telemetry import Telemetry, effective_sample_size, kl_divergence


@dataclass(frozen=True, slots=True)
class _Scores:
    """Unnormalised log-probabilities at temperature 1, and how they came about."""

    scores: Float[Tensor, "batch vocab"]
    is_empirical: Bool[Tensor, " batch"]
    telemetry: Telemetry


def draw_with_tensors(
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
    """`draw_tokens` in tensor operations: on any device, for anything that may be asked for."""
    proposal = log_probs(proposal_logits, vocab_size, allowed)
    log_p, is_bad = proposal.log_p, proposal.is_bad
    if features.is_aligned and aligner_logits:
        aligner = combine_aligners(
            aligner_logits,
            num_rows=len(log_p),
            vocab_size=vocab_size,
            has_mixtures=features.has_mixtures,
            allowed=allowed,
        )
        is_bad = is_bad | aligner.is_bad
        aligned = _align(log_p, aligner, params, features)
    else:
        aligned = _leave_alone(log_p)
    scores = aligned.scores
    if features.has_eos_priority:
        scores = _end_where_proposed(scores, log_p, params.has_eos_priority, eos_ids)
    if bias is not None:
        scores = scores + bias
        is_bad = is_bad | ~scores.amax(-1).isfinite()
    token, score, log_prob = _reduce(scores, params, features)
    top_score, top_token = score.topk(features.max_top_log_probs, dim=-1)
    # Relative to the drawn token, which is never improbable, so that improbable ones keep their digits.
    top_log_prob = top_score - score.gather(-1, token[:, None]) + log_prob[:, None]
    is_unknown = aligned.is_empirical
    return Draws(
        token,
        log_prob.masked_fill(is_unknown, torch.nan),
        top_token,
        top_log_prob.masked_fill(is_unknown[:, None], torch.nan),
        aligned.telemetry,
        is_bad,
    )


def _is_greedy(params: StepParams) -> Bool[Tensor, " batch"]:
    return params.temperature < MIN_TEMPERATURE


def _leave_alone(log_p: Float[Tensor, "batch vocab"]) -> _Scores:
    """The identity aligner: scores are the proposal's."""
    zeros = log_p.new_zeros(len(log_p))
    never = torch.zeros_like(zeros, dtype=torch.bool)
    return _Scores(log_p, never, Telemetry(zeros, zeros, zeros, zeros, never))


def _align(
    log_p: Float[Tensor, "batch vocab"], aligner: Aligner, params: StepParams, features: StepFeatures
) -> _Scores:
    """Score the nucleus by each row's mode; gate; tell what was done."""
    is_aligned = params.mode != Mode.PROPOSAL
    p = log_p.softmax(-1)
    nucleus = _cut_nucleus(log_p, p, params, features)
    log_nucleus = log_mask(nucleus)
    # Strength 0 is the proposal even where q is 0: 0 · -inf is no NaN here.
    log_weight = (aligner.strength[:, None] * aligner.log_q).nan_to_num_(0.0, torch.inf, -torch.inf)
    exact = score_product(log_p, log_weight, log_nucleus)
    if features.has_nucleus_mode:
        is_nucleus_mode = (params.mode == Mode.NUCLEUS)[:, None]
        exact = torch.where(is_nucleus_mode, score_nucleus(log_weight, log_nucleus), exact)
    kl_p_q = kl_divergence(p, log_p, aligner.log_q)
    is_gated = kl_p_q > params.kl_threshold

    scores, is_empirical = exact, torch.zeros_like(is_gated)
    if features.max_candidates:
        # A cold row has no candidates to draw: its arg max is the product's.
        is_empirical = (params.mode == Mode.CANDIDATES) & ~_is_greedy(params) & ~is_gated
        empirical = score_candidates(log_p, log_weight, log_nucleus, params, features.max_candidates)
        scores = torch.where(is_empirical[:, None], empirical, exact)
    # An aligner that gives no mass at all to the nucleus, or to what was drawn of it, has nothing to choose.
    is_empty = scores.amax(-1) == -torch.inf
    is_fallback = is_aligned & (is_gated | is_empty)
    is_active = (is_aligned & ~is_fallback)[:, None]
    told = torch.where(is_active, exact, log_p)
    scores = torch.where(is_active, scores, log_p) if features.max_candidates else told

    kl_pi_p = kl_divergence(told.softmax(-1), told.log_softmax(-1), log_p)
    # A common factor of the weights cancels; normalised on the nucleus, their squares do not underflow.
    ess = effective_sample_size(masked(p, nucleus), (log_weight + log_nucleus).softmax(-1))
    # nansum: an aligner without any mass has no softmax.
    mass = masked(aligner.log_q.softmax(-1), nucleus).nansum(-1).clamp(max=1.0)
    kl_p_q, kl_pi_p, ess, mass = (torch.where(is_aligned, x, 0.0) for x in (kl_p_q, kl_pi_p, ess, mass))
    return _Scores(scores, is_empirical, Telemetry(kl_p_q, kl_pi_p, ess, mass, is_fallback))


def _cut_nucleus(
    log_p: Float[Tensor, "batch vocab"],
    p: Float[Tensor, "batch vocab"],
    params: StepParams,
    features: StepFeatures,
) -> Bool[Tensor, "batch vocab"]:
    """The tokens that the proposal offers."""
    if features.has_proposal_temperature:
        log_p = log_p / params.proposal_temperature.clamp(min=MIN_TEMPERATURE)[:, None]
        p = log_p.softmax(-1)
    return truncate(
        log_p,
        p=p,
        top_k=params.proposal_top_k if features.has_proposal_top_k else None,
        top_p=params.proposal_top_p if features.has_proposal_top_p else None,
    )


def _end_where_proposed(
    scores: Float[Tensor, "batch vocab"],
    log_p: Float[Tensor, "batch vocab"],
    has_priority: Bool[Tensor, " batch"],
    eos_ids: Int64[Tensor, " eos"],
) -> Float[Tensor, "batch vocab"]:
    """Leave only the end of text to rows that give it priority and whose proposal prefers it."""
    proposed = log_p.argmax(-1)
    # Not `isin`, which sorts many ids, and then looks how many are left.
    is_forced = has_priority & (proposed[:, None] == eos_ids).any(-1)
    is_proposed = torch.arange(log_p.shape[-1], device=log_p.device) == proposed[:, None]
    alone = torch.zeros_like(scores).masked_fill(~is_proposed, -torch.inf)
    return torch.where(is_forced[:, None], alone, scores)


def _reduce(
    scores: Float[Tensor, "batch vocab"], params: StepParams, features: StepFeatures
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, "batch vocab"], Float[Tensor, " batch"]]:
    """Temperature, truncation, draw: the tokens, the final scores, and the tokens' log-probabilities."""
    is_greedy = _is_greedy(params)
    scores = scores / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    if features.has_top_k or features.has_top_p or features.has_min_p:
        keep = truncate(
            scores,
            top_k=params.top_k if features.has_top_k else None,
            top_p=params.top_p if features.has_top_p else None,
            min_p=params.min_p if features.has_min_p else None,
        )
        scores = scores + log_mask(keep)
    law = scores.softmax(-1)
    token = draw_from(law, uniform_noise(params.seed, params.position, Purpose.TOKEN))[:, 0]
    if features.has_greedy:
        # Of what truncation left: two scores may differ by too little for it to tell them apart.
        token = torch.where(is_greedy, scores.argmax(-1), token)
    return token, scores, law.gather(-1, token[:, None])[:, 0].log()
