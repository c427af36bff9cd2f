"""Our engine in this process, driven step by step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Cancel, FailedEvent, Request, TokenEvent
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """Which models to load, and how much room they need; `aligners` are directories."""

    proposal: str
    aligners: tuple[str, ...]
    device: str
    dtype: str
    max_batch: int
    kv_bytes: int
    prefix_cache: bool = True
    is_overlapping: bool | None = None
    aligner_bank: bool = True
    aligner_slots: int = 0
    cuda_graphs: bool | None = None
    compile: bool = False

    def config(self) -> EngineConfig:
        """What users get by default, but for the room."""
        return EngineConfig(
            proposal=self.proposal,
            aligners=tuple(AlignerSource(f"aligner-{at}", path) for at, path in enumerate(self.aligners)),
            device=self.device,
            dtype=self.dtype,
            max_batch=self.max_batch,
            kv_memory_bytes=self.kv_bytes,
            prefix_cache=self.prefix_cache,
            is_overlapping=self.is_overlapping,
            aligner_bank=self.aligner_bank,
            aligner_slots=self.aligner_slots,
            cuda_graphs=self.cuda_graphs,
            compile=self.compile,
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some steps: how long each took, and the gaps between the tokens of each stream."""

    steps_s: tuple[float, ...]
    gaps_s: tuple[float, ...]


class EngineWay:
    """Requests name an aligner by its number, or -1 for none."""

    def __init__(self, job: Job) -> None:
        self.engine = Engine.load(job.config())
        self._default = 0 if job.aligners else -1
        self._numbers = itertools.count()
        self._held: list[str] = []
        self._last_s: dict[str, float] = {}
        self._gaps_s: list[float] = []

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Continue all prompts by so many tokens; return the seconds it took."""
        began = time.perf_counter()
        for prompt in prompts:
            self._ask(prompt, num_tokens, self._default)
        while self.engine.has_work:
            self._advance()
        return time.perf_counter() - began

    def hold(self, prompts: Sequence[Sequence[int]], aligners: Sequence[int] | None = None) -> None:
        """Start streams that go on until they are released; return when each has drawn a token.

        Their prompts are read once before, so that all begin together behind what the prefix cache kept:
        else the first would write hundreds of tokens while the prompts of the last are read.

        Raises:
            RuntimeError: the engine has no room for all of them at once.
        """
        chosen = aligners if aligners is not None else [self._default] * len(prompts)
        for prompt, aligner in zip(prompts, chosen, strict=True):
            self._ask(prompt, 1, aligner)
        while self.engine.has_work:
            self._advance()
        self._held = [self._ask(prompt, 0, aligner) for prompt, aligner in zip(prompts, chosen, strict=True)]
        waiting = set(self._held)
        while waiting:
            waiting -= self._advance()
        stats = self.engine.stats
        if stats.num_running != len(self._held) or stats.num_preemptions:
            raise RuntimeError(f"there is no room for {len(self._held)} streams at once")

    def steps(self, num_steps: int) -> Stretch:
        """Go on with the streams that are held."""
        self._gaps_s = []
        took = []
        for _ in range(num_steps):
            began = time.perf_counter()
            self._advance()
            took.append(time.perf_counter() - began)
        return Stretch(tuple(took), tuple(self._gaps_s))

    def first_token(self, prompt: Sequence[int], aligner: int | None = None) -> tuple[float, Stretch]:
        """Seconds until a newcomer's first token, and what became of the held streams meanwhile."""
        self._gaps_s = []
        took = []
        began = time.perf_counter()
        name = self._ask(prompt, 1, self._default if aligner is None else aligner)
        has_come = False
        while not has_come:
            step_began = time.perf_counter()
            has_come = name in self._advance()
            took.append(time.perf_counter() - step_began)
        return time.perf_counter() - began, Stretch(tuple(took), tuple(self._gaps_s))

    def release(self) -> None:
        """End all held streams."""
        for name in self._held:
            self.engine.handle(Cancel(name))
        while self.engine.has_work:
            self._advance()
        self._held = []
        self._last_s = {}

    def _ask(self, prompt: Sequence[int], num_tokens: int, aligner: int) -> str:
        name = str(next(self._numbers))
        terms = (AlignerTerm(f"aligner-{aligner}"),) if aligner >= 0 else ()
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)
        self.engine.handle(Request(name, tuple(prompt), sampling, AlignmentParams(terms)))
        return name

    def _advance(self) -> set[str]:
        """One step; return who drew a token in it. Raises what a request failed of."""
        told: Iterable[object] = self.engine.step()
        now = time.perf_counter()
        drew = set()
        for event in told:
            if isinstance(event, FailedEvent):
                raise event.error
            if isinstance(event, TokenEvent):
                drew.add(event.request_id)
                if event.request_id in self._last_s:
                    self._gaps_s.append(now - self._last_s[event.request_id])
                if event.finish_reason is None:
                    self._last_s[event.request_id] = now
                else:
                    self._last_s.pop(event.request_id, None)
        return drew
