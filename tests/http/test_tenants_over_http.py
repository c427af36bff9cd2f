"""Tenants through a live server: who comes in, what each sees and may ask for, and what it has used."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import httpx
import openai
import pytest

from ram_core.engine.messages import FailedEvent, StartedEvent
from ram_core.errors import NonFiniteLogits, QueueFull
from server.tenants.editing import add_tenant, remove_tenant
from tests.http.standin import (
    PATIENCE_S,
    Gate,
    ScriptedEngine,
    chat,
    chunks_of,
    ids_of,
    live,
    say,
    wait_until,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
ADMIN_KEY = "4dmin"
TENANTS = """
[tenants.acme]
default_aligner = "polite"
aligners = ["polite"]
priority = -5
keys = [KEYS]
[tenants.acme.limits]
requests_per_minute = 30
tokens_per_minute = 1200
max_tokens = 40
max_n = 3

[tenants.globex]
aligners = ["org/*"]
models = []
log = "full"
keys = [KEYS]

[tenants.hooli]
log = "none"
keys = [KEYS]
[tenants.hooli.limits]
requests_per_minute = 2
concurrent_requests = 1

[tenants.initech]
keys = [KEYS]
[tenants.initech.limits]
tokens_per_minute = 200
concurrent_requests = 1
"""


def make_tenants(path: Path, text: str) -> dict[str, str]:
    """Write a tenants' file, a key for each KEYS; the keys by tenant."""
    keys: dict[str, str] = {}
    source = path.with_name("keys.toml")
    for name in re.findall(r"^\[tenants\.(\w+)\]$", text, re.MULTILINE):
        keys[name] = add_tenant(source, name)
        entry = re.search(r"^ *(\{.*\}),$", source.read_text(), re.MULTILINE)
        remove_tenant(source, name)
        text = text.replace("KEYS", entry[1], 1)
    path.write_text(text)
    return keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def keys(folder):
    return make_tenants(folder / "tenants.toml", TENANTS)


@pytest.fixture(scope="module")
def server(folder, keys):
    settings = {"admin_key": ADMIN_KEY, "metrics_access": "admin", "usage_log": folder / "usage.jsonl"}
    with live(ScriptedEngine(), tenants_file=folder / "tenants.toml", **settings) as running:
        yield running


@pytest.fixture
def as_tenant(server, engine, keys):
    """A client of each tenant, by its name."""
    server.app.state.serving.tenants._ledgers.clear()
    server.app.state.serving.tenants.reload()
    clients = {
        name: httpx.Client(base_url=server.url, timeout=10, headers={"Authorization": f"Bearer {key}"})
        for name, key in keys.items()
    }
    yield clients
    for client in clients.values():
        client.close()


def sdk(server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


# Who comes in.

BAD_HEADERS = [
    {},
    {"Authorization": "Bearer ram-0123456789ab-xyz"},
    {"Authorization": "Bearer none"},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic abc"},
    {"Authorization": "Bearer schlüssel".encode()},
    {"Authorization": f"Bearer {ADMIN_KEY}"},
    {"X-Api-Key": "none"},
]


@pytest.mark.parametrize("headers", BAD_HEADERS)
@pytest.mark.parametrize(
    "path", [CHAT, COMPLETIONS, "/v1/models", "/v1/models/big", "/openapi.json", "/nowhere"]
)
def test_nobody_comes_in_without_a_key(client, engine, path, headers):
    answer = client.request(
        "POST" if path in (CHAT, COMPLETIONS) else "GET", path, json=chat(), headers=headers
    )
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        None,
        "invalid_api_key",
    )
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert not engine.requests


@pytest.mark.parametrize(
    "path", ["/health/../v1/models", "//v1/models", "/health/%2e%2e/v1/models", "/%761/models"]
)
def test_no_way_of_writing_a_path_goes_around_the_door(server, path):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head = connection.makefile("rb").readline()
    assert head.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/version"])
def test_health_and_version_need_no_key(client, path):
    assert client.get(path).status_code == 200


