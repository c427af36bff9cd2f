"""The parameters of one step as tensors: one entry a row, gathered from the engine's slot tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ram_core.params import AlignmentParams, Resampling, SamplingParams


class Mode(IntEnum):
    """`Resampling` as a number in a tensor."""

    PROPOSAL = 0
    PRODUCT = 1
    CANDIDATES = 2
    NUCLEUS = 3


# Below this a division by the temperature overflows float32; the draw is the arg max long before.
MIN_TEMPERATURE = 1e-5

_MODES = {mode: Mode[mode.name] for mode in Resampling}


@dataclass(frozen=True, slots=True)
class StepParams:
    """Per-row parameters of a batch; rows of different requests never look at each other's.

    `temperature` 0 is greedy. `position` is the index in the sequence of the token to be drawn; with
    `seed` it keys the row's noise.
    """

    mode: Int64[Tensor, " batch"]
    temperature: Float[Tensor, " batch"]
    top_k: Int64[Tensor, " batch"]
    top_p: Float[Tensor, " batch"]
    min_p: Float[Tensor, " batch"]
    num_candidates: Int64[Tensor, " batch"]
    proposal_temperature: Float[Tensor, " batch"]
    proposal_top_k: Int64[Tensor, " batch"]
    proposal_top_p: Float[Tensor, " batch"]
    kl_threshold: Float[Tensor, " batch"]
    has_eos_priority: Bool[Tensor, " batch"]
    seed: Int64[Tensor, " batch"]
    position: Int64[Tensor, " batch"]

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str = "cpu") -> StepParams:
        """A slot table of identity rows."""
        identity = (SamplingParams(), AlignmentParams())
        return cls.of([identity] * num_rows, seeds=[0] * num_rows, positions=[0] * num_rows).to(device)

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[SamplingParams, AlignmentParams]],
        *,
        seeds: Sequence[int],
        positions: Sequence[int],
    ) -> StepParams:
        """Spread what callers asked for into tensors, in the order of `rows`."""

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        sampling = [row[0] for row in rows]
        alignment = [row[1] for row in rows]
        return cls(
            mode=ints([Mode.PROPOSAL if a.is_identity else _MODES[a.resampling] for a in alignment]),
            temperature=floats([s.temperature for s in sampling]),
            top_k=ints([s.top_k for s in sampling]),
            top_p=floats([s.top_p for s in sampling]),
            min_p=floats([s.min_p for s in sampling]),
            num_candidates=ints([a.num_candidates for a in alignment]),
            proposal_temperature=floats([a.proposal_temperature for a in alignment]),
            proposal_top_k=ints([a.proposal_top_k for a in alignment]),
            proposal_top_p=floats([a.proposal_top_p for a in alignment]),
            kl_threshold=floats([a.kl_threshold for a in alignment]),
            has_eos_priority=torch.tensor(
                [
                    a.eos_priority and not a.is_identity and not s.ignore_eos
                    for s, a in zip(sampling, alignment, strict=True)
                ],
                dtype=torch.bool,
            ),
            seed=ints(seeds),
            position=ints(positions),
        )

    def take(self, rows: Int64[Tensor, " rows"]) -> StepParams:
        """The parameters of `rows`, in that order."""
        return StepParams(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def put(self, row: int, params: StepParams) -> None:
        """Write the only row of `params` into `row`."""
        for f in fields(self):
            getattr(self, f.name)[row] = getattr(params, f.name)[0]

    def to(self, device: torch.device | str) -> StepParams:
        """A copy on `device`."""
        return StepParams(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """Which parts of the step any row of the batch needs, known to the host without asking the device.

    A part that no row needs costs nothing; running it all the same changes no row's law.
    """

    is_aligned: bool = False
    has_proposal_temperature: bool = False
    has_proposal_top_k: bool = False
    has_proposal_top_p: bool = False
    has_mixtures: bool = False
    has_nucleus_mode: bool = False
    max_candidates: int = 0
    has_greedy: bool = False
    has_top_k: bool = False
    has_top_p: bool = False
    has_min_p: bool = False
    has_eos_priority: bool = False
    max_top_log_probs: int = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, AlignmentParams]]) -> StepFeatures:
        """What `rows` need together."""
        sampling = [row[0] for row in rows]
        alignment = [row[1] for row in rows if not row[1].is_identity]
        drawn = [a.num_candidates for a in alignment if a.resampling is Resampling.CANDIDATES]
        return cls(
            is_aligned=bool(alignment),
            has_proposal_temperature=any(a.proposal_temperature != 1 for a in alignment),
            has_proposal_top_k=any(a.proposal_top_k for a in alignment),
            has_proposal_top_p=any(a.proposal_top_p < 1 for a in alignment),
            has_mixtures=any(len(a.terms) > 1 or any(t.strength < 0 for t in a.terms) for a in alignment),
            has_nucleus_mode=any(a.resampling is Resampling.NUCLEUS for a in alignment),
            max_candidates=max(drawn, default=0),
            has_greedy=any(s.temperature < MIN_TEMPERATURE for s in sampling),
            has_top_k=any(s.top_k for s in sampling),
            has_top_p=any(s.top_p < 1 for s in sampling),
            has_min_p=any(s.min_p for s in sampling),
            has_eos_priority=any(a.eos_priority for a in alignment),
            max_top_log_probs=max((s.num_top_log_probs for s in sampling), default=0),
        )
