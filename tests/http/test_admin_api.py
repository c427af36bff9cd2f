"""The admin API around a real engine: aligners come, are promoted, and go while requests run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.http.admin_house import ALIGNERS, WAIT, AdminHouse, admin_house, error_of, states
from tests.http.house import CHAT
from tests.http.standin import ScriptedEngine, chat, chunks_of, live, wait_until


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminHouse]:
    with admin_house(tmp_path_factory.mktemp("house"), vllm_lora_api=True) as opened:
        yield opened


# What is seen.


def test_everything_about_an_aligner_is_told(house):
    house.do("polite", "load")
    house.text_of("polite")
    # An answer is read before what it used is given back.
    wait_until(lambda: house.get("polite")["versions"][0]["references"] == 0)
    told = house.admin.get(ALIGNERS).json()
    assert told["object"] == "list"
    assert 0 < told["held_bytes"] <= told["memory_bytes"]
    polite = next(each for each in told["data"] if each["name"] == "polite")
    assert polite == house.get("polite")
    [version] = polite.pop("versions")
    assert polite == {
        "object": "aligner",
        "name": "polite",
        "shares": {"v1": 1.0},
        "next_shares": None,
        "earlier_shares": [],
        "defaults": {},
    }
    assert time.time() - 60 < version.pop("last_used") <= time.time()
    assert version.pop("bytes") > 10_000
    assert version.pop("measured")["requests"] == 1
    assert version == {
        "version": "v1",
        "state": "resident",
        "reason": "",
        "waits_for": "",
        "progress": 1.0,
        "device": "cpu",
        "references": 0,
        "pinned": False,
        "preset": False,
        "origin": "directory",
        "source": str(house.root / "polite" / "v1"),
        "terms": {"self": 1.0},
        "strength": 1.0,
        "resampling": "product",
        "kl_threshold": None,
        "candidates": None,
    }


def test_a_version_that_was_never_used_says_so(house):
    info = house.add("unused", house.stage())
    [version] = info["versions"]
    assert (version["state"], version["last_used"], version["bytes"]) == ("absent", None, 0)
    assert (info["version"], version["origin"]) == (version["version"], "admin")


# Coming and going.


def test_an_aligner_that_is_added_and_loaded_answers_at_once(house):
    info = house.add("fresh", house.stage(), load=True, pin=True)
    [version] = info["versions"]
    assert (version["state"], version["pinned"], info["shares"]) == ("resident", True, {info["version"]: 1.0})
    assert "fresh" in [model["id"] for model in house.admin.get("/v1/models").json()["data"]]
    assert house.text_of("fresh") == house.text_of("polite")


def test_an_aligner_that_is_only_known_is_loaded_by_its_first_request(house):
    house.add("lazy", house.stage("two"))
    house.text_of("lazy")
    assert set(states(house.get("lazy")).values()) == {"resident"}


def test_without_waiting_the_answer_tells_how_far_it_is(house):
    answer = house.admin.post(ALIGNERS, json={"name": "eager", "path": house.stage(), "load": True})
    assert answer.status_code == 202
    assert set(states(answer.json()).values()) <= {"verifying", "loading"}
    wait_until(lambda: "resident" in states(house.get("eager")).values())
    assert house.admin.post(f"{ALIGNERS}/eager/load").status_code == 200


def test_what_is_unloaded_is_freed_and_loaded_again_when_it_is_asked_for(house):
    house.add("tidal", house.stage(), load=True)
    before = house.admin.get(ALIGNERS).json()["held_bytes"]
    [version] = house.do("tidal", "unload")["versions"]
    assert version["state"] == "evicted"
    assert house.admin.get(ALIGNERS).json()["held_bytes"] < before
    house.text_of("tidal")
    assert set(states(house.get("tidal")).values()) == {"resident"}


def test_one_version_is_loaded_and_unloaded_beside_another(house):
    first = house.add("pairwise", house.stage("one"))["version"]
    second = house.add("pairwise", house.stage("two"))["version"]
    assert states(house.do("pairwise", "load", {"version": second, "pin": True})) == {
        first: "absent",
        second: "resident",
    }
    info = house.do("pairwise", "load")
    assert states(info) == {first: "resident", second: "resident"}
    assert states(house.do("pairwise", "unload", {"version": first}))[second] == "resident"
    assert info["shares"] == {first: 1.0}


def test_an_aligner_that_is_deleted_is_unknown_from_then_on(house):
    path = house.stage()
    house.add("brief", path, load=True)
    answer = house.admin.delete(f"{ALIGNERS}/brief", params=WAIT)
    assert (answer.status_code, answer.json()) == (
        200,
        {"object": "aligner", "name": "brief", "deleted": True},
    )
    assert error_of(house.admin.get(f"{ALIGNERS}/brief"))[:2] == (404, "model_not_found")
    assert error_of(house.admin.post(CHAT, json=chat(model="brief")))[:2] == (404, "model_not_found")
    assert (house.root / path).is_dir()
    # It may come again.
    house.add("brief", path, load=True)
    house.text_of("brief")


def test_what_runs_on_a_deleted_aligner_is_answered_to_its_end(house):
    house.add("leaving", house.stage(), load=True)
    long = {"model": "leaving", "max_tokens": 200, "seed": 1, "ignore_eos": True}
    whole = house.text_of(**long)
    with house.admin.stream("POST", CHAT, json=chat(**long, stream=True)) as answer:
        lines = (line for line in answer.iter_lines() if line)
        begun = next(lines)
        deleted = house.admin.delete(f"{ALIGNERS}/leaving")
        refused = house.admin.post(CHAT, json=chat(model="leaving"))
        text = "".join(
            chunk["choices"][0]["delta"].get("content", "")
            for chunk in chunks_of("\n\n".join([begun, *lines, ""]))
        )
    assert (deleted.status_code, refused.status_code) == (202, 404)
    [version] = deleted.json()["versions"]
    assert (version["state"], version["references"]) == ("draining", 1)
    assert text == whole
    wait_until(lambda: house.admin.get(f"{ALIGNERS}/leaving").status_code == 404)


# Promotions.


def test_a_promotion_and_its_rollback_change_who_answers(house):
    first = house.add("moving", house.stage("one"), load=True)["version"]
    second = house.add("moving", house.stage("two"))["version"]
    before = house.text_of("moving")
    info = house.do("moving", "promote", {"version": second})
    assert (info["shares"], info["earlier_shares"], info["next_shares"]) == (
        {second: 1.0},
        [{first: 1.0}],
        None,
    )
    assert house.text_of("moving") != before
    info = house.do("moving", "rollback")
    assert (info["shares"], info["earlier_shares"]) == ({first: 1.0}, [])
    assert house.text_of("moving") == before
    assert error_of(house.admin.post(f"{ALIGNERS}/moving/rollback"))[:2] == (409, "conflict")


def test_several_versions_share_requests_by_weight(house):
    first = house.add("canary", house.stage("one"))["version"]
    second = house.add("canary", house.stage("two"))["version"]
    info = house.do("canary", "promote", {"versions": {first: 3.0, second: 1.0}})
    assert info["shares"] == {first: 0.75, second: 0.25}
    assert set(states(info).values()) == {"resident"}
    texts = {house.text_of("canary", max_tokens=4, user=f"user {number}") for number in range(20)}
    assert len(texts) == 2


@contextlib.contextmanager
def held_promotion(house: AdminHouse, name: str, body: dict) -> Iterator[Future[httpx.Response]]:
    """Someone waits for a promotion whose load the engine is kept from, until the block is left."""
    with ThreadPoolExecutor(1) as pool:
        house.house.is_holding = True
        try:
            answer = pool.submit(house.admin.post, f"{ALIGNERS}/{name}/promote", json=body, params=WAIT)
            house.house.wait_held()
            yield answer
        finally:
            house.house.release_loads()


def test_a_promotion_that_waits_is_told_of_and_can_be_taken_back(house):
    first = house.add("waiting", house.stage("one"), load=True)["version"]
    second = house.add("waiting", house.stage("two"))["version"]
    with held_promotion(house, "waiting", {"version": second}) as waits:
        info = house.get("waiting")
        assert (info["shares"], info["next_shares"]) == ({first: 1.0}, {second: 1.0})
        assert states(info)[second] == "loading"
        info = house.do("waiting", "rollback")
        assert (info["shares"], info["next_shares"]) == ({first: 1.0}, None)
        assert error_of(waits.result())[:2] == (409, "conflict")


def test_who_waits_for_a_promotion_is_told_that_another_one_came(house):
    versions = [house.add("overtaken", house.stage(model))["version"] for model in ("one", "two", "three")]
    house.do("overtaken", "load")
    with held_promotion(house, "overtaken", {"version": versions[1]}) as waits:
        answer = house.admin.post(f"{ALIGNERS}/overtaken/promote", json={"version": versions[2]})
        assert (answer.status_code, answer.json()["next_shares"]) == (202, {versions[2]: 1.0})
        assert error_of(waits.result())[:2] == (409, "conflict")
    wait_until(lambda: house.get("overtaken")["shares"] == {versions[2]: 1.0})


def break_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def test_a_promotion_that_cannot_be_changes_nothing(house):
    first = house.add("stable", house.stage("one"), load=True)["version"]
    path = house.stage("two")
    second = house.add("stable", path)["version"]
    break_weights(house.root / path)
    answer = house.admin.post(f"{ALIGNERS}/stable/promote", json={"version": second}, params=WAIT)
    assert error_of(answer)[:2] == (409, "conflict")
    info = house.get("stable")
    assert (info["shares"], info["next_shares"]) == ({first: 1.0}, None)
    assert states(info) == {first: "resident", second: "failed"}
    house.text_of("stable")


def test_a_rollback_that_finds_no_room_beside_what_is_pinned_changes_nothing(house, tmp_path):
    house.do("polite", "load")
    size = house.house.version("polite", "v1").num_bytes
    with admin_house(tmp_path, memory_bytes=2 * size) as small:
        first = small.add("full", small.stage("one"), load=True)["version"]
        second = small.add("full", small.stage("two"))["version"]
        small.do("full", "promote", {"version": second})
        for name in ("full", "polite"):
            small.do(name, "load", {"pin": True})
        text = small.text_of("full")
        for wait in ({}, WAIT):
            answer = small.admin.post(f"{ALIGNERS}/full/rollback", params=wait)
            assert error_of(answer)[:2] == (409, "conflict")
            assert "pinned" in answer.json()["error"]["message"]
            info = small.get("full")
            assert (info["shares"], info["next_shares"]) == ({second: 1.0}, None)
            assert info["earlier_shares"] == [{first: 1.0}]
            assert states(info) == {first: "evicted", second: "resident"}
        assert small.text_of("full") == text
        small.admin.patch(f"{ALIGNERS}/polite", json={"pinned": False})
        assert small.do("full", "rollback")["shares"] == {first: 1.0}


def test_a_load_that_fails_says_why(house):
    path = house.stage()
    name = house.add("broken", path)["name"]
    break_weights(house.root / path)
    answer = house.admin.post(f"{ALIGNERS}/{name}/load", params=WAIT)
    assert error_of(answer)[:2] == (409, "conflict")
    [version] = house.admin.get(f"{ALIGNERS}/{name}").json()["versions"]
    assert version["state"] == "failed"
    assert version["reason"]
    assert version["reason"] in answer.json()["error"]["message"]


# What holds where a request says nothing.


def test_defaults_are_changed_for_requests_to_come(house):
    house.add("tuned", house.stage(), load=True)
    plain = house.text_of("big")
    patched = house.admin.patch(f"{ALIGNERS}/tuned", json={"strength": 0.0, "kl_threshold": 0.5}).json()
    assert patched["defaults"] == {"strength": 0.0, "kl_threshold": 0.5}
    assert house.text_of("tuned", alignment={"proposal_top_p": 1}) == plain
    patched = house.admin.patch(
        f"{ALIGNERS}/tuned", json={"kl_threshold": None, "resampling": "nucleus", "candidates": 8}
    ).json()
    assert patched["defaults"] == {
        "strength": 0.0,
        "kl_threshold": None,
        "resampling": "nucleus",
        "candidates": 8,
    }


def test_a_pinned_aligner_is_loaded_and_stays(house):
    house.add("pinned", house.stage())
    house.admin.patch(f"{ALIGNERS}/pinned", json={"pinned": True})
    wait_until(lambda: set(states(house.get("pinned")).values()) == {"resident"})
    [version] = house.get("pinned")["versions"]
    assert version["pinned"]
    [version] = house.admin.patch(f"{ALIGNERS}/pinned", json={"pinned": False}).json()["versions"]
    assert not version["pinned"]


# vLLM's paths.


def test_adapters_come_and_go_by_vllms_paths(house):
    def ask(verb, **fields):
        return house.admin.post(f"/v1/{verb}_lora_adapter", json={"lora_name": "lora", **fields})

    answer = ask("load", lora_path=house.stage("two"))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'lora' added successfully.")
    terse = house.text_of("lora")
    # The last one answers; paths may be absolute, as long as they lead below the root.
    polite = str(house.root / house.stage("one"))
    assert ask("load", lora_path=polite, load_inplace=True).status_code == 200
    assert house.text_of("lora") == house.text_of("polite") != terse
    assert error_of(ask("load", lora_path=str(house.root.parent)))[0] == 400
    answer = ask("unload", lora_int_id=7)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'lora' removed successfully.")
    assert house.admin.post(CHAT, json=chat(model="lora")).status_code == 404
    assert error_of(ask("unload"))[0] == 404


def test_vllms_paths_are_not_there_unless_they_are_wanted():
    with live(ScriptedEngine()) as server:
        for verb in ("load", "unload"):
            answer = httpx.post(f"{server.url}/v1/{verb}_lora_adapter", json={"lora_name": "polite"})
            assert error_of(answer)[:2] == (404, "unknown_url")


# What it is described as.


def test_the_schema_describes_the_admin_api(house):
    schema = house.server.app.openapi()
    for path, methods in {
        "/v1/aligners": {"get", "post"},
        "/v1/aligners/{name}": {"get", "patch", "delete"},
        "/v1/aligners/{name}/load": {"post"},
        "/v1/aligners/{name}/unload": {"post"},
        "/v1/aligners/{name}/promote": {"post"},
        "/v1/aligners/{name}/rollback": {"post"},
        "/v1/load_lora_adapter": {"post"},
        "/v1/unload_lora_adapter": {"post"},
    }.items():
        assert set(schema["paths"][path]) == methods
        for method in methods:
            described = schema["paths"][path][method]
            assert {"401", "403", "404", "409", "503"} <= set(described["responses"])
            assert ("requestBody" in described) == (method in ("post", "patch"))
    promotion = schema["paths"]["/v1/aligners/{name}/promote"]["post"]
    assert [each["name"] for each in promotion["parameters"]] == ["name", "wait"]
    body = promotion["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"version", "versions"}