def test_metrics_are_the_admins(client, as_tenant):
    assert client.get("/metrics").status_code == 401
    refused = as_tenant["acme"].get("/metrics")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert client.get("/metrics", headers={"Authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200


def test_the_sdk_knows_a_wrong_key(server, engine):
    with sdk(server, "none") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(model="big", messages=MESSAGES)
    assert refused.value.code == "invalid_api_key"


def test_metrics_are_open_to_this_machine_unless_told_otherwise():
    for settings, status in (
        ({}, 200),
        ({"metrics_access": "admin"}, 401),
        ({"metrics_access": "open"}, 200),
    ):
        with live(ScriptedEngine(), api_key="s3cret", **settings) as server:
            assert httpx.get(f"{server.url}/metrics").status_code == status
            forwarded = {"X-Forwarded-For": "203.0.113.9"}
            away = 200 if settings.get("metrics_access") == "open" else 401
            assert httpx.get(f"{server.url}/metrics", headers=forwarded).status_code == away


def test_one_key_of_the_environment_is_enough(monkeypatch):
    monkeypatch.setenv("RAM_API_KEY", "s3cret")
    with live(ScriptedEngine()) as server, sdk(server, "s3cret") as client:
        assert client.chat.completions.create(model="big", messages=MESSAGES).choices
        assert server.engine.last.tenant == "default"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_a_server_without_keys_is_as_it_was(tmp_path):
    with live(ScriptedEngine(), usage_log=tmp_path / "usage.jsonl") as server:
        answer = httpx.post(f"{server.url}{CHAT}", json=chat())
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        assert (server.engine.last.tenant, server.engine.last.priority) == ("", 0)
        metrics = httpx.get(f"{server.url}/metrics").text
    assert "ram_tenant_requests_total{" not in metrics
    assert json.loads((tmp_path / "usage.jsonl").read_text())["tenant"] == ""


# What each sees.


def test_a_tenant_sees_its_models_alone(as_tenant):
    seen = {
        name: [model["id"] for model in client.get("/v1/models").json()["data"]]
        for name, client in as_tenant.items()
    }
    everything = ["big", "polite", "org/terse"]
    assert seen == {
        "acme": ["big", "polite"],
        "globex": ["org/terse"],
        "hooli": everything,
        "initech": everything,
    }


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, name: client.get(f"/v1/models/{name}"),
        lambda client, name: client.post(CHAT, json=chat(model=name)),
        lambda client, name: client.post(COMPLETIONS, json={"prompt": "a", "model": name}),
        lambda client, name: client.post(CHAT, json=chat(alignment={"aligner": name})),
        lambda client, name: client.post(CHAT, json=chat(alignment={"aligners": [{"name": name}]})),
    ],
)
def test_anothers_aligner_is_as_unknown_as_none(as_tenant, ask):
    client = as_tenant["acme"]
    assert ask(client, "polite").status_code == 200
    foreign, unknown = ask(client, "org/terse"), ask(client, "no/such1")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.text.replace("org/terse", "no/such1") == unknown.text
    ignored = {"x-request-id", "openai-processing-ms", "date"}
    names = [set(answer.headers) - ignored for answer in (foreign, unknown)]
    assert names[0] == names[1]


def test_the_proposal_is_unknown_to_whom_it_is_not_given(as_tenant, engine):
    client = as_tenant["globex"]
    refused, unknown = client.post(CHAT, json=chat(model="big")), client.post(CHAT, json=chat(model="bug"))
    assert refused.status_code == 404
    assert refused.text.replace("`big`", "`bug`") == unknown.text
    assert client.get("/v1/models/big").status_code == 404
    assert not engine.requests


def test_the_sdk_knows_what_is_not_there(server, engine, keys):
    with sdk(server, keys["acme"]) as client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="org/terse", messages=MESSAGES)
    assert refused.value.code == "model_not_found"


def test_the_engine_hears_whose_request_it_is(as_tenant, engine):
    body = {"messages": MESSAGES}
    assert as_tenant["acme"].post(CHAT, json=body).json()["model"] == "polite"
    assert (engine.last.tenant, engine.last.priority) == ("acme", -5)
    assert [term.aligner for term in engine.last.alignment.terms] == ["polite@1"]
    assert as_tenant["acme"].post(CHAT, json=chat()).status_code == 200
    assert engine.last.alignment.is_identity
    assert as_tenant["hooli"].post(CHAT, json=body).json()["model"] == "big"
    assert (engine.last.tenant, engine.last.priority) == ("hooli", 0)


# How much each may ask for.


