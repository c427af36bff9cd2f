"""A server with tenants from its start to its end: whom it lets in, what it takes up, what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from ram_core.engine.messages import FailedEvent, Request
from ram_core.errors import NonFiniteLogits
from server.commands import serve as command
from server.generation import Generation
from server.metrics import Meter, Metrics
from server.settings import Settings
from server.tenants.editing import add_tenant, remove_tenant
from tests.http.standin import (
    PATIENCE_S,
    TOKENIZER,
    ScriptedEngine,
    chat,
    live,
    loaded_of,
    say,
    wait_until,
)
from tests.http.test_cli import assert_one_line, ram

CHAT = "/v1/chat/completions"


def test_a_changed_file_counts_and_a_wrong_one_does_not(tmp_path, caplog):
    path = tmp_path / "tenants.toml"
    first = add_tenant(path, "acme")
    with live(ScriptedEngine(), tenants_file=path) as server, httpx.Client(base_url=server.url) as client:

        def status(key):
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status(first) == 200
        second = add_tenant(path, "b")
        wait_until(lambda: status(second) == 200)
        good = path.read_text()
        path.write_text(good + "[tenants.c]\nlimit = 5\n")
        wait_until(lambda: "`tenants.c.limit`" in caplog.text)
        assert [status(first), status(second)] == [200, 200]
        path.write_text(good)
        remove_tenant(path, "acme")
        wait_until(lambda: status(first) == 401)
        assert status(second) == 200


def test_others_do_not_come_without_a_key_unless_told():
    refused = ram("serve", "/tmp", "--host", "0.0.0.0", "--port", "0")
    assert_one_line(refused, "--allow-anonymous")
    assert_one_line(refused, "On 0.0.0.0 anybody could use this server")


@pytest.mark.parametrize("words", [["--tenants-file", "{0}/none.toml"], ["--usage-log", "{0}"]])
def test_files_that_cannot_be_used_are_one_line(tmp_path, words):
    words = [word.format(tmp_path) for word in words]
    assert_one_line(ram("serve", "/tmp", "--port", "0", *words), str(tmp_path))


def _serve(banner: Path, settings: dict[str, Any]) -> None:
    """What a process of its own does: `ram serve`, around an engine that needs no weights."""
    command.load = lambda *_: loaded_of(ScriptedEngine())
    with banner.open("w") as sys.stdout:
        command.run(Settings(proposal="/tmp", served_model_name="big", port=0, **settings))


@contextlib.contextmanager
def serving(tmp_path: Path, **settings: Any) -> Iterator[tuple[BaseProcess, str, str]]:
    """A forked process that serves, its port, and what it said at its start."""
    banner = tmp_path / "banner"
    banner.touch()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(banner, settings))
    process.start()
    try:
        wait_until(lambda: "ram chat" in banner.read_text() or not process.is_alive())
        said = banner.read_text()
        yield process, re.search(r":(\d+)/v1", said)[1], said
    finally:
        process.kill()
        process.join()
        process.close()


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({}, "everybody on this machine, without a key"),
        ({"host": "0.0.0.0", "allow_anonymous": True}, "everybody, without a key"),
        ({"host": "0.0.0.0", "api_key": "s3cret"}, "1 tenant, by its keys"),
    ],
)
def test_the_server_says_at_its_start_to_whom_it_is_open(tmp_path, settings, who):
    with serving(tmp_path, **settings) as (_, _, said):
        assert f"open to   {who}\n" in said
        assert ("Authorization: Bearer" in said) == ("api_key" in settings)


def test_kill_nine_loses_no_request_that_was_answered(tmp_path):
    """Reload and log rotation by SIGHUP on the way."""
    tenants, log, old = (tmp_path / name for name in ("tenants.toml", "usage.jsonl", "usage.jsonl.1"))
    keys = [add_tenant(tenants, "acme")]
    with (
        serving(tmp_path, tenants_file=tenants, usage_log=log) as (process, port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        client.headers["Authorization"] = f"Bearer {keys[0]}"
        answered = [client.post(CHAT, json=chat()).json()["id"]]
        log.rename(old)
        client.headers["Authorization"] = f"Bearer {add_tenant(tenants, 'b')}"
        os.kill(process.pid, signal.SIGHUP)
        wait_until(log.exists)
        answered += [client.post(CHAT, json=chat()).json()["id"] for _ in range(3)]
        with (
            contextlib.suppress(httpx.HTTPError),
            client.stream("POST", CHAT, json=chat(stream=True)) as stream,
        ):
            for line in stream.iter_lines():
                if line == "data: [DONE]":
                    process.kill()
                elif line:
                    last = json.loads(line.removeprefix("data: "))["id"]
        process.join()
        assert process.exitcode == -signal.SIGKILL
    lines = [json.loads(line) for path in (old, log) for line in path.read_text().splitlines()]
    assert [line["request"] for line in lines] == [*answered, last]
    assert [line["tenant"] for line in lines] == ["acme", *["b"] * 4]


@pytest.mark.parametrize("is_failing", [False, True])
def test_the_end_is_told_before_anybody_hears_of_it(is_failing):
    """So that what a client has been told of is in the log, whatever happens next."""
    told = []

    def script(request):
        texts = say(request, "dog", finish=None if is_failing else "stop")
        return [*texts, FailedEvent(request.request_id, 0, NonFiniteLogits("NaN."))]

    async def generate():
        meter = Meter(Metrics("big"), ("identity", ""), 0.0)
        requests = [Request("r", (1, 2))]
        on_end = lambda generation: told.append(generation.outcome)  # noqa: E731
        async with Generation(ScriptedEngine(script), TOKENIZER, requests, meter, on_end) as generation:
            try:
                while deltas := await generation.take():
                    assert len(told) == (deltas[-1].finish_reason is not None)
            except NonFiniteLogits:
                assert told

    asyncio.run(generate())
    assert told == ["error" if is_failing else "stop"]
