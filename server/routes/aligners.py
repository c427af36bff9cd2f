"""/v1/aligners: what an admin sees of aligners, and has done to them while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from ram_core.aligners.states import State
from ram_core.errors import AlignerUnavailable, Conflict, UnknownModel
from server.aligners.service import AlignerService
from server.openai.admin_schema import (
    MAX_WAIT_S,
    AdminBody,
    AlignerAdded,
    AlignerDeleted,
    AlignerInfo,
    AlignerList,
    ErrorBody,
    Load,
    NewAligner,
    Patch,
    Promotion,
    Rollback,
    Unload,
)
from server.openai.body import read_json, validate
from server.openai.errors import not_for_tenants
from server.routes.aligner_views import info_of, list_of
from server.routes.shared import describe_body, serving_of
from server.streaming import while_connected

Body = TypeVar("Body", bound=AdminBody)
Wait = Annotated[
    float, Query(ge=0, le=MAX_WAIT_S, description="Seconds until it must be done; 202 if it is not then.")
]

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body or the name cannot be."},
    401: {"model": ErrorBody, "description": "No admin's key."},
    403: {"model": ErrorBody, "description": "A tenant's key, or, where there are no keys, another machine."},
    404: {"model": ErrorBody, "description": "No such aligner or version."},
    409: {"model": ErrorBody, "description": "The aligner's state does not allow it, or it has failed."},
    503: {"model": ErrorBody, "description": "The engine is not there; see Retry-After."},
}
_NOT_YET: dict[int | str, dict[str, Any]] = {
    202: {"model": AlignerInfo, "description": "Begun, but not done within `wait`."}
}


def require_admin(request: Request) -> None:
    """A second lock, behind the door: whoever comes here as a tenant has found a way around it."""
    if not request.state.is_admin:
        raise not_for_tenants()


router = APIRouter(tags=["admin"], dependencies=[Depends(require_admin)], responses=ERRORS)


@router.get("/v1/aligners")
async def list_aligners(request: Request) -> AlignerList:
    """All aligners: versions, states, shares, memory."""
    return list_of(service_of(request), serving_of(request).metrics)


@router.post(
    "/v1/aligners",
    status_code=201,
    responses=_NOT_YET,
    response_model=AlignerAdded,
    openapi_extra=describe_body(NewAligner),
)
async def add_aligner(request: Request, wait: Wait = 0.0) -> JSONResponse:
    """Make an aligner, or another version, known: a directory below the aligners' own, or the hub's."""
    service, body = service_of(request), await _read(request, NewAligner)
    if body.path is not None:
        key = await service.add(body.name, body.path)
    else:
        key = await service.add_from_hub(body.name, body.hub_id or "")
    is_done = True
    if body.load or body.pin:
        service.load(key.name, key.version, is_pinned=body.pin)
        is_done = await within(request, wait, service.wait_loaded(key.name, key.version))
    info = _info(request, key.name)
    added = AlignerAdded(**info.model_dump(), version=key.version)
    return JSONResponse(added.model_dump(), status_code=201 if is_done else 202)


@router.get("/v1/aligners/{name:path}")
async def get_aligner(request: Request, name: str) -> AlignerInfo:
    """One aligner; names may hold a slash."""
    return _info(request, name)


@router.patch("/v1/aligners/{name:path}", openapi_extra=describe_body(Patch))
async def patch_aligner(request: Request, name: str) -> AlignerInfo:
    """Change what holds for requests that say nothing else, or whether the aligner stays in memory."""
    service, body = service_of(request), await _read(request, Patch)
    service.patch(
        name,
        strength=body.strength,
        resampling=body.resampling,
        kl_threshold=body.gate,
        num_candidates=body.candidates,
        is_pinned=body.pinned,
    )
    return _info(request, name)


@router.delete("/v1/aligners/{name:path}", responses=_NOT_YET, response_model=AlignerDeleted)
async def delete_aligner(request: Request, name: str, wait: Wait = 0.0) -> JSONResponse:
    """Forget an aligner: new requests do not find it, running ones finish; its files stay."""
    service = service_of(request)
    service.remove(name)
    if await within(request, wait, _gone(service, name)):
        return JSONResponse(AlignerDeleted(name=name).model_dump())
    return JSONResponse(_info(request, name).model_dump(), status_code=202)


@router.post(
    "/v1/aligners/{name:path}/load",
    responses=_NOT_YET,
    response_model=AlignerInfo,
    openapi_extra=describe_body(Load, is_required=False),
)
async def load_aligner(request: Request, name: str, wait: Wait = 0.0) -> JSONResponse:
    """Bring a version into memory, or those that answer new requests."""
    service, body = service_of(request), await _read(request, Load)
    service.load(name, body.version, is_pinned=body.pin)
    is_done = await within(request, wait, service.wait_loaded(name, body.version))
    return _state(request, name, is_done)


@router.post(
    "/v1/aligners/{name:path}/unload",
    responses=_NOT_YET,
    response_model=AlignerInfo,
    openapi_extra=describe_body(Unload, is_required=False),
)
async def unload_aligner(request: Request, name: str, wait: Wait = 0.0) -> JSONResponse:
    """Free a version, or all of them, once no request runs on it; the next request loads it again."""
    service, body = service_of(request), await _read(request, Unload)
    service.unload(name, body.version)
    is_done = await within(request, wait, _freed(service, name, body.version))
    return _state(request, name, is_done)


@router.post(
    "/v1/aligners/{name:path}/promote",
    responses=_NOT_YET,
    response_model=AlignerInfo,
    openapi_extra=describe_body(Promotion),
)
async def promote_aligner(request: Request, name: str, wait: Wait = 0.0) -> JSONResponse:
    """Let a version answer all new requests, or several by weight, as soon as all are in memory."""
    service, body = service_of(request), await _read(request, Promotion)
    service.promote(name, body.weights)
    is_done = await within(request, wait, service.wait_promoted(name))
    return _state(request, name, is_done)


@router.post(
    "/v1/aligners/{name:path}/rollback",
    responses=_NOT_YET,
    response_model=AlignerInfo,
    openapi_extra=describe_body(Rollback, is_required=False),
)
async def roll_aligner_back(request: Request, name: str, wait: Wait = 0.0) -> JSONResponse:
    """Take the promotion back that still waits, or else the one that was made last."""
    service, _ = service_of(request), await _read(request, Rollback)
    service.rollback(name)
    is_done = await within(request, wait, service.wait_promoted(name))
    return _state(request, name, is_done)


def service_of(request: Request) -> AlignerService:
    """The aligners; raises `EngineUnavailable` while there is no engine to load them."""
    return serving_of(request).aligners


async def within(request: Request, wait_s: float, end: Coroutine[Any, Any, None]) -> bool:
    """Whether something ended in that time; who hangs up need not wait.

    Raises:
        Conflict: it ended badly.
        HungUpError: nobody listens any more.
    """

    async def wait() -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await end
        except TimeoutError:
            return False
        except AlignerUnavailable as error:
            raise Conflict(str(error)) from None
        return True

    return await while_connected(request, wait())


async def _read(request: Request, kind: type[Body]) -> Body:
    max_bytes = serving_of(request).settings.max_body_bytes
    return validate(kind, await read_json(request, max_bytes=max_bytes, may_be_empty=True))


async def _gone(service: AlignerService, name: str) -> None:
    """Until nobody knows an aligner any more."""
    while True:
        try:
            service.status_of(name)
        except UnknownModel:
            return
        await service.wait_change()


async def _freed(service: AlignerService, name: str, version: str | None) -> None:
    """Until a version, or all of a name, holds no memory."""
    while any(
        each.state in (State.VERIFYING, State.LOADING, State.RESIDENT, State.DRAINING)
        for each in service.status_of(name).status.versions
        if not each.is_preset and version in (None, each.key.version)
    ):
        await service.wait_change()


def _info(request: Request, name: str) -> AlignerInfo:
    return info_of(service_of(request).status_of(name), serving_of(request).metrics)


def _state(request: Request, name: str, is_done: bool) -> JSONResponse:
    return JSONResponse(_info(request, name).model_dump(), status_code=200 if is_done else 202)
