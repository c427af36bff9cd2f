"""Who may come, where, and with which key. Decided on the path as the router sees it, decoded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from ipaddress import ip_address


class Need(Enum):
    """What a caller must bring."""

    NOTHING = auto()
    TENANT = auto()
    METRICS = auto()
    ADMIN = auto()


_OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version"})
_LORA_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ADMIN_PATHS = ("/v1/aligners", *_LORA_PATHS)
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::\d+)?", re.ASCII)


def need_of(path: str) -> Need:
    """What a decoded path needs.

    No path is open because it begins, or looks, like an open one. But what begins like a closed one is closed
    as well: the router takes a path with a line break at its end for the path itself.
    """
    if path in _OPEN_PATHS:
        return Need.NOTHING
    if path.startswith("/metrics"):
        return Need.METRICS
    return Need.ADMIN if path.startswith(_ADMIN_PATHS) else Need.TENANT


@dataclass(slots=True)
class Doors:
    """What is there on which port.

    With an `admin_port`, what needs the admin is on that port alone, and beside it only health and metrics
    are. It is the port's number once it is bound; 0 before, when neither port leads to the admin.
    """

    admin_port: int | None = None
    has_lora_api: bool = False

    def leads_to(self, path: str, port: int | None) -> bool:
        """Whether there may be anything at a decoded path, for who came by a port."""
        if path.startswith(_LORA_PATHS) and not self.has_lora_api:
            return False
        if self.admin_port is None:
            return True
        need = need_of(path)
        if port == self.admin_port:
            return need is not Need.TENANT
        return need is not Need.ADMIN


def bearer_key(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key of `Authorization: Bearer KEY`; None without one, or with two headers, which may differ."""
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, and nobody else's."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def is_from_here(client: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a person or program of this machine asks, and no web page that somebody looks at there.

    A page's scripts can send requests to loopback. Browsers say then whose page it is (`Origin`), or, if the
    page's own name leads to loopback, which name that is (`Host`).
    """
    if client is None or not is_loopback(client):
        return False
    host = headers.get("host", "").lower()
    match = _HOST.fullmatch(host)
    name = match[1] or match[2] if match else ""
    if name != "localhost" and not is_loopback(name):
        return False
    origin = headers.get("origin")
    return origin is None or origin.lower() == f"http://{host}"
