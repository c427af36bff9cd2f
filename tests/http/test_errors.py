"""What the server says when something is wrong that is not the request's fault, and on every answer."""

from __future__ import annotations

import httpx
import pytest

from ram_core.engine.messages import FailedEvent
from ram_core.errors import EngineUnavailable, NonFiniteLogits, QueueFull, RamError, UnknownModel
from tests.http.standin import ScriptedEngine, chat, live

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_full_queue_is_a_429_that_says_when_to_come_back(client, engine, is_stream):
    engine.refusal = QueueFull("The queue is full.", retry_after_s=2.5)
    answer = client.post(CHAT, json=chat(stream=is_stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["retry-after-ms"] == "2500"
    assert answer.json()["error"] == {
        "message": "The queue is full.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }


def test_of_several_prompts_all_are_admitted_or_none(client, engine):
    submit = engine.submit

    def submit_once(request):
        if engine.requests:
            raise QueueFull("The queue is full.", retry_after_s=1)
        return submit(request)

    engine.submit = submit_once
    try:
        answer = client.post("/v1/completions", json={"prompt": ["a", "b"]})
    finally:
        del engine.submit
    assert answer.status_code == 429
    assert engine.cancelled.get(timeout=10) == (engine.last.request_id, 0)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "type_", "code", "retry"),
    [
        (EngineUnavailable("Dead."), 503, "service_unavailable_error", "engine_unavailable", None),
        (NonFiniteLogits("NaN."), 500, "server_error", None, "false"),
        (UnknownModel("Gone."), 404, "invalid_request_error", "model_not_found", None),
        (RamError("Odd."), 500, "server_error", None, None),
    ],
)
def test_the_engines_errors_have_their_status(client, engine, error, status, type_, code, retry, is_stream):
    for refusal, events in ((error, []), (None, [FailedEvent("", 0, error)])):
        engine.refusal = refusal
        engine.script = lambda request, events=events: events
        answer = client.post(CHAT, json=chat(stream=is_stream))
        assert answer.status_code == status
        body = answer.json()["error"]
        assert (body["message"], body["type"], body["code"]) == (str(error), type_, code)
        assert answer.headers.get("x-should-retry") == retry
        assert ("retry-after" in answer.headers) == (status == 503)


def test_a_bug_is_a_500_without_its_details(client, engine):
    engine.refusal = ValueError("secret path /etc")
    answer = client.post(CHAT, json=chat())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]


def test_the_router_speaks_openais_language(client):
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "Invalid URL (GET /v1/nothing).",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }
    answer = client.get(CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/nothing", "/metrics"])
def test_every_answer_has_an_id_and_a_time(client, path):
    answer = client.get(path)
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("trace-1.2:3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<script>", False)],
)
def test_a_sane_request_id_comes_back(client, given, is_kept):
    answer = client.get("/version", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) == is_kept


def test_a_server_without_a_model_says_that_it_loads():
    with live(None) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        answer = client.post(CHAT, json=chat(model="polite"))
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["big"]
        assert client.get("/metrics").status_code == 200


def test_the_default_aligner_answers_where_no_model_is_named():
    engine = ScriptedEngine()
    with live(engine, default_aligner="polite") as server, httpx.Client(base_url=server.url) as client:
        body = chat()
        del body["model"]
        assert client.post(CHAT, json=body).json()["model"] == "polite"
        assert [term.aligner for term in engine.last.alignment.terms] == ["polite@1"]
        assert client.post(CHAT, json=chat(model="")).json()["model"] == "polite"
        assert client.post(CHAT, json=chat(model="big")).json()["model"] == "big"
        assert engine.last.alignment.is_identity
