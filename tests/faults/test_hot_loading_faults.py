"""Aligners that come and go while the engine serves: what they say, and that nobody else notices."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from pathlib import Path

import pytest

from ram_core.engine.client import StreamingClient
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerNews,
    AlignerProgress,
    EngineBegan,
    LoadAligner,
    Request,
    TokenEvent,
)
from ram_core.engine.supervisor import SupervisedEngine
from ram_core.engine.thread import EngineThread
from ram_core.errors import UnknownModel
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from tests.models import save_model, save_pair
from tests.unit.test_thread import collect

SAMPLING = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
PROMPT = tuple(range(20, 45))
ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"), vocab_size=320)
    sources = tuple(AlignerSource(f"{name}@1", str(path)) for name, path in aligners.items())
    return EngineConfig(str(proposal), sources, device="cpu", max_batch=4, aligner_slots=3)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("newcomer")
    return save_model(directory / "new", "llama", hidden=16, layers=1, vocab_size=320, seed=11)


class News:
    """What a client tells of its aligners."""

    def __init__(self, engine: StreamingClient) -> None:
        self._told: queue.SimpleQueue[AlignerNews] = queue.SimpleQueue()
        engine.watch_aligners(self._told.put)

    def next(self) -> AlignerNews:
        """Progress is passed over."""
        while isinstance(news := self._told.get(timeout=60), AlignerProgress):
            pass
        return news


Start = Callable[[EngineConfig], StreamingClient]


@pytest.mark.parametrize("start", [EngineThread.start, SupervisedEngine.start], ids=["thread", "process"])
def test_an_aligner_comes_and_goes(start: Start, config: EngineConfig, newcomer: Path) -> None:
    request = Request("a", PROMPT, SAMPLING, AlignmentParams((AlignerTerm("polite@2"),)))

    async def body() -> None:
        engine = start(config)
        try:
            news = News(engine)
            began = news.next()
            assert isinstance(began, EngineBegan)
            assert [name for name, _ in began.aligners] == ["polite@1", "terse@1"]
            with pytest.raises(UnknownModel):
                await collect(engine, request)
            engine.load_aligner(LoadAligner("polite@2", (("polite@2", str(newcomer)),), ENOUGH))
            loaded = await asyncio.to_thread(news.next)
            assert loaded == AlignerLoaded("polite@2", dict(began.aligners)["polite@1"], "cpu")
            tokens = [event for event in await collect(engine, request) if isinstance(event, TokenEvent)]
            assert len(tokens) == SAMPLING.max_tokens
            late = News(engine).next()
            assert isinstance(late, EngineBegan)
            assert [name for name, _ in late.aligners] == ["polite@1", "terse@1", "polite@2"]
            engine.free_aligner("polite@2")
            assert await asyncio.to_thread(news.next) == AlignerFreed("polite@2")
            with pytest.raises(UnknownModel):
                await collect(engine, request)
            engine.load_aligner(LoadAligner("gone@1", (("gone@1", "/nowhere"),), ENOUGH))
            failed = await asyncio.to_thread(news.next)
            assert isinstance(failed, AlignerFailed)
            assert "/nowhere" in failed.reason
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(body(), 120))
