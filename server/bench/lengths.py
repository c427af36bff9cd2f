"""How long prompts and answers are: a fixed number of tokens, or a law to draw it from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ram_core.errors import RamError

GRAMMAR = "N, uniform:LOW:HIGH, normal:MEAN:SD[:MAX] or lognormal:MEAN:SD[:MAX]"


@dataclass(frozen=True)
class Lengths:
    """A law of lengths in tokens; every draw is at least 1, and at most the law's maximum if it has one."""

    text: str
    _draw: Callable[[np.random.Generator], float]
    _max_tokens: float = math.inf

    def draw(self, noise: np.random.Generator) -> int:
        return round(min(max(self._draw(noise), 1.0), self._max_tokens))


def parse_lengths(text: str) -> Lengths:
    """Read `GRAMMAR`; raises `RamError` that quotes it."""
    law, *words = text.split(":") if ":" in text else ("fixed", text)
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise _refuse(text)
    match law, numbers:
        case "fixed", [length] if length >= 1 and length.is_integer():
            return Lengths(text, lambda _noise: length)
        case "uniform", [low, high] if 1 <= low <= high and low.is_integer() and high.is_integer():
            return Lengths(text, lambda noise: float(noise.integers(int(low), int(high), endpoint=True)))
        case "normal", [mean, sd, *ends] if _is_law(mean, ends):
            return Lengths(text, lambda noise: noise.normal(mean, sd), *ends)
        case "lognormal", [mean, sd, *ends] if _is_law(mean, ends):
            # The law of the length itself has this mean and deviation, not that of its logarithm.
            variance = math.log1p((sd / mean) ** 2)
            location = math.log(mean) - variance / 2
            return Lengths(text, lambda noise: noise.lognormal(location, math.sqrt(variance)), *ends)
    raise _refuse(text)


def _is_law(mean: float, ends: list[float]) -> bool:
    return mean >= 1 and len(ends) <= 1 and all(end >= 1 and end.is_integer() for end in ends)


def _refuse(text: str) -> RamError:
    return RamError(f"A length is {GRAMMAR}, in whole tokens from 1 on; got `{text}`.")
