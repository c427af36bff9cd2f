"""From the wire's words to the core's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ram_core.aligners.states import AskedAligner
from ram_core.errors import InvalidRequest, RamError, UnknownModel
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from server.aligners.lease import Lease
from server.openai import errors
from server.openai.body import validate
from server.openai.convert import ModelNames, aligned, to_alignment, to_ask, to_sampling
from server.openai.errors import to_api_error
from server.openai.fields import OPENAI_FIELDS, check_fields
from server.openai.schema import ChatRequest, CompletionRequest

NAMES = ModelNames("big", ("polite", "terse"))

# For every field of the core: the wire's words, and the value that they must become.
SAMPLING_WORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({"temperature": 0.5}, 0.5),
    "top_p": ({"top_p": 0.5}, 0.5),
    "top_k": ({"top_k": 5}, 5),
    "min_p": ({"min_p": 0.5}, 0.5),
    "seed": ({"seed": -(2**63)}, -(2**63)),
    "max_tokens": ({"max_tokens": 5}, 5),
    "stop": ({"stop": ["a", "b"]}, ("a", "b")),
    "stop_token_ids": ({"stop_token_ids": [1, 2**63, 2, -(10**30)]}, (1, 2)),
    "ignore_eos": ({"ignore_eos": True}, True),
    "num_top_log_probs": ({"logprobs": True, "top_logprobs": 5}, 5),
}
ALIGNMENT_WORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "terms": ({"aligner": "polite", "strength": 2}, (AlignerTerm("polite@1", 2.0),)),
    "resampling": ({"resampling": "nucleus"}, Resampling.NUCLEUS),
    "num_candidates": ({"candidates": 5}, 5),
    "proposal_temperature": ({"proposal_temperature": 0.5}, 0.5),
    "proposal_top_p": ({"proposal_top_p": 0.5}, 0.5),
    "proposal_top_k": ({"proposal_top_k": 5}, 5),
    "kl_threshold": ({"kl_threshold": -1}, -1.0),
    "eos_priority": ({"eos_priority": True}, True),
}


def chat(**fields: Any) -> ChatRequest:
    return validate(ChatRequest, {"messages": [{"role": "user", "content": "Hi"}], **fields})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_every_sampling_parameter_can_be_reached_from_the_wire(field):
    words, value = SAMPLING_WORDS[field]
    assert getattr(to_sampling(chat(**words)), field) == value
    assert getattr(SamplingParams(), field) != value


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AlignmentParams)])
def test_every_alignment_parameter_can_be_reached_from_the_wire(field):
    words, value = ALIGNMENT_WORDS[field]
    ask = to_ask(chat(alignment=words), NAMES)
    lease = Lease(terms=tuple(AlignerTerm(f"{asked.name}@1", asked.strength) for asked in ask.aligners))
    assert getattr(aligned(ask, lease), field) == value
    assert getattr(AlignmentParams(), field) != value


def test_the_wire_has_no_defaults():
    ask = to_ask(chat(), NAMES)
    assert ask.sampling == SamplingParams()
    assert ask.alignment == AlignmentParams()
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert to_ask(chat(**nulls), NAMES) == ask
    assert all(info.default is None for name, info in ChatRequest.model_fields.items() if name != "messages")


def test_completions_ask_for_log_probs_by_number():
    for number, (is_wanted, num_tops) in {None: (False, 0), 0: (True, 0), 3: (True, 3)}.items():
        ask = to_ask(validate(CompletionRequest, {"prompt": "a", "logprobs": number}), NAMES)
        assert (ask.wants_log_probs, ask.sampling.num_top_log_probs) == (is_wanted, num_tops)


def test_the_model_name_of_the_answer_says_who_answered():
    assert to_ask(chat(), NAMES).model == "big"
    assert to_ask(chat(model="polite"), NAMES).model == "polite"
    assert to_ask(chat(), ModelNames("big", ("polite",), "polite")).model == "polite"


def test_the_default_aligner_may_be_none():
    assert to_ask(chat(), ModelNames("big", ("polite",), "identity")).alignment.is_identity


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_field_of_openais_is_honoured_or_refused(kind):
    """A value that nobody means must be refused in each field that we do not honour."""
    accepted, refused = set(), {}
    base = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    for name in OPENAI_FIELDS[kind] - set(kind.model_fields):
        request = kind.model_validate({**base, name: {"odd": 1}})
        try:
            check_fields(request)
            accepted.add(name)
        except errors.UnsupportedParameter as error:
            refused[name] = error.param
    assert {"logit_bias", "frequency_penalty"} <= refused.keys()
    assert all(name == param for name, param in refused.items())
    assert accepted <= {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }


def _all_kinds(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _all_kinds(child))]


def test_every_error_of_the_core_has_a_status():
    seen = {}
    for kind in _all_kinds(RamError):
        error = kind.__new__(kind)
        Exception.__init__(error, "Why.")
        error.param, error.retry_after_s = None, 1.0
        seen[kind.__name__] = to_api_error(error).status
    assert seen["InvalidRequest"] == 400
    assert seen["ContextLengthExceeded"] == 400
    assert seen["UnknownModel"] == 404
    assert seen["QueueFull"] == 429
    assert seen["NonFiniteLogits"] == 500
    assert seen["EngineUnavailable"] == 503


def test_strengths_multiply():
    wire = {
        "aligners": [{"name": "polite", "strength": 0.5}, {"name": "identity"}, {"name": "terse"}],
        "strength": -2,
    }
    asked, _, _ = to_alignment(chat(alignment=wire), NAMES)
    assert asked == (AskedAligner("polite", -1.0), AskedAligner("terse", None, -2.0))


def test_a_model_may_be_named_with_its_proposal():
    for model in ("polite", "big:polite"):
        ask = to_ask(chat(model=model), NAMES)
        assert (ask.model, ask.aligners) == (model, (AskedAligner("polite"),))
    for model in ("big:big", "big:", "small:polite", "big:rude"):
        with pytest.raises(UnknownModel):
            to_ask(chat(model=model), NAMES)


def test_what_a_request_says_is_not_overruled_by_defaults():
    lease = Lease(
        terms=(AlignerTerm("polite@1"),), resampling=Resampling.NUCLEUS, kl_threshold=0.5, num_candidates=4
    )
    silent = aligned(to_ask(chat(model="polite"), NAMES), lease)
    assert (silent.resampling, silent.kl_threshold, silent.num_candidates) == (Resampling.NUCLEUS, 0.5, 4)
    words = {"resampling": "candidates", "kl_threshold": 2.0, "candidates": 8}
    loud = aligned(to_ask(chat(model="polite", alignment=words), NAMES), lease)
    assert (loud.resampling, loud.kl_threshold, loud.num_candidates) == (Resampling.CANDIDATES, 2.0, 8)
    assert loud.terms == lease.terms
    assert aligned(to_ask(chat(), NAMES), Lease()).num_candidates == AlignmentParams().num_candidates


def test_who_sticks_to_a_version_is_the_user():
    assert to_ask(chat(), NAMES).user == ""
    assert to_ask(chat(user="u"), NAMES).user == "u"
    assert to_ask(chat(user="u", safety_identifier="s"), NAMES).user == "s"


def test_one_aligner_twice_is_refused():
    with pytest.raises(InvalidRequest) as refused:
        to_alignment(chat(alignment={"aligners": [{"name": "polite"}] * 2}), NAMES)
    assert refused.value.param == "alignment.aligners"
