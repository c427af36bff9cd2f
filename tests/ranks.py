"""One of several processes that share a proposal: run by torchrun, or with its environment, from the tests.

`python -m tests.ranks once OUT DIRECTORY…` writes what the engine of each saved pair says. With `forever`
instead, it goes on doing that, and takes a rank for dead that is late by three seconds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request, TokenEvent
from ram_core.engine.ranks import engine_of_ranks
from ram_core.models import tensor_parallel
from ram_core.models.kv import KvPool
from ram_core.models.packing import Row, pack
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams

PROMPTS = [tuple(range(20, 20 + length)) for length in (3, 40, 17)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ALIGNED = AlignmentParams((AlignerTerm("polite", 1.5),))


def config_of(directory: Path, **changes: Any) -> EngineConfig:
    """A pair that `save_pair` saved, in small steps, so that prompts are chunked."""
    aligners = (AlignerSource("polite", str(directory / "polite")),)
    config = EngineConfig(str(directory / "proposal"), aligners, device="cpu", page_size=4, max_batch=4)
    return replace(config, max_step_tokens=24, **changes)


def answers(engine: Engine) -> dict[str, Any]:
    """Greedy tokens of a batch, drawn twice so that prefixes are found; logits of two rows; sizes."""
    told: list[list[int]] = []
    for _ in range(2):
        for index, prompt in enumerate(PROMPTS):
            engine.handle(Request(str(index), prompt, GREEDY, ALIGNED if index % 2 else AlignmentParams()))
        drawn: list[list[int]] = [[] for _ in PROMPTS]
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    drawn[int(event.request_id)].append(event.token_id)
        told += drawn
    return {
        "tokens": told,
        "num_cached": engine.stats.num_cached_tokens,
        "logits": logits(engine).tolist(),
        "kv_heads": [layer.num_kv_heads for layer in engine.bank.proposal.geometry.layers],
        "weight_bytes": engine.bank.proposal.weight_bytes,
    }


def logits(engine: Engine) -> torch.Tensor:
    """Of a short and a long row, over pages that nobody uses any more."""
    bank = engine.bank
    pool: KvPool = bank.pools[bank.proposal_pool]
    rows = [Row([7], 0, [1]), Row(list(range(30, 41)), 0, [4, 2, 3])]
    return bank.proposal.forward(pack(rows, page_size=4, device=bank.proposal.device), pool)


def main(how: str, out: str, *directories: str) -> None:
    torch.set_num_threads(1)
    if how == "forever":
        tensor_parallel.COLLECTIVE_S = 3.0
    said = {}
    for directory in directories:
        with engine_of_ranks(config_of(Path(directory), tensor_parallel=2)) as engine:
            while engine is not None:
                said[Path(directory).name] = answers(engine)
                Path(out).write_text(json.dumps(said))
                if how == "once":
                    break


if __name__ == "__main__":
    main(*sys.argv[1:])
