"""GET /v1/models: the proposal and every aligner, each of which can be named as `model`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from server.openai.errors import UnknownName
from server.openai.schema import ModelList, ServedModel
from server.routes.shared import names_of, serving_of

router = APIRouter(tags=["openai"])

OWNER = "ram"


@router.get("/v1/models", response_model_exclude_unset=True)
async def list_models(request: Request) -> ModelList:
    """All names that a request may give as its `model`."""
    return ModelList(object="list", data=_models(request))


@router.get("/v1/models/{model_id:path}", response_model_exclude_unset=True)
async def get_model(request: Request, model_id: str) -> ServedModel:
    """One of them; ids may hold slashes."""
    for model in _models(request):
        if model.id == model_id:
            return model
    raise UnknownName(f"The model `{model_id[:200]}` does not exist.", param="model")


def _models(request: Request) -> list[ServedModel]:
    names = names_of(request)
    proposal = names.proposal
    own = {proposal: None} if names.has_proposal else {}
    parents: dict[str, str | None] = own | dict.fromkeys(names.aligners, proposal)
    return [
        ServedModel(
            id=name,
            object="model",
            created=serving_of(request).created_s,
            owned_by=OWNER,
            root=proposal,
            parent=parent,
        )
        for name, parent in parents.items()
    ]
