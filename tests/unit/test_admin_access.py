"""Who may be the admin, and where: decided on paths, ports, addresses and headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from server.app import create_app
from server.settings import Settings
from server.tenants.access import Doors, Need, is_from_here, need_of


def paths(*, is_admins: bool) -> list[str]:
    """The paths that the server describes, for admins or for others."""
    described = create_app(Settings(vllm_lora_api=True)).openapi()["paths"]
    return [
        path.replace("}", ":path}")
        for path, methods in described.items()
        if all(("admin" in method["tags"]) is is_admins for method in methods.values())
    ]


ADMIN_PATHS, OTHER_PATHS = paths(is_admins=True), paths(is_admins=False)
ADMIN_REGEXES = [compile_path(path)[0] for path in ADMIN_PATHS]


def test_there_are_admins_paths_and_others():
    assert set(ADMIN_PATHS) >= {"/v1/aligners", "/v1/aligners/{name:path}/load", "/v1/load_lora_adapter"}
    assert set(OTHER_PATHS) >= {"/v1/chat/completions", "/health", "/metrics"}
    assert all(need_of(path) is Need.ADMIN for path in ADMIN_PATHS)
    assert not any(need_of(path) is Need.ADMIN for path in OTHER_PATHS)


SEEDS = ["/v1/aligners/a/promote", *ADMIN_PATHS, *OTHER_PATHS]
TRICKS = ["", "/", "//", "\n", "\r", "\0", ";", "?", "#", ".", "..", "/..", "%2f", "\\", " ", "a", "A", "ſ"]


@st.composite
def crooked_paths(draw):
    """A path of the server with something put into it, taken out, or written in capitals."""
    path = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(path)))
        cut = draw(st.integers(0, 2))
        path = path[:at] + draw(st.sampled_from(TRICKS)) + path[at + cut :]
    return path.upper() if draw(st.integers(0, 9)) == 0 else path


@given(crooked_paths())
def test_whatever_the_router_takes_for_an_admins_path_needs_the_admin(path):
    leads_there = any(regex.match(path) for regex in ADMIN_REGEXES)
    assert not leads_there or need_of(path) is Need.ADMIN


@given(crooked_paths())
def test_whatever_the_router_takes_for_metrics_is_as_closed(path):
    regex, _, _ = compile_path("/metrics")
    assert not regex.match(path) or need_of(path) is Need.METRICS


@pytest.mark.parametrize(
    ("path", "need"),
    [
        ("/v1/aligners", Need.ADMIN),
        ("/v1/aligners/", Need.ADMIN),
        ("/v1/aligners\n", Need.ADMIN),
        ("/v1/aligners/org/polite/load", Need.ADMIN),
        ("/v1/load_lora_adapter", Need.ADMIN),
        ("/v1/unload_lora_adapter\n", Need.ADMIN),
        ("/metrics\n", Need.METRICS),
        ("/metrics/", Need.METRICS),
        ("//v1/aligners", Need.TENANT),
        ("/V1/Aligners", Need.TENANT),
        ("/v1/models/../aligners", Need.TENANT),
    ],
)
def test_what_begins_like_a_closed_path_is_closed(path, need):
    assert need_of(path) is need


PUBLIC, ADMIN = 8000, 9000
ON_BOTH = ["/health", "/health/live", "/metrics"]
ADMINS = ["/v1/aligners", "/v1/aligners/a/load", "/v1/aligners\n", "/v1/load_lora_adapter"]
OTHERS = ["/v1/models", "/v1/chat/completions", "/openapi.json", "/docs", "/", "//v1/aligners"]


@pytest.mark.parametrize("path", [*ON_BOTH, *ADMINS, *OTHERS])
def test_one_port_leads_everywhere(path):
    assert Doors(None, has_lora_api=True).leads_to(path, PUBLIC)


@pytest.mark.parametrize("path", [*ON_BOTH, *ADMINS, *OTHERS])
def test_the_admins_port_has_what_the_public_one_has_not(path):
    doors = Doors(ADMIN, has_lora_api=True)
    assert doors.leads_to(path, PUBLIC) is (path not in ADMINS)
    assert doors.leads_to(path, ADMIN) is (path not in OTHERS)


@pytest.mark.parametrize("port", [0, PUBLIC, ADMIN, None])
def test_before_its_port_is_known_nobody_comes_to_the_admin(port):
    assert Doors(0).leads_to("/v1/aligners", port) is (port == 0)
    assert Doors(ADMIN).leads_to("/v1/aligners", port) is (port == ADMIN)


def test_paths_of_vllm_are_not_there_unless_they_are_wanted():
    assert not Doors(None).leads_to("/v1/load_lora_adapter", PUBLIC)
    assert not Doors(ADMIN).leads_to("/v1/unload_lora_adapter", ADMIN)


@pytest.mark.parametrize(
    ("client", "headers", "is_here"),
    [
        ("127.0.0.1", {"host": "localhost:8000"}, True),
        ("127.0.0.1", {"host": "LOCALHOST"}, True),
        ("::1", {"host": "[::1]:8000"}, True),
        ("127.0.0.1", {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, True),
        ("127.0.0.1", {"host": "127.0.0.1:8000", "origin": "http://evil.example"}, False),
        ("127.0.0.1", {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:3000"}, False),
        ("127.0.0.1", {"host": "127.0.0.1:8000", "origin": "null"}, False),
        ("127.0.0.1", {"host": "evil.example:8000", "origin": "http://evil.example:8000"}, False),
        ("127.0.0.1", {"host": "localhost.evil.example"}, False),
        ("127.0.0.1", {"host": "evil.example@localhost"}, False),
        ("127.0.0.1", {"host": "[::1"}, False),
        ("127.0.0.1", {}, False),
        ("203.0.113.9", {"host": "localhost:8000"}, False),
        (None, {"host": "localhost:8000"}, False),
    ],
)
def test_without_keys_the_admin_is_a_program_of_this_machine(client, headers, is_here):
    """And no web page that a browser of this machine shows, whatever name led to it."""
    assert is_from_here(client, headers) is is_here
