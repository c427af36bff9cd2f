"""Events that come several at a time: what one look at them tells, and in which order."""

from __future__ import annotations

import asyncio

import pytest

from ram_core.engine.messages import Event, FailedEvent, Request, StartedEvent, StepTelemetry
from ram_core.errors import EngineUnavailable, NonFiniteLogits
from ram_core.params import SamplingParams
from server.generation import Delta, Generation
from server.metrics import Meter, Metrics
from tests.http.standin import TOKENIZER, ids_of, say


class Bursts:
    """A stream that hands on what is in each list at once; also the engine that it comes from."""

    def __init__(self, *bursts: list[Event]) -> None:
        self.bursts = list(bursts)
        self.cancelled: list[int | None] = []

    def submit(self, _: Request) -> Bursts:
        return self

    async def __aenter__(self) -> Bursts:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()

    async def take(self) -> list[Event]:
        return self.bursts.pop(0) if self.bursts else []

    def cancel(self, index: int | None = None) -> None:
        self.cancelled.append(index)


def looks(request: Request, stream: Bursts) -> list[list[Delta] | Exception]:
    """What each look told; the last one may have failed."""

    async def look() -> list[list[Delta] | Exception]:
        told: list[list[Delta] | Exception] = []
        meter = Meter(Metrics("big"), ("identity", ""), 0.0)
        async with Generation(stream, TOKENIZER, [request], meter) as generation:  # type: ignore[arg-type]
            try:
                while deltas := await generation.take():
                    told.append(deltas)
            except Exception as error:
                told.append(error)
        return told

    return asyncio.run(look())


def texts(look: list[Delta] | Exception) -> list[str]:
    assert not isinstance(look, Exception)
    return [delta.text for delta in look]


REQUEST = Request("r", (1, 2))


def test_tokens_that_come_together_are_told_together_and_in_order():
    first, *others = say(REQUEST, "Hello, dog!", finish="length")
    told = looks(REQUEST, Bursts([StartedEvent("r", 0.0)], [first], list(others)))
    assert [len(look) for look in told] == [1, len(others)]
    assert "".join(text for look in told for text in texts(look)) == "Hello, dog!"


def test_what_came_before_a_failure_is_told_before_it():
    failed = FailedEvent("r", 0, NonFiniteLogits("NaN."))
    told = looks(REQUEST, Bursts([*say(REQUEST, "dog", finish=None), failed]))
    assert "".join(texts(told[0])) == "dog"
    assert isinstance(told[1], NonFiniteLogits)
    assert len(told) == 2


def test_what_comes_behind_a_stop_string_in_one_burst_is_not_told():
    request = Request("r", (1, 2), SamplingParams(stop=("!",)), num_choices=2)
    stream = Bursts([*say(request, "a!bc", finish=None), *say(request, "d", index=1, finish="length")])
    [look] = looks(request, stream)
    assert not isinstance(look, Exception)
    said = {index: "".join(delta.text for delta in look if delta.index == index) for index in (0, 1)}
    assert said == {0: "a", 1: "d"}
    assert stream.cancelled[0] == 0


def test_a_stream_that_ends_too_early_is_a_failure():
    told = looks(REQUEST, Bursts(list(say(REQUEST, "dog", finish=None))))
    assert isinstance(told[-1], EngineUnavailable)


@pytest.mark.parametrize("text", ["dog", "dog " * 100])
def test_every_token_s_telemetry_counts_once(text):
    figures = [StepTelemetry(float(number), 0.0, 1.0, 1.0, False) for number in range(len(ids_of(text)))]
    events = [
        event.__class__(event.request_id, 0, event.token_id, 0.0, (), telemetry, event.finish_reason)
        for event, telemetry in zip(say(REQUEST, text, finish="length"), figures, strict=True)
    ]
    [*_, last] = looks(REQUEST, Bursts(list(events)))
    assert not isinstance(last, Exception)
    tally = last[-1].tally
    assert tally is not None
    assert tally.num_tokens == len(figures)
    assert tally.mean("kl_p_q") == pytest.approx((len(figures) - 1) / 2)
