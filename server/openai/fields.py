"""Fields that we do not honour: OpenAI's are refused unless they ask for nothing, all others are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from server.openai.errors import UnsupportedParameter
from server.openai.schema import ChatRequest, CompletionRequest, GenerationRequest


def _known(*kinds: Any) -> frozenset[str]:
    return frozenset().union(*(kind.__required_keys__ | kind.__optional_keys__ for kind in kinds))


# Taken from OpenAI's own package, so that a field it learns tomorrow is refused, not silently dropped.
OPENAI_FIELDS: dict[type[GenerationRequest], frozenset[str]] = {
    ChatRequest: _known(
        chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming
    ),
    CompletionRequest: _known(
        completion_params.CompletionCreateParamsNonStreaming,
        completion_params.CompletionCreateParamsStreaming,
    ),
}

_ANNOTATIONS = frozenset(
    {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)
"""They describe a request and change nothing about its answer."""


def _is_zero(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and value == 0


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(other) and value == other for other in values)


_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "best_of": _one_of(1),
    "echo": _one_of(False),
    "frequency_penalty": _is_zero,
    "function_call": _one_of("none", "auto"),
    "functions": _one_of([]),
    "logit_bias": _one_of({}),
    "modalities": _one_of(["text"]),
    "parallel_tool_calls": _one_of(True, False),
    "presence_penalty": _is_zero,
    "reasoning_effort": _one_of("none"),
    "response_format": _one_of({"type": "text"}),
    "service_tier": _one_of("auto", "default"),
    "store": _one_of(False),
    "suffix": _one_of(""),
    "tool_choice": _one_of("none", "auto"),
    "tools": _one_of([]),
    "verbosity": _one_of("medium"),
}
"""Values that ask for what happens anyway. Tools can be chosen automatically where there are none."""


def check_fields(request: GenerationRequest) -> None:
    """Refuse what OpenAI's API knows and we do not honour."""
    for name, value in (request.model_extra or {}).items():
        if name not in OPENAI_FIELDS[type(request)] or name in _ANNOTATIONS or value is None:
            continue
        is_neutral = _NEUTRAL.get(name)
        if is_neutral is None or not is_neutral(value):
            raise UnsupportedParameter(f"`{name}` is not supported yet.", param=name)


def unknown_fields(request: GenerationRequest) -> Iterator[str]:
    """Names of the fields that nobody knows, not even OpenAI."""
    for name in request.model_extra or {}:
        if name not in OPENAI_FIELDS[type(request)]:
            yield name
