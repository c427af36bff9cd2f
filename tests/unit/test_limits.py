"""What can never be served is told before it is queued: each limit, and one token on either side of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ram_core.engine.limits import EngineLimits
from ram_core.engine.messages import Request
from ram_core.errors import ContextLengthExceeded, InvalidRequest, UnknownModel
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams

LIMITS = EngineLimits(
    vocab_size=100,
    max_model_len=32,
    page_size=4,
    num_pages=8,
    pools={"polite": "small", "terse": "small", "safe": "large"},
)


def ask(prompt: int, max_tokens: int = 0, *aligners: str) -> Request:
    terms = tuple(AlignerTerm(name) for name in aligners)
    return Request("a", (5,) * prompt, SamplingParams(max_tokens=max_tokens), AlignmentParams(terms))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 0), (31, 0), (31, 1), (20, 12), (1, 31)])
def test_what_fits_the_context_to_the_last_token_is_taken(prompt: int, max_tokens: int) -> None:
    LIMITS.check(ask(prompt, max_tokens))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(32, 0), (32, 1), (20, 13), (1, 32)])
def test_one_token_more_is_refused(prompt: int, max_tokens: int) -> None:
    with pytest.raises(ContextLengthExceeded, match="holds 32 tokens"):
        LIMITS.check(ask(prompt, max_tokens))


def test_an_answer_is_as_long_as_asked_for_or_as_the_context_holds() -> None:
    assert LIMITS.max_tokens(ask(20, 3)) == 3
    assert LIMITS.max_tokens(ask(20)) == 12


@pytest.mark.parametrize("prompt_ids", [(), (100,), (5, -1), (5, 100, 5)])
def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused(prompt_ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.check(Request("a", prompt_ids))
    assert caught.value.param == "prompt"
    LIMITS.check(Request("a", (0, 99)))


def test_an_aligner_that_nobody_registered_is_named() -> None:
    with pytest.raises(UnknownModel, match="`nobody`"):
        LIMITS.check(ask(5, 5, "polite", "nobody"))


def test_aligners_of_one_pool_share_its_pages_and_those_of_another_do_not() -> None:
    LIMITS.check(ask(10, 22, "polite", "safe"))
    LIMITS.check(ask(10, 6, "polite", "terse"))
    with pytest.raises(InvalidRequest, match="17 tokens need 10 pages") as caught:
        LIMITS.check(ask(10, 7, "polite", "terse"))
    assert caught.value.param == "aligners"


def test_a_prompt_that_leaves_no_room_for_pages_is_refused_without_an_aligner_too() -> None:
    with pytest.raises(InvalidRequest, match="need 3 pages"):
        replace(LIMITS, num_pages=2).check(ask(9, 1))
