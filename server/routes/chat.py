"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.openai.convert import Ask, to_ask, to_turns
from server.openai.render import ChatRenderer
from server.openai.schema import ChatRequest
from server.routes.shared import answer, caller_of, describe_body, names_of, read_request, serving_of
from server.streaming import while_connected
from server.text import Turn, encode_chat

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions", openapi_extra=describe_body(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, streamed or whole."""
    wire = await read_request(request, ChatRequest)
    ask = to_ask(wire, names_of(request), caller_of(request).tenant.limits)
    return await while_connected(request, _answer(request, ask, to_turns(wire.messages)))


async def _answer(request: Request, ask: Ask, turns: list[Turn]) -> Response:
    loaded = serving_of(request).loaded
    prompt_ids = await encode_chat(loaded.tokenizer, turns, loaded.engine.max_model_len)
    renderer = ChatRenderer(ask, loaded.tokenizer)
    return await answer(request, ask, [prompt_ids], renderer, prompt_field="messages")
