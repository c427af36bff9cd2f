"""What a caller may ask of one generation: validated here, once, and trusted everywhere after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from ram_core.errors import InvalidRequest

MAX_CANDIDATES = 256
MAX_TOP_LOG_PROBS = 20
MAX_STRENGTH = 100.0


class Resampling(StrEnum):
    """From which distribution a step draws (arXiv 2505.19700; see docs/method.md)."""

    PRODUCT = "product"
    CANDIDATES = "candidates"
    NUCLEUS = "nucleus"
    PROPOSAL = "proposal"


def require_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    """Raise `InvalidRequest` unless `low <= value <= high`, or `low < value` with `above_low`; NaN fails."""
    is_low_enough = value > low if above_low else value >= low
    if not (is_low_enough and value <= high):
        bracket = "(" if above_low else "["
        raise InvalidRequest(f"`{name}` must be in {bracket}{low:g}, {high:g}], got {value!r}.", param=name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn from the distribution that the client talks to (the aligned one, if aligned).

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `max_tokens` 0 means as many as
    the context holds. `seed` makes the draws reproducible; without one, the engine picks it.
    `num_top_log_probs` asks for that many alternatives beside each token's own log-probability.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_top_log_probs: int = 0

    def __post_init__(self) -> None:
        require_range("temperature", self.temperature, 0, 2)
        require_range("top_p", self.top_p, 0, 1, above_low=True)
        require_range("top_k", self.top_k, 0, 2**31 - 1)
        require_range("min_p", self.min_p, 0, 1)
        require_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        require_range("top_logprobs", self.num_top_log_probs, 0, MAX_TOP_LOG_PROBS)
        if self.seed is not None:
            require_range("seed", self.seed, -(2**63), 2**63 - 1)
        if not all(self.stop):
            raise InvalidRequest("`stop` must not hold an empty string.", param="stop")


@dataclass(frozen=True, slots=True)
class AlignerTerm:
    """One factor `q_i(v)^strength` of the importance weight: an aligner by name, and its exponent."""

    aligner: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_range("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)


@dataclass(frozen=True, slots=True)
class AlignmentParams:
    """Which aligners re-weight the proposal's candidates, and how. No terms: the identity aligner.

    `proposal_temperature`, `proposal_top_p` and `proposal_top_k` cut the nucleus of candidates from the
    proposal and act only when an aligner is in play. A step whose KL(p‖q) in nats exceeds `kl_threshold`
    falls back to the proposal. With `eos_priority` the text ends whenever the proposal's most probable
    token is an end of text.
    """

    terms: tuple[AlignerTerm, ...] = ()
    resampling: Resampling = Resampling.PRODUCT
    num_candidates: int = 16
    proposal_temperature: float = 1.0
    proposal_top_p: float = 0.95
    proposal_top_k: int = 0
    kl_threshold: float = math.inf
    eos_priority: bool = False

    def __post_init__(self) -> None:
        require_range("candidates", self.num_candidates, 1, MAX_CANDIDATES)
        require_range("proposal_temperature", self.proposal_temperature, 0, 100, above_low=True)
        require_range("proposal_top_p", self.proposal_top_p, 0, 1, above_low=True)
        require_range("proposal_top_k", self.proposal_top_k, 0, 2**31 - 1)
        if math.isnan(self.kl_threshold):
            raise InvalidRequest("`kl_threshold` must be a number, got nan.", param="kl_threshold")
        names = [term.aligner for term in self.terms]
        if len(set(names)) != len(names):
            raise InvalidRequest("`aligners` must not name one aligner twice.", param="aligners")

    @property
    def is_identity(self) -> bool:
        """Whether the proposal answers alone."""
        return not self.terms or self.resampling is Resampling.PROPOSAL
