"""CUDA graphs on the device: what they replay is what steps draw as they come, whatever the batches do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.graphs import StepGraphs
from ram_core.engine.layout import StepLayout
from tests.exactness.test_engine import ALIGNED, FAMILIES, IDENTITY, TERSE, anew, make_config
from tests.exactness.test_graphs import CUT, PLAIN, Told, requests, serve, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    on_cpu = make_config(tmp_path_factory.mktemp(request.param), request.param)
    return replace(on_cpu, device="cuda", dtype="float32", max_batch=4, max_model_len=128)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> set[StepLayout]:
    replayed: set[StepLayout] = set()
    replay = StepGraphs.replay

    def watch(self: StepGraphs, layout: StepLayout, numbers: torch.Tensor) -> torch.Tensor | None:
        table = replay(self, layout, numbers)
        if table is not None:
            replayed.add(layout)
        return table

    monkeypatch.setattr(StepGraphs, "replay", watch)
    return replayed


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
@pytest.mark.parametrize("is_overlapping", [False, True])
def test_graphs_draw_what_steps_draw_as_they_come(
    config: EngineConfig, replayed: set[StepLayout], sampling: object, is_overlapping: bool
) -> None:
    """Every model is captured; aligners come in any mix, a request is cancelled, prompts are cached."""
    engine = Engine.load(replace(config, is_overlapping=is_overlapping))
    asked = requests(ALIGNED, TERSE, IDENTITY, ALIGNED, sampling=sampling, num=16)
    eager = serve(anew(engine, cuda_graphs=False, is_overlapping=is_overlapping), asked, cancelled="5")
    for _ in range(2):
        told: Told = serve(engine, asked, cancelled="5")
        assert tokens(told) == tokens(eager)
    assert {layout.num_drawing for layout in replayed} == {1, 2, 4}
    assert {len(layout.uses) for layout in replayed} == {1, 2}


def test_an_engine_tells_what_it_captured(config: EngineConfig) -> None:
    told: list[str] = []
    Engine.load(config, told.append)
    [row] = [words for words in told if "captured steps" in words]
    assert int(row.split()[2]) > 0
    assert "that only draw" in row
