"""Ten times more requests than can be served: who is let in is served as well as ever, the rest are told."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from tests.faults.crowd import CHAT
from tests.faults.operated import PATIENCE_S, Operated, operate, until
from tests.http.standin import chat
from tests.lengths import IS_FULL, full_or_short
from tests.models import save_pair
from tests.told import TABLE

CAPACITY_S = full_or_short(10.0, 2.0)
OVERLOAD_S = full_or_short(60.0, 6.0)
FACTOR = 10
NUM_TOKENS = 128
MAX_BATCH, MAX_QUEUE = 8, 8
GROWTH_BYTES = 48 * 2**20
"""What lists, buffers and connections of thousands of clients may leave behind; a leak leaves more."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """A model that is wide enough to be what the time goes into, not the requests."""
    home: Path = tmp_path_factory.mktemp("overload")
    proposal, aligners = save_pair(home / "pair", aligners=("polite",), hidden=128, layers=2)
    words = f"--aligner polite={aligners['polite']} --max-batch {MAX_BATCH} --max-queue {MAX_QUEUE}"
    with operate(home, proposal, *words.split(), "--kv-memory", "64MiB") as opened:
        yield opened


@dataclass
class Count:
    """What clients saw."""

    num_tokens: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def client_of(running: Operated) -> aiohttp.ClientSession:
    """A client that takes little of what it measures: httpx takes half a core for this many requests."""
    return aiohttp.ClientSession(
        running.url, headers=running.headers, connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(PATIENCE_S),
    )  # fmt: skip


async def ask(http: aiohttp.ClientSession, number: int, count: Count) -> None:
    body = chat(
        model=("polite", "big")[number % 2],
        stream=True,
        seed=number,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        stream_options={"include_usage": True},
    )
    try:
        async with http.post(CHAT, json=body) as answer:
            status, headers, text = answer.status, answer.headers, await answer.text()
    except aiohttp.ClientError as error:
        count.faults.append(repr(error))
        return
    count.statuses[status] += 1
    if status == 200:
        *_, last, end = re.findall(r"^data: (.*)$", text, re.MULTILINE)
        if end != "[DONE]" or json.loads(last)["usage"]["completion_tokens"] != NUM_TOKENS:
            count.faults.append(f"a stream was cut: {last}, {end}")
        count.num_tokens += NUM_TOKENS
    elif status != 429 or int(headers.get("retry-after", 0)) < 1:
        count.faults.append(f"{status} {dict(headers)}")


async def closed_loop(running: Operated, seconds: float) -> tuple[Count, float]:
    """As many clients as there are places, each of which asks again when it was answered."""
    count, began_s = Count(), time.monotonic()

    async def client(first: int, http: aiohttp.ClientSession) -> None:
        number = first
        while time.monotonic() - began_s < seconds:
            await ask(http, number, count)
            number += MAX_BATCH

    async with client_of(running) as http:
        await asyncio.gather(*[client(number, http) for number in range(MAX_BATCH)])
    return count, time.monotonic() - began_s


async def open_loop(running: Operated, rate_per_s: float, seconds: float) -> tuple[Count, float]:
    """Requests that come whether or not those before were answered."""
    count, began_s = Count(), time.monotonic()
    async with client_of(running) as http:
        asking = []
        for number in range(int(rate_per_s * seconds)):
            await asyncio.sleep(began_s + number / rate_per_s - time.monotonic())
            asking.append(asyncio.create_task(ask(http, number, count)))
        await asyncio.gather(*asking)
    return count, time.monotonic() - began_s


def test_under_ten_times_its_load_a_server_serves_as_much_as_ever(running: Operated) -> None:
    asyncio.run(closed_loop(running, CAPACITY_S / 2))
    alone, alone_s = asyncio.run(closed_loop(running, CAPACITY_S))
    assert not alone.faults
    capacity = alone.num_tokens / alone_s
    asyncio.run(open_loop(running, FACTOR * capacity / NUM_TOKENS, CAPACITY_S / 2))
    before_bytes, files = running.memory_bytes(), running.num_files
    crowded, crowded_s = asyncio.run(open_loop(running, FACTOR * capacity / NUM_TOKENS, OVERLOAD_S))
    over_s = time.monotonic()
    assert not crowded.faults, crowded.faults[:3]
    assert set(crowded.statuses) == {200, 429}
    until(lambda: running.is_idle and running.num_files <= files, "all is free")
    recovery_s = time.monotonic() - over_s
    grown_bytes = running.memory_bytes() - before_bytes
    assert grown_bytes < GROWTH_BYTES
    assert not running.num_server_errors()
    with running.client() as client:
        assert client.post(CHAT, json=chat(max_tokens=4)).status_code == 200
    goodput = crowded.num_tokens / crowded_s / capacity
    TABLE.add(
        f"{FACTOR} × overload for {OVERLOAD_S:g} s",
        f"{crowded.statuses[200]} × 200, {crowded.statuses[429]} × 429 with Retry-After",
        recovery_s,
        f"nothing; goodput {goodput:.0%} of {capacity:.0f} tokens/s, memory {grown_bytes / 2**20:+.1f} MiB",
    )
    if IS_FULL:
        assert goodput >= 0.9
