"""Slow twins of the resampling step: a row at a time, in float64 and pure Python, by sorting, by enumeration.

Nothing here is shared with the code under test but the callers' parameters, so that both must be wrong in
the same way for a test to pass wrongly. `draw` runs the fast path on the same rows; modules whose tests use
the fixture `way` run it both in compiled code and in tensor operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch

from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import AlignerLogits, Draws, StepFeatures, StepParams, draw_tokens
from ram_core.resampling.step import draw_with_tensors

# Small tensors on a busy machine: threads that wait for each other cost more than they save.
torch.set_num_threads(1)

WAYS = {"compiled": draw_tokens, "tensors": draw_with_tensors}
TOKEN, CANDIDATES = 1, 2
EOS_ID = 1
GREEDY_BELOW = 1e-5


# Noise


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def noise(seed: int, position: int, purpose: int, lane: int = 0) -> float:
    """The uniform of (seed, position, purpose, lane), with Python's unbounded integers."""
    golden = 0x9E3779B97F4A7C15
    key = _mix((seed + golden) % 2**64)
    key = _mix(((key ^ (position % 2**64)) + golden) % 2**64)
    key = _mix(((key ^ purpose) + golden) % 2**64)
    return (_mix((key + (lane + 1) * golden) % 2**64) >> 11) / 2**53


# Distributions


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Normalised log-probabilities; a row without any support stays -inf."""
    scores = scores.astype(np.float64)
    top = scores.max()
    if top == -np.inf:
        return scores
    with np.errstate(divide="ignore"):
        return scores - top - np.log(np.exp(scores - top).sum())


def kl_divergence(log_a: np.ndarray, log_b: np.ndarray) -> float:
    """`KL(a‖b)`, with `0 · log 0 = 0`."""
    support = log_a > -np.inf
    return float((np.exp(log_a[support]) * (log_a[support] - log_b[support])).sum())


@dataclass
class Margin:
    """How far a row is from the nearest decision that float32 could take the other way."""

    value: float = math.inf

    def see(self, *distances: float) -> None:
        self.value = min([self.value, *(abs(float(distance)) for distance in distances)])


def keep(
    log_p: np.ndarray,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    margin: Margin | None = None,
) -> np.ndarray:
    """What `top_k`, then `top_p` of the rest, then `min_p` leave, found by sorting."""
    margin = margin or Margin()
    p = np.exp(log_softmax(log_p))
    order = np.argsort(-p, kind="stable")
    order = order[p[order] > 0]
    if 0 < top_k < len(order):
        margin.see(p[order[top_k - 1]] / p[order[top_k]] - 1)
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(p[order] / p[order].sum())
        num_kept = int(np.searchsorted(mass, top_p)) + 1
        margin.see(*(mass[: len(order) - 1] - top_p))
        order = order[:num_kept]
    if min_p > 0:
        ratio = p[order] / p[order[0]]
        margin.see(*(ratio[1:] - min_p))
        order = order[ratio >= min_p]
    kept = np.zeros(len(p), dtype=bool)
    kept[order] = True
    return kept


def pick(mass: np.ndarray, uniform: float, margin: Margin) -> int:
    """Inverse-CDF draw."""
    cumulative = np.cumsum(mass / mass.sum())
    margin.see(*(cumulative[:-1] - uniform))
    return int(np.flatnonzero((cumulative > uniform) & (mass > 0))[0])


# The law of candidates


def multisets(mass: np.ndarray, num_draws: int) -> Iterator[tuple[dict[int, int], float]]:
    """Every multiset of `num_draws` independent draws from `mass`, as counts, with its probability."""
    support = np.flatnonzero(mass)
    for draws in combinations_with_replacement(support.tolist(), num_draws):
        counts = Counter(draws)
        ways = math.factorial(num_draws) / math.prod(math.factorial(count) for count in counts.values())
        yield dict(counts), ways * math.prod(mass[token] ** count for token, count in counts.items())


def enumerate_candidates(
    mass: np.ndarray,
    weight: np.ndarray,
    num_candidates: int,
    finish: Callable[[np.ndarray], np.ndarray] = lambda law: law / law.sum(),
) -> np.ndarray:
    """The exact law of `candidates`: the mean over all multisets of what `finish` makes of one's weights."""
    law = np.zeros(len(mass))
    for counts, probability in multisets(mass, num_candidates):
        weighted = np.zeros(len(mass))
        for token, count in counts.items():
            weighted[token] = count * weight[token]
        law += probability * finish(weighted)
    return law


