"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from server.routes.shared import serving_of

router = APIRouter(tags=["health"])


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics, as text."""
    return Response(generate_latest(serving_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
