"""Around every answer: its id, its time, its place in the counts, and OpenAI's shape for what went wrong."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics
from server.openai.errors import HUNG_UP, ApiError, no_key, not_for_tenants, to_api_error
from server.settings import MetricsAccess
from server.tenants.access import Need, bearer_key, is_loopback, need_of
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

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(int((time.perf_counter() - arrived_s) * 1000))
            await send(message)

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

    def __init__(self, app: ASGIApp, tenants: Tenants, metrics_access: MetricsAccess) -> None:
        self._app = app
        self._tenants = tenants
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
        if caller is None:
            await self._app(scope, receive, send)
            return
        ledger = caller.ledger
        scope.setdefault("state", {})["caller"] = caller

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(ledger.headers())
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, key: bytes | None, caller: Caller | None) -> ApiError | None:
        need = need_of(scope["path"])
        if need is Need.NOTHING or (need is Need.TENANT and caller is not None):
            return None
        if need is Need.METRICS:
            if self._may_see_metrics(scope, key):
                return None
            if caller is not None and not caller.is_anybody:
                return not_for_tenants()
        return no_key(key is not None)

    def _may_see_metrics(self, scope: Scope, key: bytes | None) -> bool:
        if self._metrics_access == "open" or not self._tenants.has_keys or self._tenants.is_admin(key):
            return True
        client = scope.get("client")
        return self._metrics_access == "loopback" and client is not None and is_loopback(client[0])


def _request_id(given: str) -> str:
    return given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
