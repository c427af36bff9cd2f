"""Errors as OpenAI's clients know them. The one table that maps the core's errors to HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ram_core.errors import (
    AlignerUnavailable,
    Conflict,
    ContextLengthExceeded,
    EngineOutOfMemory,
    EngineUnavailable,
    InvalidRequest,
    NonFiniteLogits,
    QueueFull,
    RamError,
    UnknownModel,
)
from server.tenants.limits import RateLimited, RequestsLimited, TokensLimited, TooManyTokens

ErrorType = Literal[
    "invalid_request_error", "requests", "tokens", "server_error", "service_unavailable_error"
]
HUNG_UP = 499
"""The status under which an answer to a client that is gone is counted, as nginx does."""
ENGINE_RETRY_S = 5
"""When to ask again after the engine died: about the time that a supervisor needs to restart it."""
ALIGNER_RETRY_S = 10
"""When to ask again for an aligner that could not be loaded, or not in time."""


class ApiError(Exception):
    """An answer that is an error; everything that a client sees of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object: all four keys, always."""
        inner = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": inner}


class UnsupportedParameter(InvalidRequest):
    """OpenAI's API knows this field, and we do not honour it yet."""


class UnknownName(UnknownModel):
    """No model or aligner has the name that field `param` gives."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: ErrorType
    code: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


_NO_RETRY = {"x-should-retry": "false"}

# The first row whose class fits counts: special ones come before general ones.
_TABLE: dict[type[RamError], _Row] = {
    ContextLengthExceeded: _Row(400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedParameter: _Row(400, "invalid_request_error", "unsupported_parameter"),
    Conflict: _Row(409, "invalid_request_error", "conflict", _NO_RETRY),
    InvalidRequest: _Row(400, "invalid_request_error", "invalid_value"),
    UnknownModel: _Row(404, "invalid_request_error", "model_not_found"),
    QueueFull: _Row(429, "requests", "rate_limit_exceeded"),
    TokensLimited: _Row(429, "tokens", "rate_limit_exceeded"),
    RequestsLimited: _Row(429, "requests", "rate_limit_exceeded"),
    RateLimited: _Row(429, "requests", "rate_limit_exceeded"),
    TooManyTokens: _Row(429, "tokens", "rate_limit_exceeded", _NO_RETRY),
    EngineUnavailable: _Row(
        503, "service_unavailable_error", "engine_unavailable", {"Retry-After": str(ENGINE_RETRY_S)}
    ),
    AlignerUnavailable: _Row(
        503, "service_unavailable_error", "aligner_unavailable", {"Retry-After": str(ALIGNER_RETRY_S)}
    ),
    NonFiniteLogits: _Row(500, "server_error", None, _NO_RETRY),
    EngineOutOfMemory: _Row(500, "server_error", None),
    RamError: _Row(500, "server_error", None),
}


def to_api_error(error: Exception) -> ApiError:
    """The answer to any error; what we did not raise on purpose is told without its message."""
    if isinstance(error, ApiError):
        return error
    row = next((row for kind, row in _TABLE.items() if isinstance(error, kind)), None)
    if row is None:
        return ApiError(500, "The server had an error while processing your request.", type="server_error")
    headers = dict(row.headers)
    if isinstance(error, (QueueFull, RateLimited)):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    param = error.param if isinstance(error, (InvalidRequest, UnknownName)) else None
    return ApiError(row.status, str(error), type=row.type, code=row.code, param=param, headers=headers)


def no_key(is_given: bool) -> ApiError:
    """What a caller hears whose key opens nothing, or who brought none."""
    message = (
        "Incorrect API key provided."
        if is_given
        else "You didn't provide an API key. Send it in a header, `Authorization: Bearer KEY`."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def not_for_tenants() -> ApiError:
    """What a tenant hears where only the admin's key opens."""
    return ApiError(403, "This needs the admin's key.", code="insufficient_permissions")


def not_from_afar() -> ApiError:
    """What others hear than the machine's own users where there is no admin's key to ask for."""
    message = "Without an admin's key (RAM_ADMIN_KEY), this is open to programs of this machine alone."
    return ApiError(403, message, code="insufficient_permissions")


_ROUTER_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def of_router(status: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """What the router says, in OpenAI's shape."""
    message = f"Not allowed to {method} {path}." if status == 405 else f"Invalid URL ({method} {path})."
    return ApiError(status, message, code=_ROUTER_CODES.get(status, "invalid_value"), headers=headers)


def error_event(error: Exception) -> bytes:
    """The last event but one of a stream that fails after it began."""
    return b"data: " + json.dumps(to_api_error(error).body, ensure_ascii=False).encode() + b"\n\n"
