"""While a request waits for its aligner, its prompt is read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ram_core.engine.pace import Pace
from ram_core.engine.prompt_ends import PromptEnds
from ram_core.params import AlignerTerm
from tests.http.house import CHAT, House, Models, house, make_models
from tests.http.standin import chat, wait_until


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(models: Models, tmp_path: Path) -> Iterator[House]:
    """An engine that has no aligner, and is given none for now."""
    for model, name in (("one", "polite"), ("two", "terse")):
        models.put(model, tmp_path / name / "v1")
    with house(models, tmp_path, preload=(), slots=2) as found:
        found.is_holding = True
        yield found


def is_read(running: House, num_prompts: int = 1) -> bool:
    """Whether prompts have been read, and nothing is done any more."""
    engine = running.engine._engine
    return engine.stats.num_running == num_prompts and not engine.has_work


@contextlib.contextmanager
def asked(running: House, model: str = "polite", **fields: object) -> Iterator[Future[httpx.Response]]:
    """Somebody who waits for an answer, until the block ends."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(running.ask, model, **fields)


def said(answer: httpx.Response) -> object:
    return answer.json()["choices"]


def test_the_answer_goes_on_from_there(running: House) -> None:
    with asked(running, logprobs=True) as waiting:
        wait_until(lambda: is_read(running))
        assert running.held, "its aligner is not there yet"
        assert not waiting.done()
        running.release_loads()
        answer = waiting.result()
    assert running.versions_of(answer) == "polite@v1"
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = running.ask(logprobs=True, prompt_cache_key="another")
    assert said(answer) == said(again)
    wait_until(lambda: is_read(running, 0))
    assert running.engine.stats.num_pages_used == 0


def test_the_aligner_has_read_it_too_when_it_is_there(
    running: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that joins another of its kind."""
    running.is_holding = False
    assert running.ask("terse").status_code == 200
    running.is_holding = True
    known: list[int] = []
    known_terms = PromptEnds.known_terms

    def counted(ends: PromptEnds) -> object:
        terms = known_terms(ends)
        known.append(len(terms))
        return terms

    monkeypatch.setattr(PromptEnds, "known_terms", counted)
    # A load that takes its time.
    monkeypatch.setattr(Pace, "rest", lambda pace: time.sleep(0.01))
    with asked(running, alignment={"strength": 0.5}, logprobs=True) as waiting:
        wait_until(lambda: is_read(running))
        [prefill] = running.engine._engine._scheduler.prefills
        assert prefill.awaits == (AlignerTerm("polite@v1", 0.5),)
        running.release_loads()
        answer = waiting.result()
    assert known[-1] == 1
    again = running.ask(alignment={"strength": 0.5}, logprobs=True, prompt_cache_key="another")
    assert said(answer) == said(again)


def test_it_is_read_once_a_load_that_was_under_way_before_goes_on(running: House) -> None:
    with asked(running, "terse") as other:
        wait_until(lambda: is_read(running))
        with asked(running) as waiting:
            wait_until(lambda: is_read(running, 2))
            running.release_loads()
            assert running.versions_of(waiting.result()) == "polite@v1"
        assert running.versions_of(other.result()) == "terse@v1"


def test_all_prompts_of_a_request_are_read(running: House) -> None:
    body = {"model": "polite", "prompt": ["Please", "Thank you"], "max_tokens": 3, "seed": 1}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(running.client.post, "/v1/completions", json=body)
        wait_until(lambda: is_read(running, 2))
        running.release_loads()
        answer = waiting.result()
    assert said(answer) == said(running.client.post("/v1/completions", json=body))


def test_who_hangs_up_leaves_nothing(running: House) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.server.url}{CHAT}", json=chat(model="polite"), timeout=1)
    assert running.held
    wait_until(lambda: is_read(running, 0))
    assert running.engine.stats.num_pages_used == 0


def test_who_is_refused_leaves_nothing(running: House) -> None:
    with asked(running) as waiting:
        wait_until(lambda: is_read(running))
        (running.root / "polite" / "v1" / "model.safetensors").write_bytes(b"")
        running.release_loads()
        assert waiting.result().status_code == 503
    wait_until(lambda: is_read(running, 0))
    assert running.engine.stats.num_pages_used == 0


def test_what_cannot_be_served_is_refused_when_the_aligner_is_there(running: House) -> None:
    body = {"model": "polite", "prompt": [99_999], "max_tokens": 3}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(running.client.post, "/v1/completions", json=body)
        running.wait_held()
        assert not waiting.done()
        running.release_loads()
        answer = waiting.result()
    assert answer.status_code == 400
    assert "Token ids" in answer.json()["error"]["message"]
    assert is_read(running, 0)
