"""Around every answer: its id, its time, its place in the counts, and OpenAI's shape for what went wrong."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics
from server.openai.errors import (
    HUNG_UP,
    ApiError,
    no_key,
    not_for_tenants,
    not_from_afar,
    of_router,
    to_api_error,
)
from server.settings import MetricsAccess
from server.tenants.access import Doors, Need, bearer_key, is_from_here, is_loopback, need_of
from server.tenants.tenants import Caller, Tenants

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")

logger = logging.getLogger(__name__)


class AnswerMiddleware:
    """Adds `x-request-id` and `openai-processing-ms`, counts answers, and catches what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s = time.perf_counter()
        scope.setdefault("state", {})["arrived_s"] = arrived_s
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        status = 0

        def send_with_headers(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(int((time.perf_counter() - arrived_s) * 1000))
            return send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            logger.exception("Request %s failed.", request_id)
            if status:
                raise
            answer = JSONResponse(to_api_error(error).body, status_code=500)
            await answer(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            self._metrics.http_requests.labels(route, str(status or HUNG_UP)).inc()


class KeyMiddleware:
    """Lets nobody in without a key, tells the routes who calls, and the caller what is left of its limits."""

    def __init__(self, app: ASGIApp, tenants: Tenants, doors: Doors, metrics_access: MetricsAccess) -> None:
        self._app = app
        self._tenants = tenants
        self._doors = doors
        self._metrics_access = metrics_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = bearer_key(scope["headers"])
        caller = self._tenants.find(key)
        refusal = self._refusal(scope, key, caller)
        if refusal is not None:
            answer = JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)
            await answer(scope, receive, send)
            return
        # A second lock: admins' routes open to no path that was taken for another one's here.
        scope.setdefault("state", {})["is_admin"] = need_of(scope["path"]) is Need.ADMIN
        if caller is None:
            await self._app(scope, receive, send)
            return
        ledger = caller.ledger
        scope["state"]["caller"] = caller

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(ledger.headers())
            return send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, key: bytes | None, caller: Caller | None) -> ApiError | None:
        path = scope["path"]
        if not self._doors.leads_to(path, _port(scope)):
            return of_router(404, scope["method"], path[:200])
        match need_of(path):
            case Need.NOTHING:
                return None
            case Need.TENANT:
                return None if caller is not None else no_key(key is not None)
            case Need.METRICS:
                is_let_in = self._may_see_metrics(scope, key)
            case Need.ADMIN if not self._tenants.has_keys:
                return None if _is_from_here(scope) else not_from_afar()
            case Need.ADMIN:
                is_let_in = self._tenants.is_admin(key)
        if is_let_in:
            return None
        is_tenant = caller is not None and not caller.is_anybody
        return not_for_tenants() if is_tenant else no_key(key is not None)

    def _may_see_metrics(self, scope: Scope, key: bytes | None) -> bool:
        if self._metrics_access == "open" or not self._tenants.has_keys or self._tenants.is_admin(key):
            return True
        client = scope.get("client")
        return self._metrics_access == "loopback" and client is not None and is_loopback(client[0])


def _is_from_here(scope: Scope) -> bool:
    client = scope.get("client")
    return is_from_here(client[0] if client else None, Headers(scope=scope))


def _port(scope: Scope) -> int | None:
    """The port that the connection came to, whatever its `Host` header says."""
    server = scope.get("server")
    return server[1] if server is not None else None


def _request_id(given: str) -> str:
    return given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
