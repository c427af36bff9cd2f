"""The application: wiring and lifespan, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ram_core import __version__
from ram_core.errors import RamError
from server.middleware import AnswerMiddleware, KeyMiddleware
from server.openai.errors import HUNG_UP, ApiError, of_router, to_api_error
from server.routes import aligners, chat, completions, health, lora, metrics, models, version
from server.serving import Loaded, Serving
from server.settings import Settings
from server.streaming import HungUpError


def create_app(settings: Settings, loaded: Loaded | None = None) -> FastAPI:
    """The application; without an engine it says that it is loading, until `app.state.serving.open`."""
    serving = Serving(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if loaded is not None:
            serving.open(loaded)
        watching = asyncio.create_task(serving.tenants.watch())
        yield
        watching.cancel()
        await serving.close()

    app = FastAPI(title="RAM", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.serving = serving
    for module in (chat, completions, models, health, metrics, version, aligners):
        app.include_router(module.router)
    if settings.vllm_lora_api:
        app.include_router(lora.router)
    app.add_middleware(
        KeyMiddleware, tenants=serving.tenants, doors=serving.doors, metrics_access=settings.metrics_access
    )
    # The last one is the outermost: refusals have ids and are counted, too.
    app.add_middleware(AnswerMiddleware, metrics=serving.metrics)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RamError, _answer_error)
    app.add_exception_handler(HungUpError, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(HTTPException, _answer_router_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_url)
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    api_error = to_api_error(error)
    return JSONResponse(api_error.body, status_code=api_error.status, headers=api_error.headers)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=HUNG_UP)


async def _answer_router_error(request: Request, error: Exception) -> Response:
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    return await _answer_error(request, of_router(status, request.method, request.url.path[:200], headers))


async def _answer_invalid_url(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    wanted = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    message = f"`{param}`: {wanted}, got {str(first['input'])[:40]!r}."
    return await _answer_error(request, ApiError(400, message, code="invalid_value", param=param))
