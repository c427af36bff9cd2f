"""From models' raw logits to log-probabilities over the shared vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Normalised float32 log-probabilities; `is_bad` rows held NaN, +inf or nothing, and mean nothing."""

    log_p: Float[Tensor, "batch vocab"]
    is_bad: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class AlignerLogits:
    """Aligners' raw logits for the batch rows `rows`, and the `strength` that they have in each.

    No row occurs twice. Row numbers that equal the batch's number of rows are padding, which is ignored.
    """

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
    with NaN, with +inf, or without any finite logit is bad and is reported; what follows keeps rows apart,
    so it harms no neighbour. `allowed` is a grammar's mask.
    """
    logits = logits[:, :vocab_size].float()
    top = logits.amax(-1)
    # amax passes NaN on, so one cheap look at it finds all three kinds of bad row.
    is_bad = ~top.isfinite()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
        is_bad = is_bad | ~logits.amax(-1).isfinite()
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
    terms: Sequence[AlignerLogits],
    *,
    num_rows: int,
    vocab_size: int,
    has_mixtures: bool,
    allowed: Bool[Tensor, "batch vocab"] | None = None,
) -> Aligner:
    """Compose every row's weighted terms into one aligner, so that `Π q_i^(β_i) ∝ q^strength`.

    A row may occur in several terms, and weights may be negative (contrast), if `has_mixtures`; without, each
    row has at most one term, of a weight that is not negative. The grammar's mask `allowed` comes last: a
    contrast must not turn its zeros into preferences. Where nothing has any mass, as when terms share no
    token, `log_q` is -inf throughout.
    """
    device = terms[0].logits.device
    # One more row, where padding goes.
    log_q = torch.zeros(num_rows + 1, vocab_size, dtype=torch.float32, device=device)
    is_bad = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
    strength = torch.zeros(num_rows + 1, dtype=torch.float32, device=device)
    for term in terms:
        strength.index_add_(0, term.rows, term.strength.abs())
    shares = _shares(terms, strength) if has_mixtures else None
    # A lone aligner is normalised already; doing it again would move last bits by what other rows ask for.
    is_loose = torch.zeros_like(is_bad)
    for index, term in enumerate(terms):
        own = log_probs(term.logits, vocab_size)
        is_bad[term.rows] |= own.is_bad
        powered = own.log_p if shares is None else _power(own.log_p, shares[index])
        log_q.index_add_(0, term.rows, powered)
        if shares is not None:
            is_loose[term.rows] |= shares[index] != 1
    log_q, strength, is_bad, is_loose = log_q[:-1], strength[:-1], is_bad[:-1], is_loose[:-1]
    if allowed is not None:
        log_q = log_q.masked_fill(~allowed, -torch.inf)
        is_loose |= ~allowed.all(-1)
    if allowed is not None or has_mixtures:
        log_q = torch.where(is_loose[:, None], _normalised(log_q), log_q)
    return Aligner(log_q, strength, is_bad)


def _normalised(log_q: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """`log_softmax`, but -inf instead of NaN for a row without mass."""
    has_mass = log_q.amax(-1, keepdim=True) > -torch.inf
    return torch.where(has_mass, log_q.log_softmax(-1), -torch.inf)


def _shares(
    terms: Sequence[AlignerLogits], strength: Float[Tensor, " batch"]
) -> list[Float[Tensor, " rows"]]:
    """Each term's part of its rows' strength; all-zero ones weigh alike, so that telemetry still speaks."""
    num_terms = torch.zeros_like(strength)
    for term in terms:
        num_terms.index_add_(0, term.rows, torch.ones_like(term.strength))
    totals = [strength[term.rows] for term in terms]
    return [
        torch.where(total > 0, term.strength / total.clamp(min=1e-30), 1 / num_terms[term.rows])
        for term, total in zip(terms, totals, strict=True)
    ]


def _power(log_q: Float[Tensor, "rows vocab"], exponent: Float[Tensor, " rows"]) -> Tensor:
    """`log q^exponent`, with 0 · -inf = 0 and no +inf for negative exponents."""
    powered = log_q * exponent[:, None]
    is_usual = (exponent > 0)[:, None]
    floored = log_q.clamp(min=_LOG_FLOOR) * exponent[:, None]
    return torch.where(is_usual, powered, floored)
