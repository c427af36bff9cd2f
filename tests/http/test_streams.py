"""Streams, as a strict client reads them."""

from __future__ import annotations

import json
import math
import re

import httpx
import pytest

from ram_core.engine.messages import FailedEvent, StartedEvent, StepTelemetry, TokenEvent
from ram_core.errors import NonFiniteLogits
from server.openai import render
from tests.http.standin import (
    EOS_ID,
    Gate,
    ScriptedEngine,
    chat,
    chunks_of,
    events_of,
    ids_of,
    live,
    say,
)

TELEMETRY = StepTelemetry(kl_p_q=0.5, kl_pi_p=0.25, ess=0.75, aligner_mass=0.9, is_fallback=False)


def stream(client: httpx.Client, body: dict, path: str = "/v1/chat/completions") -> list[dict]:
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return chunks_of(answer.text)


def test_a_stream_is_a_role_then_text_then_a_reason(client):
    chunks = stream(client, chat())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Hello, dog!"
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_all_chunks_share_their_head(client):
    chunks = stream(client, chat(stream_options={"include_usage": True}))
    heads = {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}
    assert len(heads) == 1
    assert heads.pop()[1] == "chat.completion.chunk"
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert chunks[0]["choices"][0]["logprobs"] is None


def test_the_content_type_is_that_of_server_sent_events(client):
    answer = client.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in answer.text


def test_usage_comes_last_and_only_if_asked_for(client):
    chunks = stream(client, chat(stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    # The end-of-text token was drawn, so it counts.
    assert usage["completion_tokens"] == len(ids_of("Hello, dog!")) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert all("usage" not in chunk for chunk in stream(client, chat()))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_first_token_is_there_before_the_second_is_drawn(client, engine, path):
    gate = Gate()

    def script(request):
        first, *rest = say(request, "Hello")
        return [first, gate, *rest]

    engine.script = script
    body = chat(stream=True) if "chat" in path else {"model": "big", "prompt": "Hi", "stream": True}
    with client.stream("POST", path, json=body) as answer:
        lines = answer.iter_lines()
        seen = ""
        while "H" not in seen:
            line = next(lines)
            if line.startswith("data: "):
                choice = json.loads(line[6:])["choices"][0]
                seen += choice.get("text") or choice.get("delta", {}).get("content", "")
        assert seen == "H"
        gate.open()
        assert list(lines)[-2] == "data: [DONE]"


def test_nothing_leaves_before_the_first_token(client, engine):
    """Neither the role nor the status: what fails before the first token must still be able to be no 200."""
    engine.script = lambda request: [
        StartedEvent(request.request_id, 0.0),
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model returned NaN.")),
    ]
    answer = client.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"


def test_a_long_wait_is_filled_with_comments():
    gate = Gate()
    engine = ScriptedEngine(lambda request: [gate, *say(request, "Hello")])
    with live(engine, ping_s=0.02) as server, httpx.Client(timeout=10) as client:  # noqa: SIM117
        with client.stream("POST", f"{server.url}/v1/chat/completions", json=chat(stream=True)) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200
            assert next(lines) == ": ping"
            gate.open()
            rest = "\n".join(lines)
    assert '"role":"assistant"' in rest
    assert rest.rstrip().endswith("data: [DONE]")


def test_choices_are_interleaved_and_each_ends_once(client, engine):
    def script(request):
        pairs = zip(say(request, "one dog"), say(request, "two dog", index=1), strict=False)
        return [event for pair in pairs for event in pair] + say(request, "two dog", index=1)[-1:]

    engine.script = script
    chunks = stream(client, chat(n=2))
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert indices[:4] == [0, 0, 1, 1]
    assert indices[4:6] == [0, 1]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == ("one dog", "two dog")[index]


def test_half_a_character_is_never_sent(client, engine):
    engine.script = lambda request: say(request, "é🙂")
    assert len(ids_of("🙂")) > 1
    chunks = stream(client, chat())
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]]
    assert texts == ["é", "🙂"]