@pytest.mark.parametrize("is_stream", [False, True])
def test_answers_say_what_is_left(as_tenant, is_stream):
    answer = as_tenant["acme"].post(CHAT, json=chat(stream=is_stream))
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "30"
    assert answer.headers["x-ratelimit-remaining-requests"] == "29"
    assert re.fullmatch(r"[\d.]+m?s", answer.headers["x-ratelimit-reset-requests"])
    assert answer.headers["x-ratelimit-limit-tokens"] == "1200"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 1200
    assert re.fullmatch(r"[\d.]+m?s", answer.headers["x-ratelimit-reset-tokens"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_too_many_requests_are_refused_before_they_begin(as_tenant, engine, is_stream):
    client = as_tenant["hooli"]
    for _ in range(2):
        assert client.post(CHAT, json=chat(stream=is_stream)).status_code == 200
    refused = client.post(CHAT, json=chat(stream=is_stream))
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 25 < int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(engine.requests) == 2
    assert as_tenant["initech"].post(CHAT, json=chat()).status_code == 200


def test_the_sdk_knows_a_limit(server, as_tenant, keys):
    with sdk(server, keys["hooli"]) as client:
        for _ in range(2):
            client.chat.completions.create(model="big", messages=MESSAGES)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="big", messages=MESSAGES, stream=True)
    assert refused.value.code == "rate_limit_exceeded"


def test_tokens_are_limited_and_corrected(as_tenant, engine):
    client = as_tenant["initech"]
    answer = client.post(CHAT, json=chat(max_tokens=150))
    left = 200 - answer.json()["usage"]["total_tokens"]
    assert left <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= left + 1
    refused = client.post(CHAT, json=chat(max_tokens=180))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert int(refused.headers["retry-after"]) >= 1
    never = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 201})
    assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in never.headers
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 41}, "max_tokens"),
        ({"max_completion_tokens": 41}, "max_completion_tokens"),
        ({"n": 4}, "n"),
    ],
)
def test_what_is_over_a_cap_is_named(as_tenant, fields, param):
    answer = as_tenant["acme"].post(CHAT, json=chat(**fields))
    assert answer.status_code == 400
    assert (answer.json()["error"]["type"], answer.json()["error"]["param"]) == (
        "invalid_request_error",
        param,
    )


def test_a_cap_is_what_an_answer_gets_that_asks_for_none(as_tenant, engine):
    as_tenant["acme"].post(CHAT, json=chat())
    assert engine.last.sampling.max_tokens == 40


@pytest.mark.parametrize("is_stream", [False, True])
def test_hanging_up_gives_back_what_was_not_used(as_tenant, engine, is_stream):
    gate, client = Gate(), as_tenant["initech"]
    engine.script = lambda request: [
        StartedEvent(request.request_id, 0.0),
        *say(request, "dog", finish=None),
        gate,
    ]
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat(max_tokens=100, stream=is_stream), timeout=0.3)
    engine.left.get(timeout=PATIENCE_S)
    used = len(engine.last.prompt_ids) + len(ids_of("dog"))
    engine.script = ScriptedEngine().script
    # Its place is free again, and more tokens than were left while it ran.
    answer = client.post(CHAT, json=chat(max_tokens=110))
    assert answer.status_code == 200
    left = 200 - used - answer.json()["usage"]["total_tokens"]
    assert left <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= left + 10


def test_what_the_engine_refuses_costs_nothing(as_tenant, engine):
    client = as_tenant["hooli"]
    engine.refusal = QueueFull("The queue is full.", retry_after_s=1)
    for _ in range(5):
        assert client.post(CHAT, json=chat()).status_code == 429
        assert client.post(CHAT, json=chat(temperature=9)).status_code == 400
    engine.refusal = None
    assert client.post(CHAT, json=chat()).headers["x-ratelimit-remaining-requests"] == "1"


def test_a_tenant_at_its_limit_is_refused_and_others_are_not(as_tenant, engine):
    gate = Gate()
    engine.script = lambda request: [*say(request, "dog", finish=None), gate, *say(request, "dog")]
    with as_tenant["hooli"].stream("POST", CHAT, json=chat(stream=True)) as running:
        gate.wait_reached()
        refused = as_tenant["hooli"].post(CHAT, json=chat())
        assert refused.status_code == 429
        assert "1 concurrent requests" in refused.json()["error"]["message"]
        gate.open()
        assert as_tenant["initech"].post(CHAT, json=chat()).status_code == 200
        assert chunks_of(running.read().decode())
    assert as_tenant["hooli"].post(CHAT, json=chat()).status_code == 200


