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
from server.openai.errors import to_api_error

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")
HUNG_UP = 499
"""The status under which an answer to a client that is gone is counted, as nginx does."""

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


def _request_id(given: str) -> str:
    return given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
