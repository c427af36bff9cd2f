"""The lines of the table, in order: for each, how a seed's models are made and examined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.reproduction.measures import Exam, Figures
from benchmarks.reproduction.models import ALPHA, ALPHAS, Cost, Models
from ram_core.evaluation.answering import Bench
from ram_core.params import AlignerTerm, AlignmentParams, Resampling
from ram_core.training.errors import RunawayAscentError

CANDIDATES = (5, 10, 20, 50)
AUTHORS_GATE = 0.1
GATES = (0.5, 1.0, 2.0)
FULL_SFT = "full SFT of the proposal"
ALONE = "proposal alone"
NOTHING = Figures(math.nan, math.nan)
"""Of a model that there is not."""


@dataclass(frozen=True)
class Line:
    """A line of one seed. `cost` is None where nothing was trained; `group` heads its table."""

    group: str
    name: str
    figures: Figures
    cost: Cost | None = None


@dataclass
class Seed:
    """All lines of one seed."""

    models: Models
    exam: Exam
    _benches: dict[str, Bench] = field(default_factory=dict)

    def lines(self) -> Iterator[Line]:
        yield from self._peers()
        yield from self._objectives()
        yield from self._on_tuned_proposals()
        yield from self._sizes()
        yield from self._modes()

    def _peers(self) -> Iterator[Line]:
        """What one would do instead."""
        base = self.models.proposal("base")
        group = "without an aligner"
        alone = self.exam.bench(base)
        yield Line(group, ALONE, self.exam.by_itself(alone))
        small = self.models.aligner("sft", objective="sft")
        yield self._line(
            group, "SFT of the small model, alone", "sft", self.exam.by_itself(self.exam.bench(small))
        )
        tuned = self.exam.bench(self.models.tuned())
        yield self._line(group, FULL_SFT, "full-sft", self.exam.by_itself(tuned, base))
        preferring = self.exam.bench(self.models.preferring())
        yield self._line(group, "DPO of the proposal", "full-dpo", self.exam.by_itself(preferring, base))
        rewriter = self.models.rewriter()
        yield self._line(
            group, "rewriter of the aligner's size", "rewriter", self.exam.rewritten(alone, rewriter)
        )

    def _objectives(self) -> Iterator[Line]:
        group = "objectives"
        for alpha in ALPHAS:
            yield self._aligned(group, f"RAM, α = {alpha:g}", f"ram-{alpha:g}", alpha=alpha)
        yield self._aligned(group, "ram-token", "ram-token", objective="ram-token")
        yield self._aligned(group, "ram-dpo", "ram-dpo", objective="ram-dpo")

    def _on_tuned_proposals(self) -> Iterator[Line]:
        for name, words in (("sft", "SFT"), ("dpo", "DPO")):
            yield self._aligned(
                "on tuned proposals", f"RAM on the {words} proposal", f"on-{name}", proposal=name
            )

    def _sizes(self) -> Iterator[Line]:
        for size in ("small", "medium", "large"):
            name = f"ram-{ALPHA:g}" if size == "medium" else f"ram-{size}"
            yield self._aligned("sizes", size, name, size=size)

    def _modes(self) -> Iterator[Line]:
        group = "modes and gates"
        name = f"ram-{ALPHA:g}"
        modes = [("product", {}), ("nucleus", {"resampling": Resampling.NUCLEUS})]
        modes += [
            (f"candidates, n = {count}", {"resampling": Resampling.CANDIDATES, "num_candidates": count})
            for count in CANDIDATES
        ]
        for words, mode in modes:
            yield self._aligned(group, words, name, mode=mode)
            gated = mode | {"kl_threshold": AUTHORS_GATE}
            yield self._aligned(group, f"{words}, gate {AUTHORS_GATE:g}", name, mode=gated)
        for gate in GATES:
            yield self._aligned(group, f"product, gate {gate:g}", name, mode={"kl_threshold": gate})

    def _aligned(
        self, group: str, words: str, name: str, *, mode: dict[str, object] | None = None,
        proposal: str = "base", **training: object,
    ) -> Line:  # fmt: skip
        if name not in self._benches:
            try:
                model = self.models.aligner(name, proposal=proposal, **training)
            except RunawayAscentError:
                return Line(group, f"{words}: ran away, stopped", NOTHING)
            # One engine at a time is enough.
            self._benches = {name: self.exam.bench(self.models.proposal(proposal), {"aligner": model})}
        alignment = AlignmentParams((AlignerTerm("aligner"),), **(mode or {}))
        return self._line(group, words, name, self.exam.aligned(self._benches[name], alignment))

    def _line(self, group: str, words: str, model: str, figures: Figures) -> Line:
        return Line(group, words, figures, self.models.costs[model])
