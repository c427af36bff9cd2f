"""From models' raw logits to log-probabilities over the shared vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Normalised float32 log-probabilities; `is_bad` rows held NaN, +inf or nothing, and are uniform here."""

    log_p: Float[Tensor, "batch vocab"]
    is_bad: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class AlignerLogits:
    """One aligner's raw logits for the batch rows `rows`, and the exponent `strength` it has in each."""

    rows: Int64[Tensor, " rows"]
    logits: Float[Tensor, "rows padded_vocab"]
    strength: Float[Tensor, " rows"]


def log_probs(
    logits: Float[Tensor, "batch padded_vocab"],
    vocab_size: int,
    allowed: Bool[Tensor, "batch vocab"] | None = None,
) -> LogProbs:
    """Slice the padding off, mask, and normalise in float32.

    Padding goes first: checkpoints of one family pad their embeddings differently, and padding of -inf in
    both models would turn a divergence into NaN. A logit of -inf is an ordinary zero probability; a row
    with NaN, with +inf, or without any finite logit is bad, is replaced by a uniform one so that it harms
    no neighbour, and is reported. `allowed` is a grammar's mask.
    """
    logits = logits[:, :vocab_size].float()
    top = logits.amax(-1)
    # amax passes NaN on, so one cheap look at it finds all three kinds of bad row.
    is_bad = ~top.isfinite()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
        is_bad = is_bad | ~logits.amax(-1).isfinite()
    logits = logits.masked_fill(is_bad[:, None], 0.0)
    return LogProbs(logits.log_softmax(-1), is_bad)


@dataclass(frozen=True, slots=True)
class Aligner:
    """What all aligners of each row say together: `q ∝ Π q_i^(β_i / strength)` with `strength = Σ |β_i|`.

    With one term this is the aligner itself and its strength. Rows without a term have strength 0.
    """

    log_q: Float[Tensor, "batch vocab"]
    strength: Float[Tensor, " batch"]
    is_bad: Bool[Tensor, " batch"]


# A contrast term divides by its model's probability. A true zero there counts as this much: less than any
# softmax of real logits gives, yet small enough to leave the other tokens their digits in float32.
_LOG_FLOOR = -100.0


def combine_aligners(
    terms: Sequence[AlignerLogits], *, num_rows: int, vocab_size: int, allowed: Tensor | None = None
) -> Aligner:
    """Compose every row's weighted terms into one aligner, so that `Π q_i^(β_i) ∝ q^strength`.

    A row may occur in several terms. Weights may be negative (contrast). All-zero strengths weigh the
    terms alike, so that telemetry still speaks of the aligner. The grammar's mask `allowed` comes last: a
    contrast must not turn its zeros into preferences. Where nothing has any mass, as when terms share no
    token, `log_q` is -inf throughout.
    """
    device = terms[0].logits.device
    strength = torch.zeros(num_rows, device=device)
    num_terms = torch.zeros(num_rows, device=device)
    for term in terms:
        strength.index_add_(0, term.rows, term.strength.abs())
        num_terms.index_add_(0, term.rows, torch.ones_like(term.strength))
    log_q = torch.zeros(num_rows, vocab_size, device=device)
    is_bad = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for term in terms:
        own = log_probs(term.logits, vocab_size)
        total = strength[term.rows]
        share = torch.where(total > 0, term.strength / total.clamp(min=1e-30), 1 / num_terms[term.rows])
        is_bad[term.rows] |= own.is_bad
        log_q.index_add_(0, term.rows, _power(own.log_p, share))
    if allowed is not None:
        log_q = log_q.masked_fill(~allowed, -torch.inf)
    # log_softmax makes NaN of a row without mass.
    has_mass = log_q.amax(-1, keepdim=True) > -torch.inf
    return Aligner(torch.where(has_mass, log_q.log_softmax(-1), -torch.inf), strength, is_bad)


def _power(log_q: Float[Tensor, "rows vocab"], exponent: Float[Tensor, " rows"]) -> Tensor:
    """`log q^exponent`, with 0 · -inf = 0 and no +inf for negative exponents."""
    powered = log_q * exponent[:, None]
    is_usual = (exponent > 0)[:, None]
    floored = log_q.clamp(min=_LOG_FLOOR) * exponent[:, None]
    return torch.where(is_usual, powered, floored)
