"""What the suites share: a small real engine behind a live server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.thread import EngineThread
from ram_core.models.vocabulary import load_tokenizer
from tests.http.standin import LiveServer, live
from tests.models import save_pair


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A proposal and two aligners with room for 16 sequences, in this process."""
    torch.set_num_threads(1)
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"))
    sources = tuple(AlignerSource(f"{name}@1", str(path)) for name, path in aligners.items())
    config = EngineConfig(
        str(proposal), sources, device="cpu", kv_memory_bytes=4 * 2**20, max_batch=4, max_queue=12
    )
    with live(EngineThread.start(config), load_tokenizer(str(proposal))) as running:
        yield running
