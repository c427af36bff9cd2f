"""The settings of an evaluation: each aligner as it recommends itself, or what is to be tried instead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ram_core.aligners.manifest import Manifest
from ram_core.evaluation.answering import Setting
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams


@dataclass(frozen=True)
class Sweep:
    """What is tried of each knob; an empty tuple is what the aligner's manifest recommends.

    `candidates` are tried with `resampling` "candidates" alone. A threshold of infinity is no gate.
    """

    strengths: tuple[float, ...] = ()
    resampling: tuple[Resampling, ...] = ()
    candidates: tuple[int, ...] = ()
    kl_thresholds: tuple[float, ...] = ()


def settings_of(manifests: Mapping[str, Manifest], sweep: Sweep, sampling: SamplingParams) -> list[Setting]:
    """A setting for each aligner and each combination. Raises `InvalidRequest` for a knob out of range."""
    return [
        Setting(_label(alignment), alignment, sampling)
        for name, manifest in manifests.items()
        for alignment in _alignments(name, manifest, sweep)
    ]


def _alignments(name: str, manifest: Manifest, sweep: Sweep) -> Iterator[AlignmentParams]:
    recommended = AlignmentParams().num_candidates if manifest.candidates is None else manifest.candidates
    gate = math.inf if manifest.kl_threshold is None else manifest.kl_threshold
    for resampling, strength, threshold in itertools.product(
        sweep.resampling or (manifest.resampling,),
        sweep.strengths or (manifest.strength,),
        sweep.kl_thresholds or (gate,),
    ):
        counts: Sequence[int] = sweep.candidates or (recommended,)
        for count in counts if resampling is Resampling.CANDIDATES else (recommended,):
            yield AlignmentParams(
                (AlignerTerm(name, strength),),
                resampling=resampling,
                num_candidates=count,
                kl_threshold=threshold,
            )


def _label(alignment: AlignmentParams) -> str:
    [term] = alignment.terms
    words = [f"{term.aligner} × {term.strength:g}"]
    if alignment.resampling is Resampling.CANDIDATES:
        words.append(f"candidates {alignment.num_candidates}")
    elif alignment.resampling is not Resampling.PRODUCT:
        words.append(str(alignment.resampling))
    if alignment.kl_threshold < math.inf:
        words.append(f"gate {alignment.kl_threshold:g}")
    return " ".join(words)
