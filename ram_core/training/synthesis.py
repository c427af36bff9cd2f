"""Many prompts answered at once by a proposal, alone or under aligners: for synthesis and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.local import Choice, LocalEngine
from ram_core.params import AlignmentParams, SamplingParams

# Wide: nobody waits for a single answer here.
_MAX_BATCH = 128
_MAX_STEP_TOKENS = 2048


def load_engine(proposal: Path, aligners: Mapping[str, Path]) -> LocalEngine:
    """An engine on the CPU for many prompts at once. Raises `CheckpointError` if a model cannot be served."""
    return LocalEngine.load(
        EngineConfig(
            proposal=str(proposal),
            aligners=tuple(AlignerSource(name, str(path)) for name, path in aligners.items()),
            device="cpu",
            max_batch=_MAX_BATCH,
            max_step_tokens=_MAX_STEP_TOKENS,
            # Nobody waits for a next token here.
            max_chunk_tokens=_MAX_STEP_TOKENS,
        )
    )


def answer_all(
    engine: LocalEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    alignment: AlignmentParams,
    *,
    on_done: Callable[[int], None],
) -> list[Choice]:
    """One answer to each of `prompts` (token ids), in their order; `on_done` hears how many are finished.

    Every prompt has noise of its own, derived from `sampling.seed` and its place, so that equal prompts get
    different answers and a rerun gets the same. Raises what `LocalEngine.generate` raises.
    """
    num_done = 0

    def count(_index: int, _choice: Choice) -> None:
        nonlocal num_done
        num_done += 1
        on_done(num_done)

    seeds = range(sampling.seed or 0, (sampling.seed or 0) + len(prompts))
    each = [replace(sampling, seed=seed) for seed in seeds]
    return engine.generate(prompts, each, alignment, on_finish=count)
