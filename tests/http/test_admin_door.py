"""The admin's paths through live servers: which key opens them, on which port, and that nothing else does."""

from __future__ import annotations

import socket

import httpx
import pytest

from server.tenants.access import Need
from tests.http.standin import PATIENCE_S, ScriptedEngine, chat, live
from tests.http.test_cli import assert_one_line, ram
from tests.http.test_tenants_from_start_to_end import serving

ADMIN_KEY, TENANT_KEY = "4dmin", "s3cret"
ALIGNERS = "/v1/aligners"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def status_of(url: str, target: str, *lines: str) -> tuple[int, str]:
    """Status and body of a GET whose target is sent as it stands."""
    host, port = url.removeprefix("http://").split(":")
    head = "".join(f"{line}\r\n" for line in (f"GET {target} HTTP/1.1", *lines, "Connection: close"))
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(f"{head}\r\n".encode())
        answer = connection.makefile("rb").read().decode()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


@pytest.fixture(scope="module")
def locked():
    """A server with a tenant and an admin."""
    with live(
        ScriptedEngine(), api_key=TENANT_KEY, admin_key=ADMIN_KEY, vllm_lora_api=True, metrics_access="admin"
    ) as server:
        yield server


TRICKS = [
    "/v1/aligners",
    "/v1/aligners?wait=1",
    "/v1/aligners/",
    "/v1/aligners%0a",
    "/v1/aligners%0A",
    "/v1%2faligners",
    "/v1%2Faligners%2f",
    "/%76%31/aligners",
    "/v1/aligner%73",
    "/v1/aligners;x=1",
    "/v1/aligners%00",
    "/v1/aligners%23",
    "/v1/aligners%3f",
    "//v1/aligners",
    "/v1//aligners",
    "/./v1/aligners",
    "/v1/models/../aligners",
    "/v1/models/%2e%2e/aligners",
    "/health/../v1/aligners",
    "/health/%2e%2e/v1/aligners",
    "/V1/ALIGNERS",
    "/v1/aligners/polite/promote",
    "/v1/aligners/%70olite",
    "/v1/load_lora_adapter%0a",
    "/v1/unload_lora_adapter",
    "http://x/v1/aligners",
    "http://x//v1/aligners",
]


@pytest.mark.parametrize("target", TRICKS)
def test_no_way_of_writing_a_path_leads_to_the_admin_without_its_key(locked, target):
    host = "Host: localhost"
    nobody, _ = status_of(locked.url, target, host)
    assert nobody == 401
    stranger, _ = status_of(locked.url, target, host, "Authorization: Bearer wr0ng")
    assert stranger == 401
    tenant, body = status_of(locked.url, target, host, f"Authorization: Bearer {TENANT_KEY}")
    assert (tenant, "insufficient_permissions" in body) == (403, True) or tenant == 404


@pytest.mark.parametrize("path", [ALIGNERS, f"{ALIGNERS}/polite", "/v1/load_lora_adapter", "/metrics%0a"])
def test_a_tenant_is_told_that_it_is_not_the_admin(locked, path):
    answer = httpx.get(f"{locked.url}{path}", headers=bearer(TENANT_KEY))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")


