"""The same engine on CUDA: against the plain forward there, and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request
from ram_core.params import Resampling
from tests.exactness.test_engine import (
    ALIGNED,
    FAMILIES,
    GREEDY,
    PROMPTS,
    cases,
    make_config,
    plain_greedy,
    plain_models,
    run_together,
    sampled,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    on_cpu = make_config(tmp_path_factory.mktemp(request.param), request.param)
    return replace(on_cpu, device="cuda", dtype="float32")


@pytest.mark.parametrize(
    "changes", [{}, {"is_overlapping": False}, {"has_static_shapes": True}, {"max_step_tokens": 9}], ids=str
)
@torch.inference_mode()
def test_batches_on_cuda_give_the_plain_forwards_greedy_tokens(
    config: EngineConfig, changes: dict[str, object]
) -> None:
    """The second time the prompts are cached."""
    models = plain_models(config)
    engine = Engine.load(replace(config, **changes))
    requests = [
        Request(str(index), prompt, GREEDY, alignment)
        for index, (prompt, alignment) in enumerate(cases(PROMPTS))
    ]
    expected = [plain_greedy(models, *case, engine.limits.vocab_size) for case in cases(PROMPTS)]
    for _ in range(2):
        told = run_together(engine, requests)
        drawn = [tuple(event.token_id for event in told[request.request_id]) for request in requests]
        assert drawn == expected


@pytest.mark.parametrize("mode", [Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS])
def test_a_seeded_request_draws_the_same_alone_and_in_a_batch_on_cuda(
    config: EngineConfig, mode: Resampling
) -> None:
    engine = Engine.load(config)
    alignment = replace(ALIGNED, resampling=mode)
    requests = [
        Request(str(index), prompt, sampled(index), alignment) for index, prompt in enumerate(PROMPTS)
    ]
    alone = {r.request_id: run_together(engine, [r])[r.request_id] for r in requests}
    for request_id, events in run_together(engine, requests).items():
        assert [event.token_id for event in events] == [event.token_id for event in alone[request_id]]
