"""From the wire's words to the core's: the only module that hears both (`render` tells the answer)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

from ram_core.aligners.states import AskedAligner
from ram_core.errors import InvalidRequest
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from server.aligners.lease import Lease
from server.openai.errors import UnknownName, UnsupportedParameter
from server.openai.schema import (
    Alignment,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    GenerationRequest,
    Message,
)
from server.settings import IDENTITY
from server.tenants.policy import UNLIMITED, Limits, Patterns, Tenant, fits
from server.text import Turn

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default of `max_tokens`, of /v1/completions alone."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "ignore_eos": "ignore_eos",
}
_ALIGNMENT_FIELDS = {
    "candidates": "num_candidates",
    "proposal_temperature": "proposal_temperature",
    "proposal_top_p": "proposal_top_p",
    "proposal_top_k": "proposal_top_k",
    "kl_threshold": "kl_threshold",
    "eos_priority": "eos_priority",
}


@dataclass(frozen=True, slots=True, eq=False)
class ModelNames:
    """What a request may call by name; `default_aligner` answers where it names nothing.

    Without `has_proposal` the proposal answers nobody alone. Two of them are never equal, and so quickly told
    apart.
    """

    proposal: str
    aligners: tuple[str, ...] = ()
    default_aligner: str = ""
    has_proposal: bool = True
    _known: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", frozenset(self.aligners))

    def require(self, name: str, param: str) -> None:
        """Raise `UnknownName` unless an aligner, or the identity, has this name."""
        if name != IDENTITY and name not in self._known:
            raise UnknownName(f"The aligner `{name[:200]}` does not exist.", param=param)

    def aligner_of(self, model: str) -> str | None:
        """The aligner that a model's name means, by its own name or as `proposal:aligner`; None if none."""
        if model in self._known:
            return model
        own = model.removeprefix(f"{self.proposal}:")
        return own if own != model and own in self._known else None


def names_for(tenant: Tenant, names: ModelNames) -> ModelNames:
    """What a tenant may call by name: to it, nothing else exists."""
    return _names_for(names, tenant.aligners, tenant.models, tenant.default_aligner)


@lru_cache(maxsize=1024)
def _names_for(names: ModelNames, aligners: Patterns, models: Patterns, default: str) -> ModelNames:
    visible = tuple(name for name in names.aligners if fits(name, aligners))
    if not default and (names.default_aligner in visible or names.default_aligner == IDENTITY):
        default = names.default_aligner
    return ModelNames(names.proposal, visible, default, fits(names.proposal, models))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants, in the core's words, and in which form it wants to be answered.

    `alignment` has no terms yet: which models `aligners` come to is known when they have been lent. `said`
    has those of its fields that the request gave. `user` is on whose behalf it asks, "" if that is not told.
    """

    model: str
    sampling: SamplingParams
    aligners: tuple[AskedAligner, ...]
    alignment: AlignmentParams
    said: frozenset[str]
    user: str
    num_choices: int
    cache_salt: str
    is_stream: bool
    wants_usage: bool
    wants_log_probs: bool
    wants_telemetry: bool


def to_ask(request: ChatRequest | CompletionRequest, names: ModelNames, limits: Limits = UNLIMITED) -> Ask:
    """Everything but the prompt.

    Raises:
        InvalidRequest: a value out of range, or over the limits, or two fields that contradict each other.
        UnknownModel: a name that is neither the proposal's nor an aligner's.
    """
    is_stream = bool(request.stream)
    if request.stream_options is not None and not is_stream:
        raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
    _check_limits(request, limits)
    aligners, alignment, said = to_alignment(request, names)
    default_model = "+".join(asked.name for asked in aligners) or names.proposal
    return Ask(
        model=request.model or default_model,
        sampling=to_sampling(request, limits),
        # Where the proposal draws alone, nobody need wait for an aligner.
        aligners=() if alignment.resampling is Resampling.PROPOSAL else aligners,
        alignment=alignment,
        said=said,
        user=request.safety_identifier or request.user or "",
        num_choices=1 if request.n is None else request.n,
        cache_salt=request.cache_salt or "",
        is_stream=is_stream,
        wants_usage=bool(request.stream_options and request.stream_options.include_usage),
        wants_log_probs=request.logprobs is not None and request.logprobs is not False,
        wants_telemetry=bool(request.alignment and request.alignment.telemetry),
    )


def _check_limits(request: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """Refuse what is asked for explicitly, and more than one request may have."""
    for name, limit in (
        ("max_tokens", limits.max_tokens),
        ("max_completion_tokens", limits.max_tokens),
        ("n", limits.max_n),
    ):
        value = getattr(request, name, None)
        if value is not None and limit is not None and value > limit:
            raise InvalidRequest(f"`{name}` may be at most {limit}, got {value}.", param=name)


def to_sampling(request: ChatRequest | CompletionRequest, limits: Limits = UNLIMITED) -> SamplingParams:
    """The core's sampling parameters; what the wire does not say is left to the core, within the limits."""
    given: dict[str, Any] = _given(request, _SAMPLING_FIELDS)
    if request.top_k is not None:
        # Elsewhere -1 means all tokens, which is 0 here.
        given["top_k"] = 0 if request.top_k == -1 else request.top_k
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        # Beyond 64 bits no vocabulary has an id, so none of these can be met.
        given["stop_token_ids"] = tuple(i for i in request.stop_token_ids if -(2**63) <= i < 2**63)
    known = [count for count in (_max_tokens(request), limits.max_tokens) if count is not None]
    if known:
        given["max_tokens"] = min(known)
    num_top_log_probs = _num_top_log_probs(request)
    if num_top_log_probs is not None:
        given["num_top_log_probs"] = num_top_log_probs
    return SamplingParams(**given)


