"""Which of several weighted versions answers, always the same one for the same key.

Weighted rendezvous hashing: each version draws a number from a hash of itself and the key, and the best one
wins. Shares are exactly the weights, and if one version's weight is raised, keys move to that one only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def choose(weights: Mapping[str, float], *, salt: str, key: str) -> str:
    """One of `weights` (not empty, all positive) for a key.

    Over many keys, each version's share is its part of the sum of weights: of `n` keys, within four standard
    deviations `sqrt(n * share * (1 - share))` but for one in 15,000. Keys fall differently with another salt.
    """
    if len(weights) == 1:
        return next(iter(weights))
    return max(weights, key=lambda version: (weights[version] / _exponential(salt, version, key), version))


def _exponential(*words: str) -> float:
    """A draw from the exponential distribution of mean 1 that depends on the words alone."""
    # Lone surrogates can reach this in a user's name.
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return -math.log((number + 0.5) / 2**64)
