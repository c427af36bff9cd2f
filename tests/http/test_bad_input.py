"""Everything a client can get wrong is its own 400, in OpenAI's shape, and never reaches the engine."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from ram_core.errors import ContextLengthExceeded, InvalidRequest
from tests.http.standin import PATIENCE_S, ScriptedEngine, chat, live

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def assert_error(answer: httpx.Response, status: int, param: str | None, code: str | None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    [(key, error)] = answer.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"]
    return str(error["message"])


def user(**fields):
    return {"model": "big", "messages": [{"role": "user", "content": "Hi", **fields}]}


CHAT_TABLE = [
    ({"model": "big"}, "messages", "missing_required_parameter"),
    (chat() | {"messages": []}, "messages", "invalid_value"),
    (chat() | {"messages": "Hi"}, "messages", "invalid_type"),
    (chat() | {"messages": [7]}, "messages[0]", "invalid_type"),
    (chat() | {"messages": [{"content": "Hi"}]}, "messages[0].role", "missing_required_parameter"),
    (user(role="wizard"), "messages[0].role", "invalid_value"),
    (user(role="tool"), "messages[0].role", "unsupported_parameter"),
    (user(tool_calls=[{"id": "x"}]), "messages[0].tool_calls", "unsupported_parameter"),
    (user(content=None), "messages[0].content", "invalid_value"),
    (user(content=5), "messages[0].content", "invalid_type"),
    (user(content=[{"type": "text", "text": 5}]), "messages[0].content[0].text", "invalid_type"),
    (user(content=[{"type": "text"}]), "messages[0].content[0].text", "invalid_value"),
    (
        user(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        user(content=[{"type": "input_audio", "input_audio": {}}]),
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (chat(model=5), "model", "invalid_type"),
    (chat(temperature=-0.1), "temperature", "invalid_value"),
    (chat(temperature=2.1), "temperature", "invalid_value"),
    (chat(temperature=10**400), "temperature", "invalid_type"),
    (chat(temperature=True), "temperature", "invalid_type"),
    (chat(temperature="1"), "temperature", "invalid_type"),
    (chat(temperature=[1]), "temperature", "invalid_type"),
    (chat(top_p=0), "top_p", "invalid_value"),
    (chat(top_p=1.01), "top_p", "invalid_value"),
    (chat(top_k=-2), "top_k", "invalid_value"),
    (chat(top_k=1.5), "top_k", "invalid_type"),
    (chat(min_p=2), "min_p", "invalid_value"),
    (chat(n=0), "n", "invalid_value"),
    (chat(n=129), "n", "invalid_value"),
    (chat(n=True), "n", "invalid_type"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(max_tokens=-1), "max_tokens", "invalid_value"),
    (chat(max_tokens=10**30), "max_tokens", "invalid_value"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "invalid_value"),
    (chat(max_completion_tokens="5"), "max_completion_tokens", "invalid_type"),
    (chat(seed=2**63), "seed", "invalid_value"),
    (chat(seed=1.5), "seed", "invalid_type"),
    (chat(stop=["a", "b", "c", "d", "e"]), "stop", "invalid_value"),
    (chat(stop=[1]), "stop[0]", "invalid_type"),
    (chat(stop=5), "stop", "invalid_type"),
    (chat(stop=""), "stop", "invalid_value"),
    (chat(stop=["a", ""]), "stop", "invalid_value"),
    (chat(stop_token_ids=["a"]), "stop_token_ids[0]", "invalid_type"),
    (chat(cache_salt=""), "cache_salt", "invalid_value"),
    (chat(cache_salt="x" * 257), "cache_salt", "invalid_value"),
    (chat(cache_salt=7), "cache_salt", "invalid_type"),
    (chat(ignore_eos=1), "ignore_eos", "invalid_type"),
    (chat(stream="yes"), "stream", "invalid_type"),
    (chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (chat(stream=False, stream_options={}), "stream_options", "invalid_value"),
    (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "invalid_type"),
    (chat(stream=True, stream_options=5), "stream_options", "invalid_type"),
    (chat(logprobs=5), "logprobs", "invalid_type"),
    (chat(top_logprobs=5), "top_logprobs", "invalid_value"),
    (chat(logprobs=False, top_logprobs=5), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=-1), "top_logprobs", "invalid_value"),
    (chat(alignment=5), "alignment", "invalid_type"),
    (chat(alignment={"alinger": "polite"}), "alignment.alinger", "unknown_parameter"),
    (chat(alignment={"aligner": "polite", "aligners": []}), "alignment.aligners", "invalid_value"),
    (chat(alignment={"aligners": [{"nom": "polite"}]}), "alignment.aligners[0].nom", "unknown_parameter"),
    (
        chat(alignment={"aligners": [{"strength": 1}]}),
        "alignment.aligners[0].name",
        "missing_required_parameter",
    ),
    (chat(alignment={"aligners": ["polite"]}), "alignment.aligners[0]", "invalid_type"),
    (chat(alignment={"aligners": [{"name": "polite"}] * 2}), "alignment.aligners", "invalid_value"),
    (chat(model="polite", alignment={"strength": 101}), "alignment.strength", "invalid_value"),
    (chat(model="polite", alignment={"strength": True}), "alignment.strength", "invalid_type"),
    (
        chat(alignment={"aligners": [{"name": "polite", "strength": -60}], "strength": 2}),
        "alignment.aligners[0].strength",
        "invalid_value",
    ),
    (chat(alignment={"resampling": "magic"}), "alignment.resampling", "invalid_value"),
    (chat(alignment={"candidates": 0}), "alignment.candidates", "invalid_value"),
    (chat(alignment={"candidates": 10**30}), "alignment.candidates", "invalid_value"),
    (chat(alignment={"proposal_top_p": 0}), "alignment.proposal_top_p", "invalid_value"),
    (chat(alignment={"proposal_top_k": -1}), "alignment.proposal_top_k", "invalid_value"),
    (chat(alignment={"proposal_temperature": 0}), "alignment.proposal_temperature", "invalid_value"),
    (chat(alignment={"kl_threshold": "low"}), "alignment.kl_threshold", "invalid_type"),
    (chat(alignment={"telemetry": 1}), "alignment.telemetry", "invalid_type"),
    (chat(alignment={"eos_priority": "no"}), "alignment.eos_priority", "invalid_type"),
]

UNSUPPORTED = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -2,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "high",
    "web_search_options": {},
}
CHAT_TABLE += [(chat(**{name: value}), name, "unsupported_parameter") for name, value in UNSUPPORTED.items()]
# A boolean is no zero.
CHAT_TABLE += [(chat(frequency_penalty=False), "frequency_penalty", "unsupported_parameter")]

NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "user": "me",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "temperature": None,
    "top_p": None,
    "n": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "stop": None,
    "seed": None,
    "stream": None,
    "stream_options": None,
    "logprobs": None,
    "top_logprobs": None,
    "alignment": None,
    "top_k": -1,
    "stop_token_ids": [],
}

TEXT_TABLE = [
    ({"model": "big"}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [True]}, "prompt[0]", "invalid_type"),
    ({"prompt": [[1, 2], [3, True]]}, "prompt[1][1]", "invalid_type"),
    ({"prompt": [1.5]}, "prompt[0]", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": -1}, "logprobs", "invalid_value"),
    ({"prompt": "a", "echo": True}, "echo", "unsupported_parameter"),
    ({"prompt": "a", "best_of": 2}, "best_of", "unsupported_parameter"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
]


def _id(value: object) -> str:
    return json.dumps(value)[:60] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("body", "param", "code"), CHAT_TABLE, ids=_id)
def test_a_bad_chat_request_names_the_field(client, engine, body, param, code):
    assert_error(client.post(CHAT, json=body), 400, param, code)
    assert not engine.requests


@pytest.mark.parametrize(("body", "param", "code"), TEXT_TABLE, ids=_id)
def test_a_bad_completion_request_names_the_field(client, engine, body, param, code):
    assert_error(client.post(TEXT, json=body), 400, param, code)
    assert not engine.requests


def test_what_is_neutral_is_accepted(client):
    for name, value in NEUTRAL.items():
        answer = client.post(CHAT, json=chat(**{name: value}))
        assert answer.status_code == 200, (name, answer.text)
    answer = client.post(TEXT, json={"prompt": "a", "echo": False, "best_of": 1, "suffix": None, "n": 1})
    assert answer.status_code == 200, answer.text


BODIES = {
    b"": "Expecting value",
    b"{": "line 1 column 2",
    b"null": "object",
    b"[]": "object",
    b'"text"': "object",
    b'{"temperature": NaN}': "NaN",
    b'{"temperature": -Infinity}': "Infinity",
    b'{"temperature": 1e999}': "out of range",
    b'{"model": "a", "model": "b"}': "twice",
    b'{"a": {"b": 1, "b": 1}}': "twice",
    b'{"prompt": "\\ud800"}': "surrogate",
    b'{"\\udfff": 1}': "surrogate",
    b'{"prompt": "\xff"}': "UTF-8",
    b'{"seed": ' + b"9" * 5000 + b"}": "digits",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested",
}


@pytest.mark.parametrize(("body", "reason"), BODIES.items(), ids=lambda value: str(value)[:30])
def test_what_is_no_json_object_is_refused(client, body, reason):
    answer = client.post(TEXT, content=body, headers={"content-type": "application/json"})
    message = assert_error(answer, 400, None, "invalid_json")
    assert reason in message


def test_paired_surrogates_are_a_character(client, engine):
    body = b'{"prompt": "\\ud83d\\ude42"}'
    assert client.post(TEXT, content=body, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
    ],
)
def test_another_content_type_is_refused(client, content_type):
    answer = client.post(CHAT, content=json.dumps(chat()), headers={"content-type": content_type})
    assert_error(answer, 415, None, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", ""])
def test_a_json_content_type_or_none_is_accepted(client, content_type):
    answer = client.post(CHAT, content=json.dumps(chat()), headers={"content-type": content_type})
    assert answer.status_code == 200


def test_a_large_body_is_refused_whether_or_not_it_says_so():
    with live(ScriptedEngine(), max_body_bytes=1000) as server, httpx.Client(base_url=server.url) as client:
        headers = {"content-type": "application/json"}
        assert client.post(CHAT, json=chat("x" * 500)).status_code == 200
        answer = client.post(CHAT, json=chat("x" * 1000))
        assert_error(answer, 413, None, "request_too_large")

        def pieces():
            for _ in range(20):
                yield b" " * 100

        answer = client.post(CHAT, content=pieces(), headers=headers)
        assert_error(answer, 413, None, "request_too_large")


def test_a_body_that_says_it_is_large_is_refused_before_it_is_sent(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4"}, "model"),
        ({"model": "identity"}, "model"),
        ({"model": "gpt-4", "alignment": {"aligner": "polite"}}, "model"),
        ({"alignment": {"aligner": "rude"}}, "alignment.aligner"),
        ({"alignment": {"aligner": ""}}, "alignment.aligner"),
        ({"alignment": {"aligners": [{"name": "polite"}, {"name": "rude"}]}}, "alignment.aligners[1].name"),
    ],
)
def test_an_unknown_name_is_not_found(client, fields, param):
    assert_error(client.post(CHAT, json=chat(**fields)), 404, param, "model_not_found")


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
def test_the_engines_complaints_speak_of_the_clients_field(client, engine, path, param):
    body = chat() | {"prompt": "Hi"} if path == CHAT else {"prompt": "Hi"}
    engine.refusal = ContextLengthExceeded("Too long.", param="prompt")
    assert_error(client.post(path, json=body), 400, param, "context_length_exceeded")
    engine.refusal = InvalidRequest("Too many.", param="aligners")
    assert_error(client.post(path, json=body), 400, "alignment.aligners", "invalid_value")


def test_unknown_fields_are_accepted_and_counted(client):
    for _ in range(2):
        assert client.post(CHAT, json=chat(guided_json={}, **{"we ird": 1})).status_code == 200
    text = client.get("/metrics").text
    assert 'ram_unknown_fields_total{field="guided_json"} 2.0' in text
    assert 'ram_unknown_fields_total{field="(other)"} 2.0' in text
    assert "we ird" not in text


def test_the_names_of_unknown_fields_cannot_fill_the_metrics(client):
    for number in range(100):
        client.post(CHAT, json=chat(**{f"field_{number}": 1}))
    names = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("ram_unknown_fields_total")
    ]
    assert len(names) == 65
