"""Aligners that are loaded at run time, across the engine's boundary and its deaths."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    EngineLost,
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
PATIENCE_S = 60.0

Start = Callable[[EngineConfig], StreamingClient]


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
    """What a client tells of its aligners; progress is passed over."""

    def __init__(self, engine: StreamingClient) -> None:
        self._told: queue.SimpleQueue[AlignerNews] = queue.SimpleQueue()
        engine.watch_aligners(self._told.put)

    def next(self) -> AlignerNews:
        while isinstance(news := self._told.get(timeout=PATIENCE_S), AlignerProgress):
            pass
        return news


@contextmanager
def running(start: Start, config: EngineConfig) -> Iterator[StreamingClient]:
    engine = start(config)
    try:
        yield engine
    finally:
        asyncio.run(engine.close())  # type: ignore[attr-defined]


def order(aligner: str, source: Path | str) -> LoadAligner:
    return LoadAligner(aligner, ((aligner, str(source)),), ENOUGH)


def ask(engine: StreamingClient, name: str) -> list[int]:
    """What an aligner has drawn; its client may be closed in another loop."""
    request = Request("a", PROMPT, SAMPLING, AlignmentParams((AlignerTerm(name),)))
    told = asyncio.run(asyncio.wait_for(collect(engine, request), PATIENCE_S))
    return [event.token_id for event in told if isinstance(event, TokenEvent)]


def names_of(began: AlignerNews) -> list[str]:
    assert isinstance(began, EngineBegan)
    return [name for name, _ in began.aligners]


@pytest.mark.parametrize("start", [EngineThread.start, SupervisedEngine.start], ids=["thread", "process"])
def test_an_aligner_comes_and_goes(start: Start, config: EngineConfig, newcomer: Path) -> None:
    with running(start, config) as engine:
        news = News(engine)
        began = news.next()
        assert names_of(began) == ["polite@1", "terse@1"]
        assert isinstance(began, EngineBegan)
        assert (began.failed, began.bytes_per_weight, began.device) == ((), 4, "cpu")
        assert began.memory_bytes > sum(num_bytes for _, num_bytes in began.aligners)
        with pytest.raises(UnknownModel):
            ask(engine, "polite@2")
        engine.load_aligner(order("polite@2", newcomer))
        assert news.next() == AlignerLoaded("polite@2", dict(began.aligners)["polite@1"], "cpu")
        assert len(ask(engine, "polite@2")) == SAMPLING.max_tokens
        assert engine.aligners == ("polite@1", "terse@1", "polite@2")
        assert names_of(News(engine).next()) == ["polite@1", "terse@1", "polite@2"]
        engine.free_aligner("polite@2")
        assert news.next() == AlignerFreed("polite@2")
        with pytest.raises(UnknownModel):
            ask(engine, "polite@2")
        assert names_of(News(engine).next()) == ["polite@1", "terse@1"]
        engine.load_aligner(order("gone@1", "/nowhere"))
        failed = news.next()
        assert isinstance(failed, AlignerFailed)
        assert "/nowhere" in failed.reason


def test_a_life_begins_with_what_the_last_one_had_and_can_still_be_read(
    config: EngineConfig, newcomer: Path, tmp_path: Path
) -> None:
    """Not with what it had let go, nor with what was on its way; all of it may be ordered again."""
    broken, whole = (shutil.copytree(newcomer, tmp_path / name) for name in ("broken", "whole"))
    both = LoadAligner("both@1", (("both@1", str(whole)), ("both@1/part", str(broken))), ENOUGH)
    with running(SupervisedEngine.start, config) as engine:
        assert isinstance(engine, SupervisedEngine)
        news = News(engine)
        news.next()
        for wanted in (order("polite@2", newcomer), both):
            engine.load_aligner(wanted)
            assert isinstance(news.next(), AlignerLoaded)
        engine.free_aligner("terse@1")
        assert news.next() == AlignerFreed("terse@1")
        before = ask(engine, "polite@2")
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        # The process is stopped, so that the load cannot be over when it dies.
        os.kill(engine.pid or 0, signal.SIGSTOP)
        engine.load_aligner(order("late@1", newcomer))
        os.kill(engine.pid or 0, signal.SIGKILL)
        assert news.next() == EngineLost()
        # Nobody hears this.
        engine.load_aligner(order("late@1", newcomer))
        began = news.next()
        assert names_of(began) == ["polite@1", "polite@2"]
        assert isinstance(began, EngineBegan)
        [(name, reason)] = began.failed
        assert name == "both@1"
        assert "cut off" in reason
        assert ask(engine, "polite@2") == before
        # It is mended, and can be had again.
        shutil.copytree(newcomer, broken, dirs_exist_ok=True)
        for wanted in (order("late@1", newcomer), both):
            engine.load_aligner(wanted)
            assert isinstance(news.next(), AlignerLoaded)
        assert ask(engine, "late@1") == before
