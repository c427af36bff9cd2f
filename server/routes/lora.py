"""vLLM's paths that load and unload adapters by name, for tools that know these. Thin: see `aligners`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from server.openai.admin_schema import LoraLoad, LoraUnload
from server.openai.body import read_json, validate
from server.openai.errors import ApiError
from server.routes.aligners import ERRORS, require_admin, service_of, within
from server.routes.shared import describe_body, serving_of

MAX_LOAD_S = 600.0
"""vLLM answers when the adapter is loaded, however long that takes; here there is an end to it."""

Body = TypeVar("Body", bound=BaseModel)

router = APIRouter(tags=["admin"], dependencies=[Depends(require_admin)], responses=ERRORS)


@router.post("/v1/load_lora_adapter", openapi_extra=describe_body(LoraLoad))
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Make known what lies at a path below the aligners' directory, and let it answer once it is loaded."""
    service, body = service_of(request), await _read(request, LoraLoad)
    key = await service.add(body.lora_name, _below(service.root, body.lora_path))
    service.promote(key.name, key.version)
    if not await within(request, MAX_LOAD_S, service.wait_promoted(key.name)):
        message = f"`{key}` is not loaded after {MAX_LOAD_S:.0f} s; it goes on."
        raise ApiError(503, message, type="service_unavailable_error", headers={"Retry-After": "30"})
    return PlainTextResponse(f"Success: LoRA adapter '{key.name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=describe_body(LoraUnload))
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Forget an adapter: new requests do not find it, running ones finish."""
    service, body = service_of(request), await _read(request, LoraUnload)
    service.remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _below(root: Path | None, path: str) -> str:
    """The path as seen from the aligners' directory; vLLM's tools give absolute ones."""
    pure = PurePosixPath(path)
    if root is None or not pure.is_absolute() or not pure.is_relative_to(root.absolute()):
        return path
    return str(pure.relative_to(root.absolute()))


async def _read(request: Request, kind: type[Body]) -> Body:
    return validate(kind, await read_json(request, max_bytes=serving_of(request).settings.max_body_bytes))
