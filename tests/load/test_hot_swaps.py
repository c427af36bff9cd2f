"""An aligner changes its version again and again under steady load; only its own answers tell."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.http.house import CHAT, House, Models, house, make_models
from tests.http.standin import chat, chunks_of, wait_until
from tests.lengths import full_or_short
from tests.told import TABLE

NUM_SWAPS = full_or_short(1000, 20)
VERSIONS = {"v1": "one", "v2": "two", "v3": "three"}
GROWTH_BYTES = 48 * 2**20

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(models: Models, tmp_path: Path) -> Iterator[House]:
    """Two versions are in memory at most: the third always takes the place of another."""
    for name in ("polite", "terse"):
        (tmp_path / name).mkdir()
    for version, model in VERSIONS.items():
        models.put(model, tmp_path / "polite" / version)
    models.put("two", tmp_path / "terse" / "v1")
    with house(models, tmp_path, slots=4) as opened:
        yield opened


def stream(client: httpx.Client, model: str) -> tuple[str, int]:
    """A seeded answer, and how many tokens it has."""
    body = chat(model=model, stream=True, seed=3, max_tokens=24, ignore_eos=True)
    answer = client.post(CHAT, json=body | {"stream_options": {"include_usage": True}})
    assert answer.status_code == 200, answer.text
    *chunks, last = chunks_of(answer.text)
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return text, last["usage"]["completion_tokens"]


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def test_swaps_under_load_fail_nothing_and_disturb_nobody(running: House) -> None:
    alone = {}
    for version in VERSIONS:
        running.promote("polite", version)
        alone[version] = stream(running.client, "polite")
    assert len({text for text, _ in alone.values()}) == len(VERSIONS)
    neighbours = {model: stream(running.client, model) for model in ("terse", "big")}
    is_over, seen = threading.Event(), {model: [] for model in ("polite", "terse", "big")}

    def ask(model: str) -> None:
        with httpx.Client(base_url=running.server.url, timeout=60) as client:
            while not is_over.is_set():
                seen[model].append(stream(client, model))

    def swap(count: int) -> None:
        for number in range(count):
            running.promote("polite", list(VERSIONS)[number % 3])
            if number % 5 == 4:
                # Swaps can be faster than any answer: the second from now begins on this very version.
                wait_for_answers(2)

    def wait_for_answers(count: int) -> None:
        wanted = len(seen["polite"]) + count
        wait_until(lambda: len(seen["polite"]) >= wanted or any(each.done() for each in asking))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, model) for model in seen]
        try:
            swap(NUM_SWAPS // 5)
            before_bytes = own_bytes()
            swap(NUM_SWAPS - NUM_SWAPS // 5)
            grown_bytes = own_bytes() - before_bytes
        finally:
            is_over.set()
        for each in asking:
            each.result(60)
    assert set(seen["polite"]) <= set(alone.values()), "each answer is wholly one version's"
    for model, answer in neighbours.items():
        assert set(seen[model]) == {answer}
    assert len(set(seen["polite"])) > 1
    wait_until(lambda: not running.engine._engine.stats.num_pages_used)
    running.promote("polite", "v1")
    assert stream(running.client, "polite") == alone["v1"]
    assert grown_bytes < GROWTH_BYTES
    count = sum(map(len, seen.values()))
    saw = f"{count} requests: 0 failed, 0 tokens lost or repeated, neighbours' answers the same"
    TABLE.add(
        f"{NUM_SWAPS} hot swaps under load", saw, None, f"nothing; memory {grown_bytes / 2**20:+.1f} MiB"
    )
