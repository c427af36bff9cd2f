"""What many tests of the engine begin with; some modules have their own."""

from __future__ import annotations

import pytest

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from tests.exactness.test_engine import make_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return make_config(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def loaded(config: EngineConfig) -> Engine:
    return Engine.load(config)