def test_behind_the_door_is_a_second_lock(locked, monkeypatch):
    """If a path were taken for another one's at the door, the route itself would not open."""
    monkeypatch.setattr("server.middleware.need_of", lambda path: Need.TENANT)
    for method, path in (
        ("GET", ALIGNERS),
        ("DELETE", f"{ALIGNERS}/polite"),
        ("POST", f"{ALIGNERS}/polite/load"),
        ("POST", "/v1/load_lora_adapter"),
    ):
        answer = httpx.request(method, f"{locked.url}{path}", headers=bearer(TENANT_KEY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")


def test_two_keys_are_none(locked):
    lines = ["Host: localhost", f"Authorization: Bearer {ADMIN_KEY}", f"Authorization: Bearer {TENANT_KEY}"]
    assert status_of(locked.url, ALIGNERS, *lines)[0] == 401


def test_an_admins_key_alone_closes_the_admins_paths_and_no_others():
    with live(ScriptedEngine(), admin_key=ADMIN_KEY) as server:
        assert httpx.get(f"{server.url}{ALIGNERS}").status_code == 401
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_a_tenants_file_without_an_admins_key_lets_nobody_be_the_admin():
    with live(ScriptedEngine(), api_key=TENANT_KEY) as server:
        for headers, status in (({}, 401), (bearer("none"), 401), (bearer(TENANT_KEY), 403)):
            assert httpx.get(f"{server.url}{ALIGNERS}", headers=headers).status_code == status


# Without keys.


@pytest.fixture(scope="module")
def keyless():
    with live(ScriptedEngine()) as server:
        yield server


@pytest.mark.parametrize(
    "lines",
    [
        ["Host: localhost", "X-Forwarded-For: 203.0.113.9"],
        ["Host: localhost", "Origin: http://evil.example"],
        ["Host: evil.example"],
        ["Host: evil.example", "Origin: http://evil.example"],
    ],
)
def test_without_keys_others_and_web_pages_are_not_the_admin(keyless, lines):
    status, body = status_of(keyless.url, ALIGNERS, *lines)
    assert (status, "RAM_ADMIN_KEY" in body, "insufficient_permissions" in body) == (403, True, True)
    assert status_of(keyless.url, "/v1/models", *lines)[0] == 200


# A port of its own.


@pytest.fixture(scope="module")
def two_ports():
    with live(ScriptedEngine(), api_key=TENANT_KEY, admin_key=ADMIN_KEY, admin_port=0) as server:
        yield server


@pytest.mark.parametrize("key", ["", TENANT_KEY, ADMIN_KEY])
def test_the_public_port_has_nothing_for_the_admin(two_ports, key):
    host = "Host: " + two_ports.admin_url.removeprefix("http://")
    for path in (ALIGNERS, f"{ALIGNERS}/polite/promote", "/v1/aligners%0a", "/v1/load_lora_adapter"):
        lines = [host] + ([f"Authorization: Bearer {key}"] if key else [])
        status, body = status_of(two_ports.url, path, *lines)
        assert (status, "unknown_url" in body) == (404, True)


@pytest.mark.parametrize("key", ["", TENANT_KEY, ADMIN_KEY])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/openapi.json", "/docs", "/"])
def test_the_admins_port_has_nothing_for_others(two_ports, key, path):
    headers = bearer(key) if key else {}
    answer = httpx.post(f"{two_ports.admin_url}{path}", json=chat(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert not two_ports.engine.requests


def test_health_and_metrics_are_on_both_ports(two_ports):
    for url in (two_ports.url, two_ports.admin_url):
        for path in ("/health", "/health/live", "/metrics"):
            assert httpx.get(f"{url}{path}").status_code == 200


def test_the_admins_port_asks_for_the_key_all_the_same(two_ports):
    for headers, status in (({}, 401), (bearer("none"), 401), (bearer(TENANT_KEY), 403)):
        assert httpx.get(f"{two_ports.admin_url}{ALIGNERS}", headers=headers).status_code == status


# The command.


def test_ram_serve_opens_the_admins_port_and_says_where(tmp_path):
    with serving(tmp_path, admin_port=0) as (_, port, said):
        line = next(line for line in said.splitlines() if line.startswith("  admin "))
        assert "everybody on this machine, without a key, at http://127.0.0.1:" in line
        url = line.split()[-1]
        assert url != f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 404
        assert httpx.get(f"http://127.0.0.1:{port}{ALIGNERS}").status_code == 404


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({"admin_key": ADMIN_KEY}, "the admin, by its key"),
        ({"api_key": TENANT_KEY}, "nobody, as RAM_ADMIN_KEY is not set"),
    ],
)
def test_the_server_says_who_is_admin(tmp_path, settings, who):
    with serving(tmp_path, **settings) as (_, _, said):
        assert f"  admin     {who}\n" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--port 0 --admin-port 0 --admin-host 0.0.0.0", "RAM_ADMIN_KEY"),
        ("--port 0 --admin-port {taken}", "choose another with --admin-port"),
        (
            "--host 127.0.0.2 --port {taken} --admin-host 127.0.0.3 --admin-port {taken}",
            "`admin_port` and `port` are both {taken}",
        ),
    ],
)
def test_an_admins_port_that_cannot_be_is_one_line(words, reason):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        refused = ram("serve", "/tmp", *words.format(taken=taken).split())
        assert_one_line(refused, reason.format(taken=taken))
