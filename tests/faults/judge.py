"""What every answer must be, whatever it answers: no 5xx, and OpenAI's error shape where it is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping

TYPES = {
    "invalid_request_error",
    "requests",
    "tokens",
    "server_error",
    "service_unavailable_error",
}


def fault_of(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """What is wrong with an answer, in words; empty for a sound one."""
    if not 200 <= status < 500:
        return f"status {status}: {body[:200]!r}"
    if not headers.get("x-request-id"):
        return "no x-request-id"
    return "" if status < 400 else _fault_of_error(status, headers, body)


def _fault_of_error(status: int, headers: Mapping[str, str], body: bytes) -> str:
    if headers.get("content-type") != "application/json":
        return f"status {status} is {headers.get('content-type')}"
    try:
        [(key, error)] = json.loads(body).items()
    except (ValueError, AttributeError):
        return f"not one JSON object with one key: {body[:200]!r}"
    if key != "error" or set(error) != {"message", "type", "param", "code"}:
        return f"not OpenAI's shape: {body[:200]!r}"
    if not isinstance(error["message"], str) or not error["message"] or error["type"] not in TYPES:
        return f"no message, or an unknown type: {body[:200]!r}"
    if any(not isinstance(error[name], str | None) for name in ("param", "code")):
        return f"`param` or `code` is no text: {body[:200]!r}"
    if status == 429 and "retry-after" not in headers and headers.get("x-should-retry") != "false":
        return "429 without Retry-After"
    return ""
