"""`ram aligner list|compare|load|unload|promote|rollback` against a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from server.tenants.keys import Seal
from tests.http.admin_house import ADMIN_KEY, ALIGNERS, AdminHouse, admin_house, states
from tests.http.standin import ScriptedEngine, live, wait_until
from tests.http.test_cli import assert_one_line, ram


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminHouse]:
    with admin_house(tmp_path_factory.mktemp("house")) as opened:
        yield opened


@pytest.fixture
def run(house, monkeypatch):
    """The command with the server's address, and the key in the environment."""
    monkeypatch.setenv("RAM_ADMIN_KEY", ADMIN_KEY)
    return lambda *words: ram("aligner", *words, "--url", house.server.url)


def told(result: tuple[int, str, str]) -> dict:
    code, output, errors = result
    assert (code, errors) == (0, "")
    return json.loads(output)


def row_of(output: str, word: str) -> list[str]:
    return next(line for line in output.splitlines() if word in line).split()


def test_an_aligner_goes_through_its_life(house, run):
    path, other = house.stage("one"), house.stage("two")
    first = told(run("load", "lively", "--path", path, "--pin", "--json"))
    assert states(first) == {first["version"]: "resident"}
    assert first["versions"][0]["pinned"]
    second = house.add("lively", other)["version"]
    both = {first["version"]: 0.75, second: 0.25}
    words = [f"{first['version']}=3", f"{second}=1"]
    assert told(run("promote", "lively", *words, "--json"))["shares"] == both
    assert told(run("promote", "lively", second, "--json"))["shares"] == {second: 1.0}
    assert told(run("rollback", "lively", "--json"))["shares"] == both
    assert told(run("unload", "lively", "--version", second, "--json"))["versions"]
    assert set(states(told(run("unload", "lively", "--json"))).values()) == {"evicted"}
    loaded = told(run("load", "lively", "--version", second, "--json"))
    assert states(loaded) == {first["version"]: "evicted", second: "resident"}
    assert told(run("list", "lively", "--json")) == house.get("lively")
    assert told(run("list", "--json")) == house.admin.get(ALIGNERS).json()


def test_people_get_a_table(house, run):
    code, output, errors = run("load", "polite", "--pin")
    assert (code, errors) == (0, "")
    row = row_of(output, "polite")
    assert row[:4] == ["polite", "v1", "100%", "resident"]
    assert row[5:7] == ["cpu", "0"]
    assert row[-1] == "pinned"
    code, output, _ = run("list")
    assert (code, row_of(output, "polite")[:4]) == (0, row[:4])


def test_versions_are_compared_by_what_was_measured_of_them(house, run):
    first = house.add("rivals", house.stage("one"), load=True)["version"]
    second = house.add("rivals", house.stage("two"))["version"]
    house.text_of("rivals", alignment={"kl_threshold": -1.0})
    house.text_of("rivals", alignment={"strength": 2.0})
    measured = told(run("compare", "rivals", "--json"))
    assert measured == {
        version["version"]: version["measured"] for version in house.get("rivals")["versions"]
    }
    assert measured[first].items() >= {"requests": 2, "errors": 0, "tokens": 16, "fallbacks": 8}.items()
    assert measured[first]["mean_kl_p_q"] > 0
    assert 0 < measured[first]["mean_ess"] <= 1
    assert measured[second] == dict.fromkeys(measured[first], 0) | dict.fromkeys(
        ("mean_kl_p_q", "mean_kl_pi_p", "mean_ess")
    )
    _, output, _ = run("compare", "rivals")
    assert row_of(output, first)[1:5] == ["100%", "2", "0", "16"]
    assert row_of(output, first)[-1] == "50.0%"
    assert row_of(output, second)[-4:] == ["–"] * 4


def test_a_failed_version_says_why(house, run):
    path = house.stage()
    (house.root / path / "model.safetensors").write_bytes(b"broken")
    version = house.add("sick", path)["version"]
    assert_one_line(run("load", "sick"), f"`sick@{version}`")
    code, output, _ = run("list", "sick")
    assert (code, row_of(output, "sick")[3]) == (0, "failed")
    assert f"sick@{version}: " in output


def test_what_is_not_done_in_time_is_begun_and_has_a_code_of_its_own(house, run):
    code, output, errors = run("load", "unhurried", "--path", house.stage(), "--wait", "0")
    assert code == 3
    assert row_of(output, "unhurried")[3].rstrip(",") in ("verifying", "loading")
    assert "Not done yet" in errors
    wait_until(lambda: set(states(house.get("unhurried")).values()) == {"resident"})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["load", "nobody"], "There is no aligner `nobody`"),
        (["unload", "nobody"], "There is no aligner `nobody`"),
        (["compare", "nobody"], "There is no aligner `nobody`"),
        (["list", "nobody"], "There is no aligner `nobody`"),
        (["load", "polite", "--version", "v9"], "has no version `v9`"),
        (["load", "new", "--path", "../up"], "no such directory"),
        (["load", "new", "--path", "x", "--version", "v1"], "`--version`"),
        (["load", "new", "--path", "x", "--hub-id", "a/b"], "either `path` or `hub_id`"),
        (["promote", "polite", "v1=much"], "`v1=much`"),
        (["promote", "polite", "v1", "v1"], "given twice"),
        (["promote", "polite", "v1=0"], "must be positive"),
        (["rollback", "polite"], "no promotion that could be taken back"),
        (["load", "../models"], "`name`"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, words, reason):
    assert_one_line(run(*words), reason)


def test_without_the_key_it_says_what_to_give(house, monkeypatch):
    monkeypatch.delenv("RAM_ADMIN_KEY", raising=False)
    url = ["--url", house.server.url]
    assert_one_line(ram("aligner", "list", *url), "Give the admin's key by --key or RAM_ADMIN_KEY")
    assert_one_line(ram("aligner", "list", *url, "--key", "wrong"), "Incorrect API key")
    assert ram("aligner", "list", *url, "--key", ADMIN_KEY)[0] == 0
    assert_one_line(ram("aligner", "list", *url, "--key", str(Seal.of(b"x"))), "give the key itself")


def test_a_server_without_keys_needs_none(monkeypatch):
    monkeypatch.delenv("RAM_ADMIN_KEY", raising=False)
    with live(ScriptedEngine()) as server:
        code, output, _ = ram("aligner", "list", "--url", f"{server.url}/v1")
        assert (code, row_of(output, "polite")[3]) == (0, "resident")


def test_where_no_server_is_it_says_so(monkeypatch):
    monkeypatch.delenv("RAM_ADMIN_KEY", raising=False)
    assert_one_line(ram("aligner", "list", "--url", "http://127.0.0.1:9"), "Is `ram serve` running there?")
    assert_one_line(ram("aligner", "list", "--url", "127.0.0.1:9"), "127.0.0.1:9")


def test_words_that_are_missing_are_a_matter_of_usage():
    assert ram("aligner", "promote", "polite")[0] == 2
    assert ram("aligner", "load")[0] == 2
    assert ram("aligner", "load", "polite", "--wait", "-1")[0] == 2
