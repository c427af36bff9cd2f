"""A fresh engine and server for each test."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.http.standin import LiveServer, ScriptedEngine, live


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with live(engine) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as http:
        yield http
