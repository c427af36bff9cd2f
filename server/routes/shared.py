"""What the routes that generate have in common: a request comes in, is admitted, and is answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from msgspec.structs import replace
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ram_core.engine.messages import Request
from ram_core.errors import ContextLengthExceeded, InvalidRequest
from ram_core.params import AlignmentParams
from server.accounting import Account
from server.aligners.lease import Lease
from server.generation import Generation
from server.metrics import SEVERAL, Meter, Metrics
from server.openai.body import read_json, validate
from server.openai.convert import Ask, ModelNames, aligned, names_for
from server.openai.errors import to_api_error
from server.openai.fields import check_fields, unknown_fields
from server.openai.render import Renderer, Transcript, count_usage
from server.openai.schema import GenerationRequest
from server.serving import Serving
from server.settings import IDENTITY
from server.streaming import ChunkStream, open_stream
from server.tenants.limits import RateLimited, Reservation, TooManyTokens, Wanted
from server.tenants.tenants import Caller

Wire = TypeVar("Wire", bound=GenerationRequest)

VERSIONS_HEADER = "x-ram-aligners"
"""Which versions answer, as NAME@VERSION, of those that the request named."""


def describe_body(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """The request's schema for /openapi.json, which cannot see it: routes read the body themselves."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, list):
            return [inlined(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(definitions[part["$ref"].removeprefix("#/$defs/")])
        return {name: inlined(value) for name, value in part.items()}

    content = {"application/json": {"schema": inlined(schema)}}
    return {"requestBody": {"required": is_required, "content": content}}


def serving_of(request: HttpRequest) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


def caller_of(request: HttpRequest) -> Caller:
    caller: Caller = request.state.caller
    return caller


def names_of(request: HttpRequest) -> ModelNames:
    """What the caller may call by name."""
    return names_for(caller_of(request).tenant, serving_of(request).names)


@contextmanager
def _refusals_counted(metrics: Metrics, caller: Caller) -> Iterator[None]:
    try:
        yield
    except (RateLimited, TooManyTokens) as error:
        limit = to_api_error(error).type
        metrics.tenant_refusals.labels(caller.tenant.name, limit).inc()
        raise


async def read_request(request: HttpRequest, kind: type[Wire]) -> Wire:
    """The validated body, unread if its caller is over a limit; fields that nobody knows are counted."""
    serving, caller = serving_of(request), caller_of(request)
    _ = serving.loaded
    with _refusals_counted(serving.metrics, caller):
        caller.ledger.check()
    data: dict[str, Any] = await read_json(request, max_bytes=serving.settings.max_body_bytes)
    wire = validate(kind, data)
    check_fields(wire)
    for name in unknown_fields(wire):
        serving.metrics.count_unknown_field(name)
    return wire


async def answer(
    http: HttpRequest, ask: Ask, prompts: list[tuple[int, ...]], renderer: Renderer, *, prompt_field: str
) -> Response:
    """Have the prompts continued; `prompt_field` is what the wire calls them."""
    caller, aligners, engine = caller_of(http), serving_of(http).aligners, serving_of(http).loaded.engine
    # A place is taken before anybody waits for aligners, so that those who wait count.
    reservation = _reserve(http, ask, prompts)
    requests = _requests(caller, ask, prompts, renderer.id)
    announced: list[Request] = []
    is_admitted = False

    def announce(lease: Lease) -> None:
        announced.extend(requests)
        for request in requests:
            engine.prefill(replace(request, alignment=aligned(ask, lease)))

    try:
        sticky_key = _sticky_key(caller, ask) or renderer.id
        lease = await aligners.acquire(renderer.id, ask.aligners, sticky_key=sticky_key, on_loading=announce)
        alignment = aligned(ask, lease)
        renderer.begin(lease, alignment)
        submitted = [replace(request, alignment=alignment) for request in requests]
        generation = _generation(http, ask, submitted, renderer, lease, reservation)
        try:
            if ask.is_stream:
                response: Response = await _stream(generation, renderer, serving_of(http), ask)
            else:
                response = await _whole(generation, renderer)
            return _signed(response, lease)
        finally:
            is_admitted = generation.is_admitted
    except InvalidRequest as error:
        raise _in_wire_words(error, prompt_field) from None
    finally:
        if not is_admitted:
            for request in announced:
                engine.forget(request.request_id)
            reservation.cancel()
            aligners.release(renderer.id)


def _requests(caller: Caller, ask: Ask, prompts: list[tuple[int, ...]], answer_id: str) -> list[Request]:
    """What the engine is asked, for the proposal alone: aligners are named once they are lent."""
    return [
        Request(
            f"{answer_id}-{number}",
            prompt_ids,
            ask.sampling,
            num_choices=ask.num_choices,
            tenant=caller.tenant.name,
            priority=caller.tenant.priority,
            cache_salt=ask.cache_salt,
            prefix_group=caller.tenant.prefix_group,
        )
        for number, prompt_ids in enumerate(prompts)
    ]


def _generation(
    http: HttpRequest,
    ask: Ask,
    requests: list[Request],
    renderer: Renderer,
    lease: Lease,
    reservation: Reservation,
) -> Generation:
    """The answer's choices, which give the lease back when they are left."""
    serving, caller = serving_of(http), caller_of(http)
    loaded, aligners = serving.loaded, serving.aligners
    answered = _labels(lease, requests[0].alignment)
    account = Account(
        caller,
        reservation,
        serving.metrics,
        serving.usage_log,
        renderer.id,
        ask.model,
        answered[0],
        tuple(f"{lent.name}@{lent.version}" for lent in lease.aligners),
        http.state.arrived_s,
        lambda: tuple(loaded.tokenizer.decode(request.prompt_ids) for request in requests),
    )
    return Generation(
        loaded.engine,
        loaded.tokenizer,
        requests,
        Meter(serving.metrics, answered, http.state.arrived_s),
        account.close,
        on_left=lambda: aligners.release(renderer.id),
        keeps_text=account.keeps_text,
    )


def _reserve(http: HttpRequest, ask: Ask, prompts: list[tuple[int, ...]]) -> Reservation:
    """Set aside what the request may need; raises what `Ledger.reserve` does."""
    serving, caller = serving_of(http), caller_of(http)
    loaded = serving.loaded
    wanted = Wanted(
        tuple(len(prompt_ids) for prompt_ids in prompts),
        ask.num_choices,
        ask.sampling.max_tokens,
        loaded.engine.max_model_len,
    )
    with _refusals_counted(serving.metrics, caller):
        return caller.ledger.reserve(wanted)


async def _stream(generation: Generation, renderer: Renderer, serving: Serving, ask: Ask) -> ChunkStream:
    return await open_stream(generation, renderer, serving.settings, wants_usage=ask.wants_usage)


async def _whole(generation: Generation, renderer: Renderer) -> Response:
    async with generation:
        transcripts = [Transcript() for _ in range(generation.num_choices)]
        while deltas := await generation.take():
            for delta in deltas:
                transcripts[delta.index].add(delta)
    return Response(renderer.answer(transcripts, count_usage(generation)), media_type="application/json")


def _signed(response: Response, lease: Lease) -> Response:
    """The response, with a header that says which versions answer."""
    if lease.aligners:
        response.headers[VERSIONS_HEADER] = ", ".join(
            f"{lent.name}@{lent.version}" for lent in lease.aligners
        )
    return response


def _labels(lease: Lease, alignment: AlignmentParams) -> tuple[str, str]:
    """Bounded labels: an aligner's name and version, or a word for none or several and no version."""
    if alignment.is_identity:
        return IDENTITY, ""
    if len(lease.aligners) > 1:
        return SEVERAL, ""
    return lease.aligners[0].name, lease.aligners[0].version


def _sticky_key(caller: Caller, ask: Ask) -> str:
    """Whoever keeps its versions while shares stay: a tenant's user, or else the tenant; "" is nobody."""
    tenant = caller.tenant.name
    return f"{tenant}\0{ask.user}" if ask.user else tenant


def _in_wire_words(error: InvalidRequest, prompt_field: str) -> InvalidRequest:
    """The engine speaks of prompts and aligners; the client called them something else."""
    words = {"prompt": prompt_field, "aligners": "alignment.aligners"}
    kind = ContextLengthExceeded if isinstance(error, ContextLengthExceeded) else InvalidRequest
    return kind(str(error), param=words.get(error.param or "", error.param))
