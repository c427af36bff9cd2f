"""How much a tenant may ask for, on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ram_core.errors import InvalidRequest
from server.tenants.limits import (
    OPEN_ENDED_TOKENS,
    Bucket,
    Ledger,
    RequestsLimited,
    TokensLimited,
    TooManyTokens,
    Wanted,
    seconds,
)
from server.tenants.policy import Limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def wanted(prompt: int = 10, max_tokens: int | None = 20, n: int = 1, context: int = 10_000) -> Wanted:
    return Wanted((prompt,), n, max_tokens, context)


def left(ledger: Ledger, name: str) -> int:
    return int(ledger.headers()[f"x-ratelimit-remaining-{name}"])


def test_requests_are_limited_by_the_minute(clock):
    ledger = Ledger(Limits(requests_per_minute=2), 100, clock)
    for _ in range(2):
        ledger.reserve(wanted()).settle(30)
    with pytest.raises(RequestsLimited) as refused:
        ledger.reserve(wanted())
    assert refused.value.retry_after_s == pytest.approx(30)
    with pytest.raises(RequestsLimited):
        ledger.check()
    clock.now_s += refused.value.retry_after_s
    ledger.check()
    ledger.reserve(wanted())
    with pytest.raises(RequestsLimited):
        ledger.reserve(wanted())


def test_tokens_are_set_aside_and_corrected_by_what_was_used(clock):
    ledger = Ledger(Limits(tokens_per_minute=100), 100, clock)
    reservation = ledger.reserve(wanted(prompt=10, max_tokens=20, n=2))
    assert left(ledger, "tokens") == 50
    with pytest.raises(TokensLimited) as refused:
        ledger.reserve(wanted(prompt=31, max_tokens=20))
    assert refused.value.retry_after_s == pytest.approx(0.6)
    reservation.settle(12)
    assert left(ledger, "tokens") == 88
    reservation.settle(12)
    reservation.cancel()
    assert left(ledger, "tokens") == 88


def test_a_request_that_never_began_costs_nothing(clock):
    ledger = Ledger(Limits(requests_per_minute=5, tokens_per_minute=100, concurrent_requests=1), 100, clock)
    ledger.reserve(wanted()).cancel()
    assert (left(ledger, "requests"), left(ledger, "tokens")) == (5, 100)
    ledger.reserve(wanted()).settle(0)
    assert (left(ledger, "requests"), left(ledger, "tokens")) == (4, 100)


def test_a_refused_request_takes_nothing(clock):
    ledger = Ledger(Limits(requests_per_minute=5, tokens_per_minute=100, queue_share=0.5), 4, clock)
    for refusal, request in (
        (TooManyTokens, wanted(prompt=100, max_tokens=1)),
        (InvalidRequest, wanted(prompt=1, max_tokens=1, n=3)),
    ):
        with pytest.raises(refusal):
            ledger.reserve(request)
    assert (left(ledger, "requests"), left(ledger, "tokens")) == (5, 100)
    ledger.reserve(wanted(prompt=1, max_tokens=1, n=2))


def test_so_many_requests_run_at_once(clock):
    ledger = Ledger(Limits(concurrent_requests=2), 100, clock)
    running = [ledger.reserve(wanted()) for _ in range(2)]
    clock.now_s += 1e6
    with pytest.raises(RequestsLimited, match="2 concurrent requests"):
        ledger.check()
    running[0].settle(0)
    ledger.reserve(wanted())


def test_a_tenant_holds_its_share_of_the_places(clock):
    ledger = Ledger(Limits(queue_share=0.1), 40, clock)
    running = ledger.reserve(wanted(n=3))
    with pytest.raises(RequestsLimited, match="4 choices at once"):
        ledger.reserve(Wanted((1, 1), 1, 1, 100))
    ledger.reserve(wanted(n=1))
    running.settle(0)
    ledger.reserve(Wanted((1, 1, 1), 1, 1, 100))
    # Who may have them all is the engine's to refuse.
    Ledger(Limits(), 4, clock).reserve(wanted(n=5))
    # However small its share, a tenant has one place.
    Ledger(Limits(queue_share=0.1), 4, clock).reserve(wanted())


def test_a_request_without_max_tokens_owes_what_it_used_beyond_a_guess(clock):
    ledger = Ledger(Limits(tokens_per_minute=1000), 100, clock)
    running = ledger.reserve(wanted(max_tokens=None, n=2))
    assert left(ledger, "tokens") == 1000 - 10 - 2 * OPEN_ENDED_TOKENS
    running.settle(1300)
    assert left(ledger, "tokens") == 0
    with pytest.raises(TokensLimited) as refused:
        ledger.reserve(wanted())
    assert refused.value.retry_after_s == pytest.approx((300 + 30) * 60 / 1000)


def test_a_guess_shuts_nothing_out_that_may_fit(clock):
    ledger = Ledger(Limits(tokens_per_minute=100), 100, clock)
    ledger.reserve(wanted(max_tokens=None))
    assert left(ledger, "tokens") == 0
    with pytest.raises(TooManyTokens):
        ledger.reserve(wanted(prompt=101, max_tokens=None))


def test_no_more_is_set_aside_than_fits_the_context():
    assert Wanted((10, 90), 2, 50, 100).tokens() == 10 + 2 * 50 + 90 + 2 * 10
    assert Wanted((200,), 2, 50, 100).tokens() == 200


def test_changed_limits_leave_what_is_used(clock):
    ledger = Ledger(Limits(tokens_per_minute=100), 100, clock)
    running = ledger.reserve(wanted())
    ledger.configure(Limits(tokens_per_minute=50, requests_per_minute=5), 100)
    assert left(ledger, "tokens") == 20
    running.cancel()
    assert (left(ledger, "tokens"), left(ledger, "requests")) == (50, 5)
    ledger.configure(Limits(), 100)
    assert ledger.headers() == {}


def test_headers_say_when_all_will_be_back(clock):
    ledger = Ledger(Limits(requests_per_minute=60, tokens_per_minute=6000), 100, clock)
    ledger.reserve(wanted(prompt=10, max_tokens=40))
    assert ledger.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5950",
        "x-ratelimit-reset-tokens": "500ms",
    }


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0, "0ms"),
        (0.12, "120ms"),
        (0.9991, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (119.5, "2m0s"),
        (361, "6m1s"),
    ],
)
def test_durations_are_written_as_openai_does(value_s, text):
    assert seconds(value_s) == text


Steps = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=60)


@given(Steps, st.integers(1, 60))
def test_no_window_gets_more_than_a_bucket_and_what_flowed(steps, per_minute):
    """Of what is given back nothing counts as used; the rest is within the limit over every window."""
    now_s, used = 0.0, []
    bucket = Bucket(per_minute, now_s)
    for passed_s, amount, unused in steps:
        now_s += passed_s
        if bucket.wait_s(amount, now_s) == 0:
            bucket.take(amount)
            bucket.put(min(unused, amount), now_s)
            used.append((now_s, amount - min(unused, amount)))
    for first, (begin_s, _) in enumerate(used):
        total = 0
        for end_s, amount in used[first:]:
            total += amount
            assert total <= per_minute * (1 + (end_s - begin_s) / 60) + 1e-3


@given(Steps, st.integers(1, 60))
def test_who_waits_as_told_is_let_in(steps, per_minute):
    now_s = 0.0
    bucket = Bucket(per_minute, now_s)
    for passed_s, amount, _ in steps:
        now_s += passed_s
        amount = min(amount, per_minute)
        now_s += bucket.wait_s(amount, now_s)
        assert bucket.wait_s(amount, now_s) == 0
        bucket.take(amount)


def test_a_clock_that_goes_back_gives_nothing_twice():
    bucket = Bucket(60, 100.0)
    bucket.take(50)
    assert [bucket.left(now_s) for now_s in (110.0, 50.0, 110.0, 111.0)] == [20, 20, 20, 21]