def integrate_candidates(mass: np.ndarray, weight: np.ndarray, num_candidates: int) -> np.ndarray:
    """The same law as `n p̃_v q_v ∫₀^∞ e^{−t q_v} (Σ_u p̃_u e^{−t q_u})^{n−1} dt`, for any n."""
    # Even steps in s = log t: the integrand is smooth and dies off at both ends, so they converge at once.
    step_size = 0.05
    t = np.exp(np.arange(-50, 50, step_size)) / (num_candidates * float(mass @ weight))
    decay = np.exp(-np.outer(t, weight))
    rest = (decay @ mass) ** (num_candidates - 1)
    return num_candidates * mass * weight * ((t * step_size * rest) @ decay)


# The step

_PLAIN, _DEFAULT = SamplingParams(), AlignmentParams()


@dataclass(frozen=True)
class Row:
    """Everything that one row's draw depends on. `terms` are (logits, strength) of its aligners."""

    logits: np.ndarray
    terms: tuple[tuple[np.ndarray, float], ...] = ()
    sampling: SamplingParams = _PLAIN
    alignment: AlignmentParams = _DEFAULT
    allowed: np.ndarray | None = None
    bias: np.ndarray | None = None
    seed: int = 0
    position: int = 0

    @property
    def params(self) -> tuple[SamplingParams, AlignmentParams]:
        terms = tuple(AlignerTerm(f"aligner-{i}", strength) for i, (_, strength) in enumerate(self.terms))
        return self.sampling, replace(self.alignment, terms=terms)


@dataclass(frozen=True)
class Step:
    """What a row must yield. `law` is None where it depends on drawn candidates."""

    token: int
    law: np.ndarray | None
    kl_p_q: float
    kl_pi_p: float
    ess: float
    aligner_mass: float
    is_fallback: bool
    margin: float


def combine(row: Row, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log weight, log q) of all of a row's terms: `w = Π q_i^β_i` and `q ∝ w^(1/Σ|β|)`."""
    strengths = [strength for _, strength in row.terms]
    total = sum(abs(strength) for strength in strengths)
    log_weight, log_q = np.zeros(len(row.logits)), np.zeros(len(row.logits))
    for (logits, strength), share in zip(
        row.terms, [s / total if total else 1 / len(strengths) for s in strengths], strict=True
    ):
        log_own = log_softmax(logits)
        for into, exponent in ((log_weight, strength), (log_q, share)):
            if exponent:
                into += exponent * log_own
    return log_weight, log_softmax(np.where(allowed, log_q, -np.inf))


def draw_candidates(row: Row, log_p: np.ndarray, nucleus: np.ndarray, margin: Margin) -> np.ndarray:
    """Counts of `num_candidates` draws from `p^(1/T)` on the nucleus, with the row's own noise."""
    tempered = log_softmax(np.where(nucleus, log_p / row.sampling.temperature, -np.inf))
    counts = np.zeros(len(log_p))
    for lane in range(row.alignment.num_candidates):
        counts[pick(np.exp(tempered), noise(row.seed, row.position, CANDIDATES, lane), margin)] += 1
    return counts


def finish(scores: np.ndarray, sampling: SamplingParams, margin: Margin) -> np.ndarray:
    """The final law of scores at temperature 1: temperature, then truncation."""
    is_greedy = sampling.temperature < GREEDY_BELOW
    scores = scores if is_greedy else scores / sampling.temperature
    kept = keep(scores, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, margin=margin)
    return np.exp(log_softmax(np.where(kept, scores, -np.inf)))