# What is written down.


@pytest.fixture
def usage(folder, as_tenant):
    """The lines that a test adds to the usage log."""
    path = folder / "usage.jsonl"
    before = len(path.read_bytes())
    return lambda: [json.loads(line) for line in path.read_bytes()[before:].splitlines()]


def hello(request):
    return [
        StartedEvent(request.request_id, 0.0, 2),
        *say(request, "Hello!"),
        *say(request, "Hello!", index=1),
    ]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_line_is_written_for_each_request(as_tenant, engine, usage, keys, is_stream):
    engine.script = hello
    client = as_tenant["acme"]
    answer = client.post(CHAT, json=chat(model="polite", n=2, stream=is_stream))
    answer_id = chunks_of(answer.text)[0]["id"] if is_stream else answer.json()["id"]
    (line,) = usage()
    assert line.pop("seconds") > 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "tenant": "acme",
        "key": keys["acme"].split("-")[1],
        "request": answer_id,
        "model": "polite",
        "aligner": "polite",
        "versions": ["polite@1"],
        "prompt_tokens": len(engine.last.prompt_ids),
        "cached_tokens": 2,
        "completion_tokens": 2 * (len(ids_of("Hello!")) + 1),
        "finish_reason": "stop",
        "status": 200,
    }


def test_the_log_says_as_much_as_the_tenant_wants(as_tenant, engine, usage):
    engine.script = hello
    as_tenant["hooli"].post(CHAT, json=chat())
    assert usage() == []
    as_tenant["globex"].post(COMPLETIONS, json={"model": "org/terse", "prompt": "the dog", "n": 2})
    (line,) = usage()
    assert (line["prompts"], line["answers"]) == (["the dog"], ["Hello!", "Hello!"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_failed_and_who_hung_up_have_lines_too(as_tenant, engine, usage, is_stream):
    client, gate = as_tenant["acme"], Gate()
    engine.script = lambda request: [
        *say(request, "dog", finish=None),
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model said NaN.")),
    ]
    client.post(CHAT, json=chat(stream=is_stream))
    engine.script = lambda request: [*say(request, "dog", finish=None), gate]
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat(stream=is_stream), timeout=0.2)
    wait_until(lambda: len(usage()) == 2)
    assert [(line["finish_reason"], line["status"]) for line in usage()] == [("error", 500), ("abort", 499)]
    assert all(line["completion_tokens"] == len(ids_of("dog")) for line in usage())


def test_each_tenant_is_counted(as_tenant, client, engine, keys):
    def metrics():
        text = client.get("/metrics", headers={"Authorization": f"Bearer {ADMIN_KEY}"}).text
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in text.splitlines() if "tenant=" in line)
            if "_created" not in name
        }

    engine.script = hello
    before = metrics()
    as_tenant["hooli"].post(CHAT, json=chat(n=2))
    as_tenant["hooli"].post(CHAT, json=chat(model="polite"))
    as_tenant["hooli"].post(CHAT, json=chat())
    after = metrics()
    new = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    prompt, answer = len(engine.last.prompt_ids), len(ids_of("Hello!")) + 1
    assert new == {
        'ram_tenant_requests_total{aligner="identity",tenant="hooli"}': 1,
        'ram_tenant_requests_total{aligner="polite",tenant="hooli"}': 1,
        'ram_tenant_prompt_tokens_total{aligner="identity",tenant="hooli"}': prompt,
        'ram_tenant_prompt_tokens_total{aligner="polite",tenant="hooli"}': prompt,
        'ram_tenant_cached_tokens_total{aligner="identity",tenant="hooli"}': 2,
        'ram_tenant_cached_tokens_total{aligner="polite",tenant="hooli"}': 2,
        'ram_tenant_completion_tokens_total{aligner="identity",tenant="hooli"}': 2 * answer,
        'ram_tenant_completion_tokens_total{aligner="polite",tenant="hooli"}': answer,
        'ram_tenant_refusals_total{limit="requests",tenant="hooli"}': 1,
    }
