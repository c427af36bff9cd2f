"""Who says how good an answer is: any Python object of a few words, or whatever else can compare answers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ram_core.errors import RamError
from ram_core.models.source import one_line
from ram_core.progress import OnProgress, Progress
from ram_core.training.records import Message

Score = Callable[[Sequence[Message], str, str], float | None]
"""`score(messages, answer, wanted)`: how good an answer is, more is better; None if it cannot be said.

`messages` end with the turn that is answered; `wanted` is "" where the data has no wanted answer.
"""
Compare = Callable[[Sequence[Message], str, str], float | None]
"""`compare(messages, a, b)`: 1 if `a` is better, 0 if `b` is, 0.5 for a tie; None if it cannot be said."""


class JudgeError(RamError):
    """There is no such judge, or it failed; the message says on what."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a judge sees: a prompt, the answer in question, the one it is held against, the wanted one."""

    messages: tuple[Message, ...]
    answer: str
    baseline: str
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Verdicts of a judge that was asked about each pair twice, each answer once in the first place.

    `preferences` are for the answer over the baseline, in [0, 1]; None where there is no verdict.
    `num_unreadable` verdicts are missing. Of the verdicts that were no tie, `first_preferred` is the
    share that went to the first place (0.5: no bias; None: there were none), and `agreement` is the share of
    pairs with the same verdict both times.
    """

    preferences: tuple[float | None, ...]
    num_unreadable: int = 0
    first_preferred: float | None = None
    agreement: float | None = None


class Judge(Protocol):
    """What an evaluation asks of a judge. One that cannot score may compare, and the other way round."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def can_score(self) -> bool:
        """Whether `score` may be called."""

    @property
    def can_compare(self) -> bool:
        """Whether `compare` may be called."""

    def score(self, cases: Sequence[Case], on_progress: OnProgress) -> tuple[float | None, ...]:
        """How good each answer is by itself. Raises `JudgeError`."""

    def compare(self, cases: Sequence[Case], on_progress: OnProgress) -> Comparisons:
        """Which of two answers is better. Raises `JudgeError`."""


class PythonJudge:
    """A judge of functions. Raises what they do as `JudgeError`, with the number of the record."""

    def __init__(self, name: str, *, score: Score | None = None, compare: Compare | None = None) -> None:
        self.name = name
        self._score = score
        self._compare = compare

    @property
    def can_score(self) -> bool:
        return self._score is not None

    @property
    def can_compare(self) -> bool:
        return self._compare is not None

    def score(self, cases: Sequence[Case], on_progress: OnProgress) -> tuple[float | None, ...]:
        assert self._score is not None
        scores = []
        for number, case in enumerate(cases, 1):
            score = self._ask(self._score, number, case.messages, case.answer, case.wanted)
            if score is not None and not math.isfinite(score):
                raise JudgeError(f"{self._on(number)}: a score must be finite, got {score!r}")
            scores.append(score)
            on_progress(Progress("scoring", number, len(cases)))
        return tuple(scores)

    def compare(self, cases: Sequence[Case], on_progress: OnProgress) -> Comparisons:
        assert self._compare is not None
        verdicts: list[tuple[float | None, float | None]] = []
        for number, case in enumerate(cases, 1):
            first = self._ask(self._compare, number, case.messages, case.answer, case.baseline)
            second = self._ask(self._compare, number, case.messages, case.baseline, case.answer)
            for value in (first, second):
                if value is not None and not 0 <= value <= 1:
                    raise JudgeError(f"{self._on(number)}: a preference must be in [0, 1], got {value!r}")
            verdicts.append((first, second))
            on_progress(Progress("comparing", number, len(cases)))
        return settle(verdicts)

    def _ask(self, function: Score | Compare, number: int, *words: object) -> float | None:
        try:
            value = function(*words)  # type: ignore[arg-type] # both take messages and two texts
        except Exception as error:  # whatever a stranger's function raises
            raise JudgeError(f"{self._on(number)}: {type(error).__name__}: {one_line(error)}") from error
        if value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise JudgeError(f"{self._on(number)}: it said {value!r}, which is no number") from None

    def _on(self, number: int) -> str:
        return f"the judge `{self.name}` failed on record {number}"


def settle(verdicts: Sequence[tuple[float | None, float | None]]) -> Comparisons:
    """Preferences of pairs that were shown in both orders, each verdict for the answer in first place.

    The first of each two was asked with the answer in first place, the second with the baseline. Verdicts
    that prefer the same answer are averaged; those that do not are a tie, and one that is missing leaves
    none.
    """
    preferences: list[float | None] = []
    num_first = num_second = num_agreed = num_pairs = 0
    for first, second in verdicts:
        for said in (first, second):
            num_first += said is not None and said > 0.5
            num_second += said is not None and said < 0.5
        if first is None or second is None:
            preferences.append(None)
            continue
        num_pairs += 1
        is_same = _sign(first) == -_sign(second)
        num_agreed += is_same
        preferences.append((first + 1 - second) / 2 if is_same else 0.5)
    num_decided = num_first + num_second
    return Comparisons(
        preferences=tuple(preferences),
        num_unreadable=sum(said is None for pair in verdicts for said in pair),
        first_preferred=num_first / num_decided if num_decided else None,
        agreement=num_agreed / num_pairs if num_pairs else None,
    )


def prefer_scores(
    scores: Sequence[float | None], baselines: Sequence[float | None]
) -> tuple[float | None, ...]:
    """Preferences of a judge that only scores: 1 for the higher score, 0.5 for equal ones."""
    pairs = zip(scores, baselines, strict=True)
    return tuple(
        None if score is None or baseline is None else (1 + _sign(score - baseline, around=0.0)) / 2
        for score, baseline in pairs
    )


def load_judge(entry_point: str) -> PythonJudge:
    """The judge at "module:attribute": a score function, or an object (or its class) with score or compare.

    Raises:
        JudgeError: there is none, or it is neither.
    """
    module_name, colon, attribute = entry_point.partition(":")
    if not colon or not module_name or not attribute:
        raise JudgeError(f"a judge is given as MODULE:ATTRIBUTE, not `{entry_point}`")
    try:
        found: object = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever a stranger's module raises
        raise JudgeError(f"no judge `{entry_point}`: {type(error).__name__}: {one_line(error)}") from error
    score, compare = getattr(made, "score", None), getattr(made, "compare", None)
    if callable(score) or callable(compare):
        return PythonJudge(
            entry_point,
            score=score if callable(score) else None,
            compare=compare if callable(compare) else None,
        )
    if callable(made):
        return PythonJudge(entry_point, score=made)
    raise JudgeError(f"no judge `{entry_point}`: it is no function, and has neither `score` nor `compare`")


def _sign(value: float, *, around: float = 0.5) -> int:
    return (value > around) - (value < around)
