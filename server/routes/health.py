"""Is the process there, and should requests come here?"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.routes.shared import serving_of

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live(request: Request) -> Response:
    """200 as long as the process answers; 503 and the reason if its engine is stuck."""
    return _tell("alive", serving_of(request).why_not_alive())


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 if the model is loaded and the step loop makes progress, else 503 and the reason."""
    return _tell("ready", serving_of(request).why_not_ready())


def _tell(status: str, reason: str | None) -> Response:
    if reason is None:
        return JSONResponse({"status": status})
    return JSONResponse({"status": f"not {status}", "reason": reason}, status_code=503)