def test_a_stop_string_is_cut_and_ends_its_choice_alone(client, engine):
    gate = Gate()

    def script(request):
        stopped = say(request, "one STOP two", finish=None)
        return [*stopped, gate, *say(request, "the dog", index=1, finish="length")]

    engine.script = script
    body = chat(n=2, stop="STOP", stream=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        gate.wait_reached()
        assert engine.cancelled.get(timeout=10) == (engine.last.request_id, 0)
        gate.open()
        text = answer.read().decode()
    chunks = chunks_of(text)
    own = [[c["choices"][0] for c in chunks if c["choices"][0]["index"] == index] for index in (0, 1)]
    assert "".join(choice["delta"].get("content", "") for choice in own[0]) == "one "
    assert own[0][-1]["finish_reason"] == "stop"
    assert "".join(choice["delta"].get("content", "") for choice in own[1]) == "the dog"
    assert own[1][-1]["finish_reason"] == "length"
    assert engine.cancelled.empty()


def test_the_beginning_of_a_stop_string_waits_until_it_is_none(client, engine):
    engine.script = lambda request: say(request, "a STO", finish="length")
    chunks = stream(client, chat(stop=["STOP"]))
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert contents[-2] == "STO"
    assert all("S" not in content for content in contents[:-2])


def test_a_failure_midway_is_told_and_then_done(client, engine):
    engine.script = lambda request: [
        *say(request, "Hello", finish=None),
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model returned NaN.")),
    ]
    answer = client.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.status_code == 200
    *_, error, done = events_of(answer.text)
    assert json.loads(error) == {
        "error": {"message": "The model returned NaN.", "type": "server_error", "param": None, "code": None}
    }
    assert done == "[DONE]"


def test_a_failing_choice_stops_its_siblings(client, engine):
    engine.script = lambda request: [
        *say(request, "Hello", index=1, finish=None),
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model returned NaN.")),
        Gate(),
    ]
    client.post("/v1/chat/completions", json=chat(stream=True, n=2))
    assert engine.cancelled.get(timeout=10) == (engine.last.request_id, 1)


def test_a_bug_midway_is_logged_and_told_without_its_details(client, engine, caplog):
    def script(request):
        yield from say(request, "Hello", finish=None)
        raise ValueError("secret path /etc")

    engine.script = script
    *_, error, done = events_of(client.post("/v1/chat/completions", json=chat(stream=True)).text)
    assert json.loads(error)["error"]["type"] == "server_error"
    assert "secret" not in error
    assert done == "[DONE]"
    assert "secret path" in caplog.text


def test_an_engine_that_falls_silent_is_an_error(client, engine):
    engine.script = lambda request: say(request, "Hello", finish=None)
    *_, error, _ = events_of(client.post("/v1/chat/completions", json=chat(stream=True)).text)
    assert json.loads(error)["error"]["code"] == "engine_unavailable"


def test_completions_stream_text_and_end_on_their_last_chunk(client):
    body = {"model": "big", "prompt": ["a", "b"], "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = stream(client, body, "/v1/completions")
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4 * (len(ids_of("Hello, dog!")) + 1)
    for index in range(4):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert all(set(choice) == {"index", "text", "logprobs", "finish_reason"} for choice in own)
        assert "".join(choice["text"] for choice in own) == "Hello, dog!"
        assert [choice["finish_reason"] for choice in own][-2:] == [None, "stop"]


def test_log_probs_travel_with_their_text(client, engine):
    engine.script = lambda request: say(request, "é🙂", log_prob=-math.inf)
    chunks = stream(client, chat(logprobs=True, top_logprobs=2))
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert entries[0] is None
    assert entries[-1] is None
    told = [entry["content"] for entry in entries[1:-1]]
    assert bytes(byte for entry in told[1] for byte in entry["bytes"]) == "🙂".encode()
    assert all(entry["logprob"] == -9999.0 for content in told for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for content in told for entry in content)


def test_telemetry_is_told_token_by_token_and_summed_up(client, engine):
    engine.script = lambda request: say(request, "dog", telemetry=TELEMETRY)
    chunks = stream(client, chat(model="polite", alignment={"telemetry": True}))
    *inner, last = chunks[1:]
    figures = {"kl_p_q": 0.5, "kl_pi_p": 0.25, "ess": 0.75, "aligner_mass": 0.9, "fallback": False}
    assert [entry for chunk in inner for entry in chunk["choices"][0]["alignment"]] == [figures] * len(
        ids_of("dog")
    )
    assert last["alignment"] == {
        "aligners": [{"name": "polite", "version": "1", "strength": 1.0}],
        "resampling": "product",
        "tokens": len(ids_of("dog")) + 1,
        "fallbacks": 0,
        "mean_kl_p_q": 0.5,
        "mean_kl_pi_p": 0.25,
        "mean_ess": 0.75,
        "mean_aligner_mass": 0.9,
    }
    assert all("alignment" not in chunk for chunk in inner)


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/chat/completions", {"logprobs": True}), ("/v1/completions", {"logprobs": 0})]
)
def test_telemetry_stands_beside_log_probs_if_there_are_any(client, engine, path, fields):
    engine.script = lambda request: say(request, "dog", telemetry=TELEMETRY)
    body = chat(**fields) if "chat" in path else {"prompt": "Hi", **fields}
    chunks = stream(client, body | {"model": "polite", "alignment": {"telemetry": True}}, path)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all("alignment" not in choice for choice in choices)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    if "chat" in path:
        figures = [entry["alignment"] for log_probs in told for entry in log_probs["content"]]
    else:
        figures = [entry for log_probs in told for entry in log_probs["alignment"]]
    assert [entry["ess"] for entry in figures] == [0.75] * len(ids_of("dog"))


def test_without_a_wish_for_telemetry_there_is_none(client, engine):
    engine.script = lambda request: say(request, "dog", telemetry=TELEMETRY)
    answer = client.post("/v1/chat/completions", json=chat(model="polite", stream=True))
    assert "alignment" not in answer.text


def test_an_answer_that_ends_at_once_still_has_a_role_and_a_reason(client, engine):
    engine.script = lambda request: [TokenEvent(request.request_id, 0, EOS_ID, -0.1, finish_reason="stop")]
    chunks = stream(client, chat())
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


BODIES = [("/v1/chat/completions", chat()), ("/v1/completions", {"model": "big", "prompt": "Hi"})]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=["chat", "text"])
@pytest.mark.parametrize("wants_usage", [False, True], ids=["plain", "usage"])
def test_chunks_filled_in_are_those_that_are_rendered(client, engine, monkeypatch, path, body, wants_usage):
    """The quick way to a chunk of text writes what the slow way writes, byte by byte."""
    every_char = "".join(map(chr, range(128))) + '\x80é\u2028🙂\\" </script>'
    engine.script = lambda request: [*say(request, every_char, index=1), *say(request, "dog", index=0)]
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}

    def text() -> list[str]:
        answer = client.post(path, json=body | {"stream": True, "n": 2} | options).text
        return [re.sub(r'"(id|created)":[^,]*', "", chunk) for chunk in events_of(answer)]

    quick = text()
    monkeypatch.setattr(render._Head, "_is_plain", False)
    assert text() == quick
    assert len(quick) > 100
