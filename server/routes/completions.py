"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.openai.convert import Ask, Prompts, to_ask, to_prompts
from server.openai.render import CompletionRenderer
from server.openai.schema import CompletionRequest
from server.routes.shared import answer, caller_of, describe_body, names_of, read_request, serving_of
from server.streaming import while_connected
from server.text import encode_prompts

router = APIRouter(tags=["openai"])


@router.post("/v1/completions", openapi_extra=describe_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one or more texts, streamed or whole."""
    wire = await read_request(request, CompletionRequest)
    ask = to_ask(wire, names_of(request), caller_of(request).tenant.limits)
    return await while_connected(request, _answer(request, ask, to_prompts(wire)))


async def _answer(request: Request, ask: Ask, prompts: Prompts) -> Response:
    loaded = serving_of(request).loaded
    texts = await encode_prompts(loaded.tokenizer, prompts.texts, loaded.engine.max_model_len)
    all_ids = [*prompts.ids, *texts]
    renderer = CompletionRenderer(ask, loaded.tokenizer)
    return await answer(request, ask, all_ids, renderer, prompt_field="prompt")
