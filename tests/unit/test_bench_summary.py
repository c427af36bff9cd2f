"""Figures against values computed by hand."""

from __future__ import annotations

import pytest

from ram_core.errors import RamError
from server.bench.plot import count_running
from server.bench.record import Failure, Record
from server.bench.run import Run
from server.bench.summary import (
    Distribution,
    Goodput,
    Objective,
    describe,
    parse_objective,
    summarise,
    summarise_models,
    summarise_schedule,
)


def record(*chunk_times_s: float, **fields) -> Record:
    """Sent at 0, ended with the last chunk, unless told otherwise."""
    ended_s = chunk_times_s[-1] if chunk_times_s else 1.0
    defaults = {"index": 0, "model": "big", "num_asked_tokens": 4, "sent_s": 0.0, "ended_s": ended_s}
    return Record(**{**defaults, "chunk_times_s": chunk_times_s, **fields})


def failed(kind: str = "HTTP 429", code: str = "", **fields) -> Record:
    return record(failure=Failure(kind, code), **fields)


def test_percentiles_by_hand():
    assert describe([40, 10, 30, 20]) == Distribution(
        4, 25, pytest.approx(25), pytest.approx(37), pytest.approx(38.5), pytest.approx(39.7), 40
    )
    assert describe([7]) == Distribution(1, 7, 7, 7, 7, 7, 7)
    assert describe([]) is None


def test_the_times_of_one_request():
    """Sent at 1.0, chunks at 1.5, 1.6, 1.8, done at 2.0; usage says five tokens."""
    one = record(1.5, 1.6, 1.8, sent_s=1.0, ended_s=2.0, output_tokens=5)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.gaps_s == pytest.approx([0.1, 0.2])
    assert one.e2e_s == pytest.approx(1.0)
    assert one.tpot_s == pytest.approx((1.0 - 0.5) / 4)


def test_without_usage_a_chunk_is_a_token_and_says_so():
    one = record(0.5, 0.6, 0.8)
    assert one.tpot_s == pytest.approx(0.3 / 2)
    assert summarise([one], 1).tokens_from == "chunks"
    told = record(0.5, 0.6, output_tokens=9)
    assert summarise([told], 1).tokens_from == "usage"
    assert summarise([one, told], 1).tokens_from == "usage and chunks"
    assert summarise([one, told], 1).output_tokens_per_s == 12


def test_a_single_token_has_no_gap_and_no_time_per_output_token():
    one = summarise([record(0.5, output_tokens=1)], 1)
    assert one.itl_s is None
    assert one.tpot_s is None
    assert one.ttft_s is not None


def test_failed_requests_enter_counts_and_nothing_else():
    """A failure after its first chunk was slow as well as failed; no percentile may know."""
    slow = record(99.0, 199.0, ended_s=200.0, output_tokens=50, failure=Failure("broken stream", "X"))
    good = record(0.1, 0.2, output_tokens=2, prompt_tokens=8)
    figures = summarise([good, slow, failed(code="rate_limit_exceeded"), failed("timeout")], 2.0)
    assert figures.num_requests == 4
    assert (figures.num_ok, figures.num_failed) == (1, 3)
    assert figures.failures == {"broken stream X": 1, "HTTP 429 rate_limit_exceeded": 1, "timeout": 1}
    alone = summarise([good], 2.0)
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s", "output_tokens_per_s", "requests_per_s"):
        assert getattr(figures, name) == getattr(alone, name)
    assert (figures.requests_per_s, figures.output_tokens_per_s, figures.total_tokens_per_s) == (0.5, 1, 5)


def test_nothing_answered_is_told_without_figures():
    figures = summarise([failed()], 1.0)
    assert figures.ttft_s is None
    assert figures.output_tokens_per_s == 0


def test_gaps_are_pooled_over_requests():
    """Every gap counts once, so long answers weigh more than in a mean of means."""
    figures = summarise([record(0.0, 0.1, 0.2, 0.3), record(0.0, 0.5)], 1)
    assert figures.itl_s.count == 4
    assert figures.itl_s.mean == pytest.approx(0.2)


def test_goodput_counts_those_that_meet_all_among_all():
    """Four requests in 2 s: one too late at first, one too slow after, one failed, one good."""
    late, slow = record(0.9, 1.0), record(0.1, 0.8)
    good = record(0.5, 0.55)
    objectives = [Objective("ttft", 0.5), Objective("itl", 0.1)]
    assert summarise([late, slow, good, failed()], 2.0, objectives).goodput == Goodput(1, 0.25, 0.5)
    assert summarise([good], 2.0).goodput is None


def test_a_limit_includes_its_own_value_and_a_missing_gap_exceeds_none():
    assert Objective("e2e", 0.5).is_met(record(0.25, 0.5))
    assert not Objective("e2e", 0.499).is_met(record(0.25, 0.5))
    assert Objective("itl", 0.001).is_met(record(0.5))
    assert Objective("tpot", 0.001).is_met(record(0.5, output_tokens=1))
    assert not Objective("tpot", 0.001).is_met(failed())


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("ttft=500ms", Objective("ttft", 0.5)),
        ("itl=0.05s", Objective("itl", 0.05)),
        (" tpot=40.5ms ", Objective("tpot", 0.0405)),
        ("e2e=5s", Objective("e2e", 5.0)),
    ],
)
def test_objectives_are_read(text, objective):
    assert parse_objective(text) == objective


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=5", "ttft=-5ms", "p99=5ms", "ttft=5m", "ttft=.5s"]
)
def test_bad_objectives_are_refused(text):
    with pytest.raises(RamError, match="An SLO is one of"):
        parse_objective(text)


def test_models_are_told_apart_over_the_whole_time():
    records = [record(0.1, 0.2, model="a"), record(0.3, 0.5, model="b"), failed(model="b")]
    by_model = summarise_models(Run(tuple(records), 0.0, 4.0, 0.1))
    assert list(by_model) == ["a", "b"]
    assert (by_model["a"].num_ok, by_model["b"].num_ok, by_model["b"].num_failed) == (1, 1, 1)
    assert by_model["b"].ttft_s.mean == pytest.approx(0.3)
    assert by_model["a"].requests_per_s == 0.25


def test_the_schedule_by_hand():
    """Planned at 0, 1, 3; sent at 0, 1.5, 3.1: lags 0, 0.5, 0.1."""
    records = [
        record(9.0, planned_s=planned_s, sent_s=sent_s)
        for planned_s, sent_s in ((0.0, 0.0), (1.0, 1.5), (3.0, 3.1))
    ]
    schedule = summarise_schedule(records, 0.7)
    assert schedule.asked_per_s == 0.7
    assert schedule.drawn_per_s == pytest.approx(2 / 3)
    assert schedule.sent_per_s == pytest.approx(2 / 3.1)
    assert (schedule.lag_s.mean, schedule.lag_s.max) == pytest.approx((0.2, 0.5))


def test_the_number_of_running_requests_over_time():
    records = [record(2.0), record(3.0, sent_s=1.0), record(4.0, sent_s=2.0)]
    assert count_running(records) == ([0.0, 1.0, 2.0, 2.0, 3.0, 4.0], [1, 2, 1, 2, 1, 0])
