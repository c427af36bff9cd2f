"""Judges: win rates and how sure they are, length taken out, both orders settled, what cannot be a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ram_core.evaluation.judges import (
    Case,
    JudgeError,
    PythonJudge,
    load_judge,
    prefer_scores,
    settle,
)
from ram_core.evaluation.preferences import control_length, mean_interval, win_rate
from ram_core.progress import ignore_progress
from ram_core.training.records import Message

QUESTION: tuple[Message, ...] = ({"role": "user", "content": "Who?"},)
CASES = [Case(QUESTION, "a long answer", "short", "wanted"), Case(QUESTION, "same", "same")]


def test_wilsons_interval_is_that_of_the_book() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    seen = win_rate([1.0] * 81 + [0.0] * 182)
    assert (seen.low, seen.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    none = win_rate([0.0] * 20)
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(0.1611, abs=5e-5))


def test_ties_count_half_and_all_wins_stay_within_one() -> None:
    assert win_rate([1.0, 0.5, 0.5, 0.0]).value == 0.5
    every = win_rate([1.0] * 10)
    assert every.high == 1.0
    assert every.low < 0.8


def test_a_mean_has_standard_errors_and_a_share_wilsons_interval() -> None:
    seen = mean_interval([1.0, 2.0, 3.0, 4.0])
    error = math.sqrt(5 / 3 / 4)
    assert (seen.value, seen.high - seen.value) == (2.5, pytest.approx(1.959964 * error))
    assert mean_interval([1.0, 0.0, 1.0]) == win_rate([1.0, 0.0, 1.0])
    assert mean_interval([7.0]).low == 7.0


def preferences_by_length(*, merit: float, num_pairs: int = 4000) -> tuple[list[float], list[float]]:
    """A model that mostly writes more, and a judge who likes length, and merit as much as said."""
    noise = np.random.default_rng(1)
    differences = noise.normal(40, 60, num_pairs)
    log_odds = merit + 3 * np.tanh(differences / differences.std())
    wins = noise.random(num_pairs) < 1 / (1 + np.exp(-log_odds))
    return wins.astype(float).tolist(), differences.tolist()


def test_a_judge_who_only_likes_length_has_a_controlled_win_rate_of_one_half() -> None:
    preferences, differences = preferences_by_length(merit=0.0)
    assert win_rate(preferences).value > 0.65
    controlled = control_length(preferences, differences)
    assert controlled.win_rate == pytest.approx(0.5, abs=0.04)
    assert controlled.length_weight == pytest.approx(3.0, abs=0.4)
    assert not controlled.is_extrapolated


def test_length_control_finds_the_merit_that_is_there() -> None:
    for merit in (-1.0, 1.0):
        controlled = control_length(*preferences_by_length(merit=merit))
        assert controlled.win_rate == pytest.approx(1 / (1 + math.exp(-merit)), abs=0.04)


def test_length_control_stays_finite_where_length_decides_everything() -> None:
    differences = [float(d) for d in range(-50, 51) if d]
    controlled = control_length([float(d > 0) for d in differences], differences)
    assert controlled.win_rate == pytest.approx(0.5, abs=1e-6)
    assert math.isfinite(controlled.length_weight)


def test_length_control_changes_nothing_at_equal_lengths() -> None:
    assert control_length([1, 0, 0.5, 1], [0, 0, 0, 0]).win_rate == pytest.approx(0.625, abs=1e-3)
    assert control_length([1.0, 1.0], [3, 5]).is_extrapolated
    with pytest.raises(ValueError, match="pair up"):
        control_length([1.0], [])


@pytest.mark.parametrize(
    ("first", "second", "preference"),
    [
        (1.0, 0.0, 1.0),  # the answer, in both places
        (0.0, 1.0, 0.0),
        (1.0, 1.0, 0.5),  # whatever came first
        (1.0, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        (0.9, 0.3, 0.8),
        (None, 0.0, None),
    ],
)
def test_verdicts_count_if_they_hold_in_both_orders(
    first: float | None, second: float | None, preference: float | None
) -> None:
    assert settle([(first, second)]).preferences == (pytest.approx(preference),)


def test_position_bias_and_unreadable_verdicts_are_told() -> None:
    told = settle([(1.0, 1.0), (1.0, 1.0), (1.0, 0.0), (None, 0.0), (0.5, 0.5)])
    assert told.num_unreadable == 1
    assert told.first_preferred == pytest.approx(5 / 7)
    assert told.agreement == pytest.approx(2 / 4)
    silent = settle([(None, None)])
    assert (silent.first_preferred, silent.agreement) == (None, None)


def test_a_judge_that_scores_prefers_the_higher_score() -> None:
    assert prefer_scores([2.0, 1.0, 1.0, None], [1.0, 2.0, 1.0, 0.0]) == (1.0, 0.0, 0.5, None)


class Longer:
    """Prefers the longer answer; scores none of them."""

    def compare(self, messages: Sequence[Message], a: str, b: str) -> float:
        return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def is_wanted(messages: Sequence[Message], answer: str, wanted: str) -> bool:
    assert messages[-1]["content"] == "Who?"
    return answer == wanted


NOT_A_JUDGE = 7


def test_functions_classes_and_objects_are_judges() -> None:
    scorer = load_judge(f"{__name__}:is_wanted")
    assert (scorer.can_score, scorer.can_compare) == (True, False)
    assert scorer.score([Case(QUESTION, "yes", "", "yes"), *CASES], ignore_progress) == (1.0, 0.0, 0.0)
    comparer = load_judge(f"{__name__}:Longer")
    assert (comparer.can_score, comparer.can_compare) == (False, True)
    assert comparer.compare(CASES, ignore_progress).preferences == (1.0, 0.5)


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("nothing", "MODULE:ATTRIBUTE"),
        ("no.such.module:judge", "No module named 'no'"),
        (f"{__name__}:missing", "has no attribute 'missing'"),
        (f"{__name__}:NOT_A_JUDGE", "neither `score` nor `compare`"),
    ],
)
def test_what_is_no_judge_is_refused(entry_point: str, reason: str) -> None:
    with pytest.raises(JudgeError, match=reason):
        load_judge(entry_point)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(ZeroDivisionError("oh"), "ZeroDivisionError: oh"), (math.nan, "finite"), ("much", "no number")],
)
def test_a_judge_that_fails_says_on_which_record(value: object, reason: str) -> None:
    def score(messages: Sequence[Message], answer: str, wanted: str) -> float:
        if answer != "same":
            return 1.0
        if isinstance(value, Exception):
            raise value
        return value  # type: ignore[return-value]

    with pytest.raises(JudgeError, match=f"`strange` failed on record 2: .*{reason}"):
        PythonJudge("strange", score=score).score(CASES, ignore_progress)


def test_preferences_beyond_one_are_refused() -> None:
    judge = PythonJudge("keen", compare=lambda messages, a, b: 1.5)
    with pytest.raises(JudgeError, match=r"record 1: a preference must be in \[0, 1\], got 1.5"):
        judge.compare(CASES, ignore_progress)