def step(row: Row) -> Step:
    """One row's step, in the order of docs/method.md."""
    margin = Margin()
    sampling, alignment = row.params
    is_greedy = sampling.temperature < GREEDY_BELOW
    allowed = np.ones(len(row.logits), dtype=bool) if row.allowed is None else row.allowed
    log_p = log_softmax(np.where(allowed, row.logits, -np.inf))
    scores, is_empirical, is_fallback = log_p, False, False
    kl_p_q = kl_pi_p = ess = mass = 0.0
    if not alignment.is_identity:
        log_weight, log_q = combine(row, allowed)
        nucleus = keep(
            log_p / alignment.proposal_temperature,
            top_k=alignment.proposal_top_k,
            top_p=alignment.proposal_top_p,
            margin=margin,
        )
        kl_p_q = kl_divergence(log_p, log_q)
        if kl_p_q < math.inf:
            margin.see(kl_p_q - alignment.kl_threshold)
        mode = alignment.resampling
        exact = np.where(nucleus, log_weight + (0 if mode is Resampling.NUCLEUS else log_p), -np.inf)
        is_gated = kl_p_q > alignment.kl_threshold
        aligned = exact
        if mode is Resampling.CANDIDATES and not is_greedy and not is_gated:
            counts = draw_candidates(row, log_p, nucleus, margin)
            with np.errstate(divide="ignore"):
                aligned = sampling.temperature * np.log(counts) + log_weight
            is_empirical = True
        is_fallback = is_gated or aligned.max() == -np.inf
        scores = log_p if is_fallback else aligned
        kl_pi_p = 0.0 if is_fallback else kl_divergence(log_softmax(exact), log_p)
        ess = effective_sample_size(log_p, log_weight, nucleus)
        mass = float(np.exp(log_q[nucleus]).sum())
    if alignment.eos_priority and not alignment.is_identity and log_p.argmax() == EOS_ID:
        scores = np.where(np.arange(len(log_p)) == EOS_ID, 0.0, -np.inf)
    if row.bias is not None:
        scores = scores + row.bias
    law = finish(scores, sampling, margin)
    if is_greedy:
        first, second = np.sort(scores)[::-1][:2] if len(scores) > 1 else (scores[0], -np.inf)
        margin.see(first - second)
        token = int(scores.argmax())
    else:
        token = pick(law, noise(row.seed, row.position, TOKEN), margin)
    return Step(
        token, None if is_empirical else law, kl_p_q, kl_pi_p, ess, mass, bool(is_fallback), margin.value
    )


def effective_sample_size(log_p: np.ndarray, log_weight: np.ndarray, nucleus: np.ndarray) -> float:
    """`(Σ m w)² / Σ m w²` with `m` the renormalised nucleus mass."""
    if log_weight[nucleus].max() == -np.inf:
        return 0.0
    m = np.exp(log_p[nucleus]) / np.exp(log_p[nucleus]).sum()
    w = np.exp(log_weight[nucleus] - log_weight[nucleus].max())
    return float((m @ w) ** 2 / (m @ w**2))


def random_row(rng: np.random.Generator, vocab_size: int) -> Row:
    """Any mixture of everything that a row may ask for."""

    def logits(holes: float) -> np.ndarray:
        # Float32, so that both paths start from the same numbers.
        drawn = (rng.normal(size=vocab_size) * rng.choice([0.3, 1.5, 4.0])).astype(np.float32)
        drawn[rng.random(vocab_size) < holes] = -np.inf
        drawn[rng.integers(vocab_size)] = 0.5
        return drawn.astype(np.float64)

    strengths = rng.choice([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0], size=rng.choice([0, 1, 1, 2, 3]))
    own = logits(holes=rng.choice([0, 0.3]))
    allowed = None
    if rng.random() < 0.3:
        allowed = rng.random(vocab_size) < 0.6
        allowed[int(own.argmax())] = True
    return Row(
        own,
        tuple((logits(holes=rng.choice([0, 0, 0.2]) * (strength > 0)), strength) for strength in strengths),
        SamplingParams(
            temperature=rng.choice([0.0, 1e-6, 0.3, 0.7, 1.0, 1.0, 2.0]),
            top_k=int(rng.choice([0, 0, 1, 2, 5])),
            top_p=rng.choice([0.5, 0.9, 1.0, 1.0]),
            min_p=rng.choice([0.0, 0.0, 0.05, 0.3]),
        ),
        AlignmentParams(
            resampling=list(Resampling)[rng.integers(4)],
            num_candidates=int(rng.choice([1, 2, 5, 16])),
            proposal_temperature=rng.choice([0.5, 1.0, 2.0]),
            proposal_top_p=rng.choice([0.3, 0.8, 0.95, 1.0]),
            proposal_top_k=int(rng.choice([0, 0, 1, 3])),
            kl_threshold=rng.choice([math.inf, math.inf, 1.0, 0.1, -1.0]),
            eos_priority=bool(rng.random() < 0.2),
        ),
        allowed,
        rng.normal(size=vocab_size).astype(np.float32) * 2 if rng.random() < 0.3 else None,
        seed=int(rng.integers(-(2**62), 2**62)),
        position=int(rng.integers(2**20)),
    )


