"""What preferences come to, each in [0, 1] for one answer over another: a win rate, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z_95 = 1.959964
# In units of one pair's evidence over all: as much as a thousandth of each pair says that nothing matters.
_RIDGE = 1e-3
_NEWTON_STEPS = 50


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def win_rate(preferences: Sequence[float]) -> Interval:
    """Mean preference, so that ties count half, with Wilson's score interval.

    A tie says less about luck than a win does, so with ties the interval is wider than it need be.

    Raises:
        ValueError: there are no preferences.
    """
    if not preferences:
        raise ValueError("there are no preferences to count")
    share, count = math.fsum(preferences) / len(preferences), len(preferences)
    pull = _Z_95**2 / count
    centre = (share + pull / 2) / (1 + pull)
    half = _Z_95 * math.sqrt(share * (1 - share) / count + pull / (4 * count)) / (1 + pull)
    # Rounding must not put a share of 0 or 1 outside of its own interval.
    return Interval(share, max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of any numbers, with 1.96 standard errors to both sides; none for a single number.

    Of nothing but zeros and ones it is a share, with the interval of a win rate.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there are no values to average")
    if set(values) <= {0, 1}:
        return win_rate(values)
    mean, count = math.fsum(values) / len(values), len(values)
    square = math.fsum((value - mean) ** 2 for value in values)
    half = _Z_95 * math.sqrt(square / (count - 1) / count) if count > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True, slots=True)
class LengthControl:
    """A win rate as it would be at equal lengths, and how strongly length pulled.

    `length_weight` is in log-odds for a difference that is large beside the usual ones. With
    `is_extrapolated`, one side was the longer one throughout: the data cannot tell length from merit.
    """

    win_rate: float
    length_weight: float
    is_extrapolated: bool


def control_length(preferences: Sequence[float], length_differences: Sequence[float]) -> LengthControl:
    """The length-controlled win rate, as AlpacaEval 2 has it (arXiv 2404.04475) for one pair of models.

    A logistic regression `P(preferred) = sigmoid(merit + weight · tanh(d / s))`, with d the difference in
    length and s its standard deviation, is fitted to the preferences; the controlled win rate is
    `sigmoid(merit)`: all that is left where d = 0. AlpacaEval's term for an instruction's difficulty needs
    many models to be estimated, and is left out. A weak ridge (0.001 a pair) keeps both numbers finite.

    Raises:
        ValueError: there are no preferences, or not as many differences.
    """
    if not preferences or len(preferences) != len(length_differences):
        raise ValueError("preferences and length differences must pair up")
    wanted, differences = np.array(preferences, float), np.array(length_differences, float)
    spread = differences.std()
    pull = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    merit, weight = _fit_logistic(np.stack([np.ones_like(pull), pull], 1), wanted)
    is_one_sided = bool((differences > 0).all() or (differences < 0).all())
    return LengthControl(float(1 / (1 + np.exp(-merit))), float(weight), is_one_sided)


def _fit_logistic(features: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights of least mean cross-entropy with a ridge, by Newton's method; the loss is convex."""
    num_rows, num_weights = features.shape
    weights = np.zeros(num_weights)
    for _ in range(_NEWTON_STEPS):
        said = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (said - wanted) / num_rows + _RIDGE * weights
        curvature = (features * (said * (1 - said))[:, None]).T @ features / num_rows
        step = np.linalg.solve(curvature + _RIDGE * np.eye(num_weights), gradient)
        # Far from the solution a whole step may overshoot.
        weights -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-30))
    return weights
