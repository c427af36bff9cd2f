"""Aligners come, go and change places while a real engine answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ram_core.aligners.states import AskedAligner, State
from ram_core.errors import AlignerUnavailable
from ram_core.params import Resampling
from server.aligners import service
from server.aligners.service import AlignerService
from tests.http.house import CHAT, House, Models, house, make_models, put_preset
from tests.http.standin import chat, chunks_of, count_metrics, wait_until


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(service, "POLL_S", 0.02)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "aligners"
    for name in ("polite", "terse"):
        (path / name).mkdir(parents=True)
    return path


def slow_down(running: House, step_s: float = 0.01) -> None:
    """Let each step of the engine take a while, so that a stream outlasts what is done meanwhile."""
    step = running.engine._engine.step

    def slow_step():
        time.sleep(step_s)
        return step()

    running.engine._engine.step = slow_step  # type: ignore[method-assign]


def test_running_streams_end_on_their_version_and_new_ones_begin_on_the_next(models, root):
    models.put("one", root / "polite" / "v1")
    with house(models, root) as running:
        models.put("two", root / "polite" / "v2")
        before = running.ask(max_tokens=100)
        slow_down(running)
        body = chat(model="polite", max_tokens=100, seed=1, ignore_eos=True, stream=True)
        with running.client.stream("POST", CHAT, json=body) as stream:
            assert running.versions_of(stream) == "polite@v1"
            lines = stream.iter_lines()
            first = next(lines)
            wait_until(lambda: running.do(lambda service: len(service.status_of("polite").manifests)) == 2)
            running.promote("polite", "v2")
            old = running.version("polite", "v1")
            assert (old.state, old.num_references) == (State.DRAINING, 1), "the stream still runs"
            new = running.ask()
            assert running.versions_of(new) == "polite@v2"
            rest = "\n".join([first, *lines]).strip()
        chunks = chunks_of(rest)
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == before.json()["choices"][0]["message"]["content"]
        wait_until(lambda: running.version("polite", "v1").state is State.EVICTED)
        assert "polite@v1" not in running.engine.aligners
        running.do(lambda service: service.rollback("polite"))
        running.wait(lambda service: service.wait_promoted("polite"))
        again = running.ask(max_tokens=100)
        assert running.versions_of(again) == "polite@v1"
        assert again.json()["choices"] == before.json()["choices"]


def test_a_version_that_cannot_be_loaded_changes_nothing(models, root):
    models.put("one", root / "polite" / "v1")
    with house(models, root) as running:
        before = running.ask().json()["choices"]
        # Its files are those of the manifest, but not what the config says.
        broken = shutil.copytree(models.small["two"], root / "polite" / ".v2")
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
        (root / "polite" / ".v2").rename(root / "polite" / "v2")
        wait_until(lambda: running.do(lambda service: len(service.status_of("polite").manifests)) == 2)
        with pytest.raises(AlignerUnavailable, match="shape"):
            running.promote("polite", "v2")
        assert running.version("polite", "v2").state is State.FAILED
        answer = running.ask()
        assert (running.versions_of(answer), answer.json()["choices"]) == ("polite@v1", before)


def test_a_canary_takes_its_share_of_users_and_keeps_them(models, root):
    models.put("one", root / "polite" / "v1")
    models.put("two", root / "polite" / "v2")
    with house(models, root, slots=3) as running:
        running.promote("polite", {"v1": 0.75, "v2": 0.25})

        def version_for(user: str) -> str:
            return running.versions_of(running.ask(user=user, max_tokens=1))

        users = [f"user {number}" for number in range(60)]
        with ThreadPoolExecutor(4) as pool:
            first, second = list(pool.map(version_for, users)), list(pool.map(version_for, users))
        assert first == second
        assert 5 <= Counter(first)["polite@v2"] <= 27
        answer = running.ask(safety_identifier=users[0], user="somebody else", max_tokens=1)
        assert running.versions_of(answer) == first[0]
        samples = count_metrics(running.client.get("/metrics").text)
        for version in ("v1", "v2"):
            labels = f'{{aligner="polite",version="{version}"}}'
            num_tokens = samples[f"ram_aligned_tokens_total{labels}"]
            assert num_tokens >= 2 * first.count(f"polite@{version}")
            for name in ("kl_p_q_nats", "kl_pi_p_nats", "ess_fraction"):
                assert samples[f"ram_{name}_count{labels}"] == num_tokens


def test_users_without_a_name_are_spread_where_there_are_no_tenants(models, root):
    models.put("one", root / "polite" / "v1")
    models.put("two", root / "polite" / "v2")
    with house(models, root, slots=3) as running:
        running.promote("polite", {"v1": 1, "v2": 1})
        versions = {running.versions_of(running.ask(max_tokens=1)) for _ in range(40)}
        assert versions == {"polite@v1", "polite@v2"}


def test_a_request_waits_for_an_aligner_and_goes_on_when_it_is_there(models, root):
    models.put("one", root / "polite" / "v1")
    with house(models, root, preload=()) as running, ThreadPoolExecutor(1) as pool:
        running.is_holding = True
        waiting = pool.submit(running.ask)
        running.wait_held()
        assert running.ask("big").status_code == 200, "others are not concerned"
        assert running.version("polite", "v1").state is State.LOADING
        assert running.do(lambda service: service.registry.num_waiting) == 1
        running.release_loads()
        assert running.versions_of(waiting.result()) == "polite@v1"
        wait_until(lambda: running.version("polite", "v1").num_references == 0)


def test_waiting_has_an_end_and_a_full_house_a_sign(models, root):
    models.put("one", root / "polite" / "v1")
    with house(models, root, preload=(), aligner_wait_s=0.3) as running, ThreadPoolExecutor(1) as pool:
        running.is_holding = True
        limits = running.service.registry.limits
        object.__setattr__(limits, "max_waiting", 1)
        waiting = pool.submit(running.ask)
        running.wait_held()
        full = running.ask()
        late = waiting.result()
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "aligner_unavailable")
        assert int(late.headers["retry-after"]) > 0
        assert running.do(lambda service: service.registry.num_waiting) == 0
        running.release_loads()


def test_who_hangs_up_waits_no_more(models, root):
    models.put("one", root / "polite" / "v1")
    with house(models, root, preload=()) as running:
        running.is_holding = True
        gone = threading.Thread(target=lambda: _hang_up(running))
        gone.start()
        running.wait_held()
        gone.join()
        wait_until(lambda: running.do(lambda service: service.registry.num_waiting) == 0)
        with pytest.raises(TimeoutError):
            running.wait(_give_up)
        assert running.do(lambda service: service.registry.num_waiting) == 0
        running.release_loads()
        wait_until(lambda: running.version("polite", "v1").state is State.RESIDENT)
        assert running.version("polite", "v1").num_references == 0


def _hang_up(running: House) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.server.url}{CHAT}", json=chat(model="polite"), timeout=0.5)


async def _give_up(service: AlignerService) -> None:
    await asyncio.wait_for(service.acquire("r", [AskedAligner("polite")], sticky_key=""), 0.01)


def test_a_promotion_that_was_taken_back_tells_who_waits_for_it(models, root):
    models.put("one", root / "polite" / "v1")
    models.put("two", root / "polite" / "v2")
    with house(models, root) as running, ThreadPoolExecutor(1) as pool:
        assert running.versions_of(running.ask()) == "polite@v2", "the newest at the start"
        running.is_holding = True
        promotion = pool.submit(running.promote, "polite", "v1")
        running.wait_held()
        running.do(lambda service: service.rollback("polite"))
        running.wait(lambda service: service.wait_promoted("polite"))
        with pytest.raises(AlignerUnavailable):
            promotion.result()
        running.release_loads()
        assert running.versions_of(running.ask()) == "polite@v2"


def test_what_fails_is_refused_with_a_time_to_come_back(models, root):
    broken = models.put("one", root / "polite" / "v1")
    with house(models, root, preload=()) as running:
        (broken / "model.safetensors").write_bytes(b"nonsense" * 1000)
        for _ in range(2):
            answer = running.ask()
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "service_unavailable_error"
            assert int(answer.headers["retry-after"]) > 0
            assert str(root) not in answer.text
        unknown = running.ask("rude")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_the_least_recently_used_goes_when_memory_is_short(models, root):
    for name, model in (("a", "one"), ("b", "two"), ("c", "three")):
        (root / name).mkdir()
        models.put(model, root / name / "v1")
    with house(models, root, preload=("a",)) as running:
        size = running.version("a", "v1").num_bytes
    with house(models, root, preload=(), memory_bytes=2 * size) as running:
        texts = {}
        for name in ("a", "b", "a", "c"):
            texts[name] = running.ask(name).json()["choices"]
        wait_until(lambda: running.version("b", "v1").state is State.EVICTED)
        assert {name: running.version(name, "v1").state for name in "ac"} == dict.fromkeys(
            "ac", State.RESIDENT
        )
        assert running.ask("b").json()["choices"] == texts["b"]
        assert running.version("a", "v1").state is State.EVICTED
        assert running.do(lambda service: (service.held_bytes, service.memory_bytes)) == (2 * size, 2 * size)


def test_half_a_directory_is_not_picked_up_and_a_whole_one_is(models, root, tmp_path):
    models.put("one", root / "terse" / "v1")
    (tmp_path / "polite").mkdir()
    whole = models.put("two", tmp_path / "polite" / "v1")
    with house(models, root) as running:
        target = root / "polite" / "v1"
        target.mkdir()
        for path in sorted(whole.iterdir()):
            half = path.read_bytes()
            (target / path.name).write_bytes(half[: len(half) // 2] if "safetensors" in path.name else half)
        wait_until(lambda: any("v1" in str(path) for path in running.service.held_back))
        assert running.ask().status_code == 404
        shutil.copy(whole / "model.safetensors", target)
        wait_until(lambda: "polite" in running.service.names)
        assert running.versions_of(running.ask()) == "polite@v1"
        shutil.rmtree(root / "terse")
        running.do(lambda service: service.unload("terse"))
        wait_until(lambda: "terse" not in running.service.names)
        assert running.ask("terse").status_code == 404
        listed = [model["id"] for model in running.client.get("/v1/models").json()["data"]]
        assert listed == ["big", "polite"]


def test_files_that_change_while_they_are_loaded_are_not_served(models, root, monkeypatch):
    # Whoever looks at the directory after the failure makes the version known anew, without its reason.
    monkeypatch.setattr(service, "POLL_S", 60)
    path = models.put("one", root / "polite" / "v1")
    with house(models, root, preload=()) as running, ThreadPoolExecutor(1) as pool:
        running.is_holding = True
        waiting = pool.submit(running.ask)
        running.wait_held()
        shutil.copy(models.small["two"] / "model.safetensors", path)
        running.release_loads()
        assert waiting.result().status_code == 503
        wait_until(lambda: "polite@v1" not in running.engine.aligners)
        assert "after it was verified" in running.version("polite", "v1").reason


def test_defaults_of_the_manifest_hold_where_a_request_says_nothing(models, root):
    models.put("one", root / "polite" / "v1", strength=2.0, resampling=Resampling.NUCLEUS, kl_threshold=100.0)
    put_preset(root / "half" / "v1", polite=0.25)
    with house(models, root) as running:

        def summary(model: str = "polite", **words):
            answer = running.ask(model, alignment={"telemetry": True, **words}).json()["alignment"]
            return answer["aligners"][0]["strength"], answer["resampling"], answer["fallbacks"]

        assert summary() == (2.0, "nucleus", 0)
        assert summary(strength=3, resampling="product") == (3.0, "product", 0)
        assert summary(kl_threshold=-1) == (2.0, "nucleus", 6)
        assert summary(aligners=[{"name": "polite"}], strength=2) == (4.0, "nucleus", 0)
        running.do(lambda service: service.patch("polite", strength=0.5, kl_threshold=0.0))
        assert summary() == (0.5, "nucleus", 6)
        half = running.ask("half").json()["choices"]
        same = running.ask(alignment={"strength": 0.25, "resampling": "product", "kl_threshold": 1e9})
        assert half == same.json()["choices"]


def test_the_manifests_number_of_candidates_holds_where_a_request_says_none(models, root):
    models.put("one", root / "polite" / "v1", strength=4.0, resampling=Resampling.CANDIDATES, candidates=1)
    with house(models, root) as running:

        def text(**words) -> str:
            return running.ask(alignment=words).json()["choices"][0]["message"]["content"]

        few, many = text(candidates=1), text(candidates=200)
        assert few != many
        assert text() == few
        running.do(lambda service: service.patch("polite", num_candidates=200))
        assert text() == many
