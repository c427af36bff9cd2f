"""GET /v1/models: the proposal and every aligner, each of which can be named as `model`."""

from __future__ import annotations

from functools import lru_cache

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.openai.convert import ModelNames
from server.openai.errors import UnknownName
from server.openai.schema import ModelList, ServedModel
from server.routes.shared import names_of, serving_of

router = APIRouter(tags=["openai"])

OWNER = "ram"


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Response:
    """All names that a request may give as its `model`."""
    listing = _listing(names_of(request), serving_of(request).created_s)
    return Response(listing, media_type="application/json")


@router.get("/v1/models/{model_id:path}", response_model_exclude_unset=True)
async def get_model(request: Request, model_id: str) -> ServedModel:
    """One of them; ids may hold slashes."""
    names = names_of(request)
    created_s = serving_of(request).created_s
    if model_id == names.proposal and names.has_proposal:
        return _model(model_id, None, names, created_s)
    if model_id != names.proposal and names.aligner_of(model_id) is not None:
        return _model(model_id, names.proposal, names, created_s)
    raise UnknownName(f"The model `{model_id[:200]}` does not exist.", param="model")


@lru_cache(maxsize=256)
def _listing(names: ModelNames, created_s: int) -> bytes:
    """The list as JSON, made once for as long as names stay the same."""
    own = {names.proposal: None} if names.has_proposal else {}
    parents: dict[str, str | None] = own | dict.fromkeys(names.aligners, names.proposal)
    models = [_model(name, parent, names, created_s) for name, parent in parents.items()]
    return ModelList(object="list", data=models).model_dump_json(exclude_unset=True).encode()


def _model(name: str, parent: str | None, names: ModelNames, created_s: int) -> ServedModel:
    return ServedModel(
        id=name, object="model", created=created_s, owned_by=OWNER, root=names.proposal, parent=parent
    )
