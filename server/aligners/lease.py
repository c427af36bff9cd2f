"""What a request gets for the aligners that it names: versions, models and defaults, for a while."""

from __future__ import annotations

from dataclasses import dataclass

from ram_core.params import AlignerTerm, Resampling


@dataclass(frozen=True, slots=True)
class LentAligner:
    """An aligner that a request named, the version that answers, and how strongly it pulls."""

    name: str
    version: str
    strength: float


@dataclass(frozen=True, slots=True)
class Lease:
    """Versions that stay in memory until the lease is given back.

    `terms` name the engine's models. `resampling`, `kl_threshold` and `num_candidates` are what holds if the
    request says nothing; None leaves that to the core.
    """

    aligners: tuple[LentAligner, ...] = ()
    terms: tuple[AlignerTerm, ...] = ()
    resampling: Resampling | None = None
    kl_threshold: float | None = None
    num_candidates: int | None = None


NOTHING = Lease()
"""For the proposal alone."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an administrator lets hold for an aligner, whatever its manifests say; None changes nothing."""

    strength: float | None = None
    resampling: Resampling | None = None
    kl_threshold: float | None = None
    num_candidates: int | None = None
