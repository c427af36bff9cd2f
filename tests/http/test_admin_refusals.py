"""What the admin API refuses: paths, names, bodies, and what cannot be as things are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.admin_house import ALIGNERS, WAIT, AdminHouse, admin_house, error_of, states
from tests.http.standin import ScriptedEngine, live


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminHouse]:
    with admin_house(tmp_path_factory.mktemp("house"), vllm_lora_api=True) as opened:
        yield opened


# What cannot be.


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../aligners",
        "polite/../../secret",
        "./../secret",
        "/etc",
        "/",
        ".",
        "",
        "polite/",
        "polite//v1",
        "polite\\v1",
        "nowhere",
        "%2e%2e/secret",
        "polite\0",
        "x" * 5000,
        "link-out",
        "link-out/polite",
        "file",
        ".staging/linked",
        ".staging/pickled",
        ".staging/coded",
        ".staging/empty",
    ],
)
def test_a_path_that_leads_elsewhere_or_to_no_aligner_is_refused(house, tmp_path, path):
    if not (house.root / "file").exists():
        (house.root / "file").write_text("x")
        (house.root / "link-out").symlink_to(house.models.proposal.parent)
        for name, extra in (("linked", ""), ("pickled", "old.bin"), ("coded", "modeling.py")):
            shutil.copytree(house.models.small["one"], house.root / ".staging" / name)
            (house.root / ".staging" / name / (extra or "x")).write_text("x")
        (house.root / ".staging" / "linked" / "x").unlink()
        (house.root / ".staging" / "linked" / "more.json").symlink_to(house.models.proposal / "config.json")
        (house.root / ".staging" / "empty").mkdir()
    answer = house.admin.post(ALIGNERS, json={"name": "refused", "path": path})
    assert error_of(answer) == (400, "invalid_value", "path")
    assert house.admin.get(f"{ALIGNERS}/refused").status_code == 404
    lora = house.admin.post("/v1/load_lora_adapter", json={"lora_name": "refused", "lora_path": path or "."})
    assert error_of(lora)[0] == 400
    assert house.admin.get(f"{ALIGNERS}/refused").status_code == 404


@pytest.mark.parametrize("name", ["", "..", "a b", "a/b/c", "identity", "proposal", "big", "-x", "a\nb", "é"])
def test_a_name_that_no_aligner_can_have_is_refused(house, name):
    answer = house.admin.post(ALIGNERS, json={"name": name, "path": "polite/v1"})
    assert error_of(answer)[:2] == (400, "invalid_value")


def test_another_version_of_the_same_name_from_elsewhere_is_a_conflict(house):
    path = house.stage()
    house.add("twice", path)
    house.add("twice", path)
    answer = house.admin.post(ALIGNERS, json={"name": "twice", "path": house.stage()})
    assert error_of(answer)[:2] == (409, "conflict")


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/nobody", None, (404, "model_not_found", None)),
        ("GET", "/", None, (404, "model_not_found", None)),
        ("GET", "/polite/load", None, (404, "model_not_found", None)),
        ("PATCH", "/nobody", {"strength": 1.0}, (404, "model_not_found", None)),
        ("DELETE", "/nobody", None, (404, "model_not_found", None)),
        ("POST", "/nobody/load", None, (404, "model_not_found", None)),
        ("POST", "/nobody/unload", None, (404, "model_not_found", None)),
        ("POST", "/nobody/promote", {"version": "v1"}, (404, "model_not_found", None)),
        ("POST", "/nobody/rollback", None, (404, "model_not_found", None)),
        ("POST", "/polite/load", {"version": "v9"}, (404, "model_not_found", None)),
        ("POST", "/polite/unload", {"version": "v9"}, (404, "model_not_found", None)),
        ("POST", "/polite/promote", {"version": "v9"}, (404, "model_not_found", None)),
        ("POST", "/polite/promote", {"versions": {}}, (400, "invalid_value", "versions")),
        ("POST", "/polite/promote", {"versions": {"v1": 0}}, (400, "invalid_value", "versions")),
        ("POST", "/polite/promote", {"versions": {"v1": "all"}}, (400, "invalid_type", "versions.v1")),
        ("POST", "/polite/promote", {}, (400, "invalid_value", None)),
        ("POST", "/polite/promote", {"version": "v1", "versions": {"v1": 1}}, (400, "invalid_value", None)),
        ("POST", "/polite/promote", {"version": 1}, (400, "invalid_type", "version")),
        ("POST", "/polite/load", {"pinned": True}, (400, "unknown_parameter", "pinned")),
        ("POST", "/polite/rollback", {"to": "v1"}, (400, "unknown_parameter", "to")),
        ("POST", "/polite/load?wait=-1", None, (400, "invalid_value", "wait")),
        ("POST", "/polite/load?wait=nan", None, (400, "invalid_value", "wait")),
        ("POST", "/polite/load?wait=soon", None, (400, "invalid_value", "wait")),
        ("POST", "/polite/load?wait=1e9", None, (400, "invalid_value", "wait")),
        ("POST", "/polite", {}, (405, "method_not_allowed", None)),
        ("PUT", "/polite", {}, (405, "method_not_allowed", None)),
        ("POST", "", {"name": "x"}, (400, "invalid_value", None)),
        ("POST", "", {"name": "x", "path": "y", "hub_id": "a/b"}, (400, "invalid_value", None)),
        ("POST", "", {"path": "polite/v1"}, (400, "missing_required_parameter", "name")),
        ("POST", "", {"name": "x", "hub_id": "../x"}, (400, "invalid_value", "hub_id")),
        ("POST", "", {"name": "x", "hub_id": "/etc"}, (400, "invalid_value", "hub_id")),
        ("PATCH", "/polite", {"strength": 1e9}, (400, "invalid_value", "strength")),
        ("PATCH", "/polite", {"kl_threshold": -1.0}, (400, "invalid_value", "kl_threshold")),
        ("PATCH", "/polite", {"candidates": 0}, (400, "invalid_value", "candidates")),
        ("PATCH", "/polite", {"resampling": "lottery"}, (400, "invalid_value", "resampling")),
        ("PATCH", "/polite", {"name": "rude"}, (400, "unknown_parameter", "name")),
    ],
)
def test_what_cannot_be_is_said_in_openais_shape(house, method, path, body, expected):
    before = house.admin.get(ALIGNERS).json()
    assert error_of(house.admin.request(method, f"{ALIGNERS}{path}", json=body)) == expected
    assert house.admin.get(ALIGNERS).json() == before


def test_a_hub_id_never_means_a_local_directory(house, tmp_path, monkeypatch):
    """Even if one lies below the working directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(house.models.small["one"], tmp_path / "org" / "local")
    monkeypatch.chdir(tmp_path)
    answer = house.admin.post(ALIGNERS, json={"name": "local", "hub_id": "org/local"})
    assert error_of(answer) == (400, "invalid_value", "hub_id")


def test_an_aligner_comes_from_the_hubs_cache(house, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--warm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in house.models.small["two"].iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    body = {"name": "org/warm", "hub_id": "org/warm", "load": True}
    answer = house.admin.post(ALIGNERS, json=body, params=WAIT)
    assert (answer.status_code, answer.json()["version"]) == (201, commit[:12])
    assert house.text_of("org/warm") != house.text_of("polite")
    assert states(house.get("org/warm")) == {commit[:12]: "resident"}
    assert states(house.do("org/warm", "unload")) == {commit[:12]: "evicted"}


def test_while_the_model_loads_the_admin_is_asked_to_come_back():
    with live(None) as server:
        answer = httpx.get(f"{server.url}{ALIGNERS}")
        assert error_of(answer)[:2] == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) > 0


def test_without_a_directory_of_aligners_nothing_is_added_from_one():
    with live(ScriptedEngine()) as server:
        answer = httpx.post(f"{server.url}{ALIGNERS}", json={"name": "x", "path": "x"})
        assert error_of(answer) == (400, "invalid_value", "path")
        assert "--aligners-dir" in answer.json()["error"]["message"]
