"""One live server for each module, with an engine that begins anew for each test."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.http.standin import LiveServer, ScriptedEngine, live


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(ScriptedEngine()) as running:
        yield running


@pytest.fixture
def engine(server: LiveServer) -> ScriptedEngine:
    engine: ScriptedEngine = server.engine
    engine.reset()
    return engine


@pytest.fixture
def client(server: LiveServer, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as http:
        yield http