def _max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` contradict each other.", param="max_tokens"
        )
    return both.pop() if both else None


def _num_top_log_probs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        if request.logprobs is not None:
            _within("logprobs", lambda: SamplingParams(num_top_log_probs=request.logprobs or 0))
        return request.logprobs
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return request.top_logprobs


def to_alignment(
    request: GenerationRequest, names: ModelNames
) -> tuple[tuple[AskedAligner, ...], AlignmentParams, frozenset[str]]:
    """Which aligners act, how, and what of that was said in so many words.

    Aligners are the extension's word, else the model's name, else the server's default.
    """
    wire = request.alignment or Alignment()
    given: dict[str, Any] = _given(wire, _ALIGNMENT_FIELDS)
    if wire.resampling is not None:
        given["resampling"] = _to_resampling(wire.resampling)
    aligners = _to_aligners(wire, _named_by_model(request.model, names), names)
    params = _within("alignment.", lambda: AlignmentParams(**given))
    is_identity = params.resampling is Resampling.PROPOSAL or not any(
        asked.scale and asked.strength != 0 for asked in aligners
    )
    if is_identity and not names.has_proposal:
        name = request.model or names.proposal
        raise UnknownName(f"The model `{name[:200]}` does not exist.", param="model")
    return aligners, params, frozenset(given)


def aligned(ask: Ask, lease: Lease) -> AlignmentParams:
    """How the aligners act that were lent: as the request says, and else as they do by default."""
    defaults: dict[str, Any] = {
        "resampling": lease.resampling,
        "kl_threshold": lease.kl_threshold,
        "num_candidates": lease.num_candidates,
    }
    holding = {name: value for name, value in defaults.items() if value is not None and name not in ask.said}
    return replace(ask.alignment, terms=lease.terms, **holding)


def _named_by_model(model: str | None, names: ModelNames) -> str:
    if not model:
        return names.default_aligner or IDENTITY
    if model == names.proposal:
        return IDENTITY
    if (aligner := names.aligner_of(model)) is None:
        raise UnknownName(f"The model `{model[:200]}` does not exist.", param="model")
    return aligner


def _to_aligners(wire: Alignment, named_by_model: str, names: ModelNames) -> tuple[AskedAligner, ...]:
    """The aligners that are named; a strength beside a list multiplies every one in it."""
    if wire.aligner is not None and wire.aligners is not None:
        raise InvalidRequest("Give either `aligner` or `aligners`, not both.", param="alignment.aligners")
    if wire.aligners is None:
        name = named_by_model if wire.aligner is None else wire.aligner
        names.require(name, "alignment.aligner")
        chosen = [_asked(name, wire.strength, 1.0, "alignment.")]
    else:
        scale = 1.0 if wire.strength is None else wire.strength
        chosen = []
        for index, choice in enumerate(wire.aligners):
            names.require(choice.name, f"alignment.aligners[{index}].name")
            chosen.append(_asked(choice.name, choice.strength, scale, f"alignment.aligners[{index}]."))
    chosen = [asked for asked in chosen if asked.name != IDENTITY]
    if len({asked.name for asked in chosen}) != len(chosen):
        raise InvalidRequest("`aligners` must not name one aligner twice.", param="alignment.aligners")
    return tuple(chosen)


def _asked(name: str, strength: float | None, scale: float, place: str) -> AskedAligner:
    """Multiplied at once where it can be; what it comes to must be a strength."""
    asked = AskedAligner(name, None, scale) if strength is None else AskedAligner(name, strength * scale)
    _within(place, lambda: AlignerTerm(name, scale if asked.strength is None else asked.strength))
    return asked


def _to_resampling(name: str) -> Resampling:
    try:
        return Resampling(name)
    except ValueError:
        modes = ", ".join(f"`{mode.value}`" for mode in Resampling)
        raise InvalidRequest(
            f"`resampling` must be one of {modes}, got `{name[:40]}`.", param="alignment.resampling"
        ) from None


def to_turns(messages: list[Message]) -> list[Turn]:
    """The conversation as chat templates take it: roles they know, and plain text."""
    return [_to_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _to_turn(message: Message, place: str) -> Turn:
    extra = message.model_extra or {}
    for name in ("tool_calls", "function_call", "audio"):
        if extra.get(name):
            raise UnsupportedParameter(f"`{name}` is not supported yet.", param=f"{place}.{name}")
    if message.role in ("tool", "function"):
        raise UnsupportedParameter(
            f"Messages of role `{message.role}` are not supported yet.", param=f"{place}.role"
        )
    if message.role not in _ROLES:
        known = ", ".join(f"`{role}`" for role in _ROLES)
        raise InvalidRequest(
            f"`role` must be one of {known}, got `{message.role[:40]}`.", param=f"{place}.role"
        )
    if message.content is None:
        raise InvalidRequest("`content` must be a text.", param=f"{place}.content")
    return {"role": _ROLES[message.role], "content": _to_text(message.content, f"{place}.content")}


def _to_text(content: str | list[ContentPart], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.type != "text":
            message = f"Content parts of type `{part.type[:40]}` are not supported; send text."
            raise UnsupportedParameter(message, param=f"{place}[{index}].type")
        if part.text is None:
            raise InvalidRequest("A text part needs its `text`.", param=f"{place}[{index}].text")
        texts.append(part.text)
    return "\n".join(texts)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What /v1/completions shall continue: texts or token ids, never both."""

    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()


def to_prompts(request: CompletionRequest) -> Prompts:
    """The prompts; one text, or one list of token ids, is one prompt."""
    texts: list[str] = []
    ids: list[tuple[int, ...]] = []
    prompt = request.prompt
    if isinstance(prompt, str):
        return Prompts(texts=(prompt,))
    if not prompt:
        raise InvalidRequest("`prompt` must not be empty.", param="prompt")
    for item in prompt:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, list):
            ids.append(tuple(item))
    if not texts and not ids:
        ids.append(tuple(item for item in prompt if isinstance(item, int)))
    return Prompts(tuple(texts), tuple(ids))


def _given(wire: Any, fields: dict[str, str]) -> dict[str, Any]:
    """The core's names and the values of those fields that the wire holds."""
    values = {core: getattr(wire, name) for name, core in fields.items()}
    return {core: value for core, value in values.items() if value is not None}


Made = TypeVar("Made")


def _within(place: str, make: Callable[[], Made]) -> Made:
    """Make a core object; its complaints name the field as the wire does, below `place` or `place` itself."""
    try:
        return make()
    except InvalidRequest as error:
        param = f"{place}{error.param}" if place.endswith(".") else place
        raise InvalidRequest(str(error), param=param) from None
