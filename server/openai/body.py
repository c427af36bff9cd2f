"""From bytes to a validated request: strict JSON, strict types, every complaint in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Never, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from server.openai.errors import ApiError

# Parsing that much takes about a millisecond; more is done off the event loop.
_MAX_INLINE_BYTES = 64 * 1024
MAX_KEYS = 50_000
"""Of all objects in a body: so many are validated in a fifth of a second, in which nobody else is served."""

Wire = TypeVar("Wire", bound=BaseModel)


async def read_json(request: Request, *, max_bytes: int, may_be_empty: bool = False) -> dict[str, Any]:
    """The request's body, an object; raises `ApiError` for anything else. No body may be an empty object."""
    _check_content_type(request.headers.get("content-type", ""))
    raw = await _read(request, max_bytes)
    if may_be_empty and not raw:
        return {}
    if len(raw) > _MAX_INLINE_BYTES:
        return await asyncio.to_thread(parse_object, raw)
    return parse_object(raw)


def _check_content_type(value: str) -> None:
    kind, _, rest = value.lower().partition(";")
    if kind.strip() not in ("", "application/json"):
        message = f"The body must be `application/json`, got `{value[:80]}`."
        raise ApiError(415, message, code="unsupported_media_type")
    charset = rest.replace(" ", "").replace('"', "").removeprefix("charset=")
    if charset not in ("", "utf-8", "utf8"):
        raise ApiError(415, "The body's charset must be utf-8.", code="unsupported_media_type")


async def _read(request: Request, max_bytes: int) -> bytes:
    """The whole body, counted while it arrives: a length may be absent, or a lie."""
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes.", code="request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > max_bytes:
            raise too_large
    return bytes(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object without what JSON forbids or Unicode cannot encode; raises `ApiError`."""
    try:
        value = json.loads(
            raw.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_key_checker(),
        )
        if b"\\u" in raw:
            # An escaped half of a surrogate pair is valid JSON and no text: no tokenizer can take it.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("it holds a lone surrogate") from None
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:
        raise _malformed("a number has too many digits" if "digits" in str(error) else str(error)) from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"The body could not be parsed as JSON: {reason}.", code="invalid_json")


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _key_checker() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes the objects of one body; keys must differ, and not be too many in all."""
    num_left = MAX_KEYS

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_left
        num_left -= 1 + len(pairs)
        if num_left < 0:
            raise ValueError(f"it holds more than {MAX_KEYS} objects and keys")
        table = dict(pairs)
        if len(table) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {twice[:64]!r} is given twice")
        return table

    return make


def validate(kind: type[Wire], data: dict[str, Any]) -> Wire:
    """The request of that kind; raises `ApiError` naming the field at fault."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _to_api_error(error, data) from None


def _to_api_error(error: ValidationError, data: dict[str, Any]) -> ApiError:
    """Tell of the error that got furthest into the data: of a union's branches, the one that was meant."""
    found = [(_path_in(data, details["loc"]), details) for details in error.errors(include_url=False)]
    path, details = max(found, key=lambda pair: _reach(*pair))
    kind = details["type"]
    if kind == "missing":
        path = (*path, details["loc"][-1])
        return ApiError(
            400, f"`{_name(path)}` is required.", code="missing_required_parameter", param=_name(path)
        )
    if kind == "extra_forbidden":
        return ApiError(
            400, f"`{_name(path)}` is not a known field.", code="unknown_parameter", param=_name(path)
        )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    wanted = details["msg"].removeprefix("Value error, ")
    wanted = f"{wanted[:1].lower()}{wanted[1:]}"
    if not path:
        return ApiError(400, f"The body: {wanted}.", code=code)
    message = f"`{_name(path)}`: {wanted}, got {_shown(details['input'])}."
    return ApiError(400, message, code=code, param=_name(path))


def _reach(path: tuple[int | str, ...], details: ErrorDetails) -> tuple[int, bool, int]:
    """How far validation came: deep, past the type, and far along a list."""
    position = path[-1] if path and isinstance(path[-1], int) else 0
    return len(path), not details["type"].endswith("_type"), position


def _path_in(data: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of an error's place that is in the data; the rest are names of a union's branches."""
    path: list[int | str] = []
    for step in loc:
        is_inside = (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        )
        if is_inside:
            path.append(step)
            data = data[step]
    return tuple(path)


def _name(path: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI writes it."""
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name[:200]


def _shown(value: Any) -> str:
    """A short form of a value that may be long, or secret."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "a huge number"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