def random_rows(vocab_size: int, num_rows: int = 400) -> list[Row]:
    """The same rows each time."""
    rng = np.random.default_rng(vocab_size)
    return [random_row(rng, vocab_size) for _ in range(num_rows)]


# The fast path on the same rows


def draw(
    rows: Sequence[Row],
    *,
    features: StepFeatures | None = None,
    dtype: torch.dtype = torch.float32,
    padding: Sequence[float] = (),
    aligner_padding: Sequence[float] = (),
) -> Draws:
    """The rows as one batch, with the whole law asked for as top log-probabilities.

    All rows share one vocabulary size. `padding` columns are appended to each model's logits.
    """

    def tensor(logits: list[np.ndarray], columns: Sequence[float]) -> torch.Tensor:
        real = torch.from_numpy(np.stack(logits)).to(dtype)
        extra = torch.tensor(columns, dtype=dtype).expand(len(real), -1)
        return torch.cat([real, extra], dim=-1)

    vocab_size = len(rows[0].logits)
    params = [row.params for row in rows]
    terms = []
    for nth in range(max(len(row.terms) for row in rows)):
        having = [i for i, row in enumerate(rows) if len(row.terms) > nth]
        terms.append(
            AlignerLogits(
                rows=torch.tensor(having),
                logits=tensor([rows[i].terms[nth][0] for i in having], aligner_padding),
                strength=torch.tensor([rows[i].terms[nth][1] for i in having], dtype=torch.float32),
            )
        )
    return draw_tokens(
        tensor([row.logits for row in rows], padding),
        terms,
        StepParams.of(params, seeds=[row.seed for row in rows], positions=[row.position for row in rows]),
        replace(features or StepFeatures.of(params), max_top_log_probs=vocab_size),
        vocab_size=vocab_size,
        eos_ids=torch.tensor([EOS_ID]),
        allowed=_stack([row.allowed for row in rows], np.ones(vocab_size, dtype=bool)),
        bias=_stack([row.bias for row in rows], np.zeros(vocab_size, dtype=np.float32)),
    )


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `draw` go one way, then the other."""
    monkeypatch.setitem(globals(), "draw_tokens", WAYS[request.param])
    return request.param


def _stack(given: Sequence[np.ndarray | None], default: np.ndarray) -> torch.Tensor | None:
    if all(one is None for one in given):
        return None
    return torch.from_numpy(
        np.stack([default if one is None else one.astype(default.dtype) for one in given])
    )


def laws(draws: Draws) -> np.ndarray:
    """The laws that the rows were drawn from, back in the order of the vocabulary."""
    law = torch.empty_like(draws.top_log_prob).scatter_(1, draws.top_token, draws.top_log_prob)
    return law.exp().double().numpy()


# Bounds


def assert_follows(tokens: torch.Tensor | np.ndarray, law: np.ndarray) -> None:
    """Pearson's χ² of the tokens' counts stays below a bound that a true law exceeds once in 10⁶ times.

    Laurent and Massart's tail: P(χ²_k ≥ k + 2√(kx) + 2x) ≤ e^(−x). A token of no probability must not
    occur at all; cells are meant to expect a few counts at least.
    """
    counts = np.bincount(np.asarray(tokens), minlength=len(law))
    assert counts[law == 0].sum() == 0
    expected = law[law > 0] * counts.sum()
    assert expected.min() > 4
    degrees = len(expected) - 1
    x = 6 * math.log(10)
    chi_square = float(((counts[law > 0] - expected) ** 2 / expected).sum())
    assert chi_square < degrees + 2 * math.sqrt(degrees * x) + 2 * x
