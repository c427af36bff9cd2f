"""Talks to a server's admin API, for commands: errors are one line, and say what to do."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from ram_core.aligners.names import require_name
from ram_core.errors import RamError
from server.tenants.keys import Seal

_PATIENCE_S = 30.0
"""How long a server may take for an answer that it does not wait for anything with."""


class AdminError(RamError):
    """The server refused, or cannot be reached."""


class AdminClient:
    """The admin API at a URL, with a key or, on the server's own machine, perhaps without one."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises `AdminError` for what is no key, or no URL."""
        self._url = url.rstrip("/").removesuffix("/v1")
        if _is_seal(key):
            raise AdminError("RAM_ADMIN_KEY holds the hash that the server keeps; give the key itself.")
        try:
            headers = {b"Authorization": b"Bearer " + key.encode()} if key else None
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=_PATIENCE_S)
        except (httpx.InvalidURL, ValueError) as error:
            raise AdminError(f"`{url}` is no URL: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def aligners(self) -> dict[str, Any]:
        """All aligners, and their memory."""
        return self._ask("GET", "/v1/aligners")[1]

    def aligner(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self._ask("GET", _path_of(name))[1]

    def add(self, body: dict[str, Any], *, wait_s: float) -> tuple[bool, dict[str, Any]]:
        """Make an aligner known; whether that, and its load, is done, and what it is now."""
        return self._order("/v1/aligners", body, wait_s)

    def order(
        self, name: str, verb: str, body: dict[str, Any], *, wait_s: float
    ) -> tuple[bool, dict[str, Any]]:
        """Have something done to an aligner; whether it is done, and what the aligner is now."""
        return self._order(f"{_path_of(name)}/{verb}", body, wait_s)

    def _order(self, path: str, body: dict[str, Any], wait_s: float) -> tuple[bool, dict[str, Any]]:
        status, answer = self._ask(
            "POST", path, params={"wait": wait_s}, json=body, timeout=_PATIENCE_S + wait_s
        )
        return status != httpx.codes.ACCEPTED, answer

    def _ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        try:
            answer = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise AdminError(f"Cannot reach {self._url}: {reason}. Is `ram serve` running there?") from None
        if not answer.is_success:
            raise AdminError(_reason_of(answer))
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise AdminError(f"{self._url} does not answer as `ram serve` does.")
        return answer.status_code, body


def _path_of(name: str) -> str:
    """Where an aligner is; raises `AdminError` for a name that could lead elsewhere."""
    try:
        return f"/v1/aligners/{quote(require_name(name))}"
    except ValueError as error:
        raise AdminError(f"{error}.") from None


def _is_seal(key: str) -> bool:
    try:
        Seal.parse(key)
    except ValueError:
        return False
    return True


def _reason_of(answer: httpx.Response) -> str:
    try:
        reason = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        reason = f"The server answered with status {answer.status_code}."
    hint = " Give the admin's key by --key or RAM_ADMIN_KEY." if answer.status_code in (401, 403) else ""
    return f"{reason}{hint}"
