"""A corpus of bad requests against a real engine: no 5xx, no hang, every error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ram_core.errors import ContextLengthExceeded
from server.text import encode_chat, encode_prompts
from tests.faults.bad_requests import BY_HAND, CHAT, CROSSED, TEXT, Bad
from tests.faults.judge import fault_of
from tests.http.standin import PATIENCE_S, TOKENIZER, LiveServer, chat, count_metrics, wait_until
from tests.lengths import full_or_short

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(small_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=small_server.url, timeout=PATIENCE_S) as http:
        yield http
        assert http.post(CHAT, json=chat(model="polite", max_tokens=2)).status_code == 200


@pytest.fixture(autouse=True)
def _nothing_is_left(small_server: LiveServer, client: httpx.Client) -> Iterator[None]:
    """After each test the engine is idle."""
    yield
    wait_until(
        lambda: (
            not small_server.engine._streams.num_open and not small_server.engine._engine.stats.num_pages_used
        )
    )
    assert client.get("/health/ready").status_code == 200


def fault_in(client: httpx.Client, bad: Bad) -> str:
    answer = client.post(bad.path, content=bad.body, headers=JSON)
    if bad.statuses and answer.status_code not in bad.statuses:
        return f"status {answer.status_code}, not {bad.statuses}: {answer.text[:200]}"
    return fault_of(answer.status_code, answer.headers, answer.content)


def test_the_corpus_is_large() -> None:
    assert len(BY_HAND) + len(CROSSED) > 2000


@pytest.mark.parametrize("bad", BY_HAND, ids=lambda bad: bad.name)
def test_what_a_hand_has_made_is_answered_soundly(client: httpx.Client, bad: Bad) -> None:
    assert not (fault := fault_in(client, bad)), fault


@pytest.mark.timeout(600)
def test_no_field_takes_a_value_amiss(client: httpx.Client) -> None:
    """The short run takes every so many, another part of the corpus for each field."""
    chosen = CROSSED[:: full_or_short(1, 24)]
    assert not {bad.name: fault for bad in chosen if (fault := fault_in(client, bad))}


def test_what_only_looks_like_a_field_does_not_fill_the_metrics(client: httpx.Client) -> None:
    names = [name for name in count_metrics(client.get("/metrics").text) if "unknown_fields" in name]
    assert len(names) < 300


_NAMES = """
model messages prompt role content type text n stop seed stream logprobs temperature top_p alignment aligners
name strength candidates stream_options tools
"""
_KEYS = st.sampled_from(_NAMES.split())
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "polite", "text", "product", "big"])
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": _LEAVES, "content": _VALUES, "name": _VALUES}), max_size=3
)


@pytest.mark.timeout(600)
@settings(
    max_examples=full_or_short(3000, 60),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(
    path=st.sampled_from([CHAT, TEXT]),
    start=st.fixed_dictionaries(
        {}, optional={"messages": _MESSAGES, "prompt": _VALUES, "alignment": _VALUES}
    ),
    others=st.dictionaries(_KEYS, _VALUES, max_size=3),
)
def test_what_hypothesis_makes_up_is_answered_soundly(
    client: httpx.Client, path: str, start: dict[str, object], others: dict[str, object]
) -> None:
    answer = client.post(path, json=others | start | {"max_tokens": 1})
    assert not (fault := fault_of(answer.status_code, answer.headers, answer.content)), fault


LONG = b"a" * 10_000
REFUSED_HEADERS = {"content-type": [b"text/json", b"\xff", LONG, b"application/json; charset=x"]}
HARMLESS_HEADERS = {
    "content-type": [b"application/json;", b'application/json; charset="utf-8"'],
    "x-request-id": [b"\xff\xfe", LONG, b"{}", b"a\tb", b".."],
    "authorization": [b"\xff", b"Bearer", b"Bearer \xc3\xa4", b"Basic \x80", b""],
    "accept": [b"text/html;q=0", b"\xff", LONG],
    "content-encoding": [b"identity"],
    "x-forwarded-for": [b"\xff", b"a,b,c", b"127.0.0.1" * 500, b"[::1]:x"],
    "x-forwarded-proto": [b"\xff", b"gopher", b"https, http"],
    "host": [b"\xff", b"x/health?", b"[", LONG, b""],
    "cookie": [b"=" * 10_000, b"\xff"],
    "range": [b"bytes=0-" + b",0-" * 3000],
    "expect": [b"\xff", b"100-continue, 100-continue"],
}
HEADERS = [
    (name, value, status)
    for status, table in ((415, REFUSED_HEADERS), (200, HARMLESS_HEADERS))
    for name, values in table.items()
    for value in values
]


@pytest.mark.parametrize(("name", "value", "status"), HEADERS, ids=lambda value: str(value)[:30])
def test_what_stands_in_headers_harms_nothing(
    client: httpx.Client, name: str, value: bytes, status: int
) -> None:
    headers = {b"content-type": b"application/json", name.encode(): value}
    answer = client.post(CHAT, content=json.dumps(chat(max_tokens=1)), headers=headers)
    assert answer.status_code == status, answer.text
    assert not (fault := fault_of(answer.status_code, answer.headers, answer.content)), fault


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_text_that_no_context_holds_is_refused_before_it_is_encoded(is_chat: bool) -> None:
    """Megabytes of one letter take a tokenizer seconds. What could be just so many tokens is encoded."""
    longest = max(TOKENIZER.get_vocab(), key=len)

    def encode(text: str) -> object:
        if is_chat:
            return asyncio.run(encode_chat(TOKENIZER, [{"role": "user", "content": text}], max_tokens=16))
        return asyncio.run(encode_prompts(TOKENIZER, [text], max_tokens=16))

    assert encode(16 * longest)
    with pytest.raises(ContextLengthExceeded) as refusal:
        encode(16 * longest + "a")
    assert refusal.value.param == ("messages" if is_chat else "prompt")
