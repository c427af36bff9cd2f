"""Faults that need a hand inside: a request's NaN, a step that finds no memory, a clock that jumps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.tenants.editing import add_tenant, rotate_key
from tests.http.standin import PATIENCE_S, LiveServer, ScriptedEngine, chat, chunks_of, live, wait_until
from tests.told import TABLE

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SPOILT = 251
"""A token that no answer of the neighbours holds."""
YEAR_S = 365 * 86400.0


@pytest.fixture
def client(small_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=small_server.url, timeout=PATIENCE_S) as http:
        yield http
    wait_until(lambda: not small_server.engine._streams.num_open)


def neighbours(client: httpx.Client) -> list[str]:
    """What three streams say that run at the same time."""

    def one(number: int) -> str:
        body = chat(
            model=("polite", "big")[number % 2], stream=True, max_tokens=60, temperature=0, ignore_eos=True
        )
        chunks = chunks_of(client.post(CHAT, json=body).text)
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(one, range(3)))


def during(client: httpx.Client, strike: Callable[[], Any]) -> Any:
    """Strike while neighbours run; their answers must be what they are alone. Returns what the strike did."""
    alone = neighbours(client)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(neighbours, client)
        struck = strike()
        assert running.result(PATIENCE_S) == alone
    assert neighbours(client) == alone
    return struck


def assert_failed(answer: httpx.Response, message: str) -> None:
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", None)
    assert message in error["message"]


@pytest.mark.parametrize("prompt", [[5, 6, 7, SPOILT], [5, SPOILT, 6, 7]], ids=["last", "early"])
def test_a_request_with_nan_fails_alone(
    small_server: LiveServer, client: httpx.Client, prompt: list[int]
) -> None:
    model = small_server.engine._engine.bank.proposal.model
    weight = model.get_input_embeddings().weight
    with torch.inference_mode():
        before = weight[SPOILT].clone()
        weight[SPOILT] = torch.nan
    try:
        body = {"prompt": prompt, "max_tokens": 4}
        assert_failed(during(client, lambda: client.post(TEXT, json=body)), "finite")
    finally:
        with torch.inference_mode():
            weight[SPOILT] = before
    assert client.post(TEXT, json=body).status_code == 200
    TABLE.add("a request's NaN", "it: 500; neighbours: nothing, the same tokens", None, "that request")


def test_a_request_that_no_memory_is_left_for_fails_alone(
    small_server: LiveServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_server.engine._engine.bank.proposal
    forward = model.forward

    def bounded(batch: Any, *args: Any) -> torch.Tensor:
        if (batch.input_ids == SPOILT).any():
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch, *args)

    monkeypatch.setattr(model, "forward", bounded)
    body = {"prompt": [5, 6, SPOILT, 8], "max_tokens": 4}
    assert_failed(during(client, lambda: client.post(TEXT, json=body)), "memory")
    monkeypatch.undo()
    assert client.post(TEXT, json=body).status_code == 200
    TABLE.add("a step out of memory", "who does not fit: 500; neighbours: nothing", None, "that request")


@pytest.mark.parametrize("jump_s", [10 * YEAR_S, -10 * YEAR_S], ids=["forward", "back"])
def test_when_the_clock_jumps_streams_go_on(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    now = time.time

    def jump() -> int:
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        return client.post(CHAT, json=chat(max_tokens=1)).status_code

    assert during(client, jump) == 200
    assert client.get("/health/ready").status_code == 200
    assert client.get("/health/live").status_code == 200
    TABLE.add(
        f"the clock jumps {'ten years' if jump_s > 0 else 'back ten years'}", "nothing", None, "nothing"
    )


def test_when_the_clock_jumps_limits_hold_and_keys_expire_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits count on a clock that never jumps; a key's last day is the wall's business."""
    path = tmp_path / "tenants.toml"
    old = add_tenant(path, "acme")
    new = rotate_key(path, "acme", keep_s=86400)
    path.write_text(path.read_text() + "\n[tenants.acme.limits]\nrequests_per_minute = 3\n")
    now = time.time
    with live(ScriptedEngine(), tenants_file=path) as server, httpx.Client(base_url=server.url) as client:

        def ask(key: str) -> httpx.Response:
            return client.post(CHAT, json=chat(), headers={"Authorization": f"Bearer {key}"})

        assert [ask(key).status_code for key in (old, new, new)] == [200, 200, 200]
        monkeypatch.setattr(server.app.state.serving.tenants, "_wall_clock", lambda: now() + YEAR_S)
        assert ask(old).status_code == 401
        refused = ask(new)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        monkeypatch.undo()
        assert ask(old).status_code == 429
