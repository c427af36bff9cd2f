"""Compiled layers on the device: the same tokens, in steps that are captured too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ram_core.engine.engine import Engine
from tests.exactness.test_engine import ALIGNED, IDENTITY, make_config
from tests.exactness.test_graphs import PLAIN, requests, serve, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_layers_draw_what_plain_ones_draw_captured_or_not(tmp_path: Path, family: str) -> None:
    config = replace(make_config(tmp_path, family), device="cuda", dtype="float32", max_batch=4)
    asked = requests(ALIGNED, IDENTITY, sampling=PLAIN, num=8)
    expected = tokens(serve(Engine.load(config), asked))
    for has_graphs in (False, True):
        lines: list[str] = []
        engine = Engine.load(replace(config, compile=True, cuda_graphs=has_graphs), lines.append)
        assert any("compiled layers" in line and "1 of 1" in line for line in lines)
        assert tokens(serve(engine, asked)) == expected
