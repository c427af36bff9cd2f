"""Which paths need which key. Decided on the path as the router sees it; what is not named needs a key."""

from __future__ import annotations

from enum import Enum, auto
from ipaddress import ip_address


class Need(Enum):
    """What a caller must bring."""

    NOTHING = auto()
    TENANT = auto()
    METRICS = auto()


_OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version"})


def need_of(path: str) -> Need:
    """What a decoded path needs. Exact: no path is open because it begins, or looks, like an open one."""
    if path in _OPEN_PATHS:
        return Need.NOTHING
    return Need.METRICS if path == "/metrics" else Need.TENANT


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
