"""GET /version."""

from __future__ import annotations

from fastapi import APIRouter

from ram_core import __version__

router = APIRouter(tags=["health"])


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this software."""
    return {"version": __version__}
