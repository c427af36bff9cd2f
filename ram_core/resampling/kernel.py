"""The resampling step of a row in compiled code: a dozen passes over numbers that stay in the core's cache.

`rows` computes with them what `step.draw_with_tensors` computes. Everything follows from the logits below
their maximum, `x` for the proposal and `y` for the aligner: as `log p = x - log Σ exp x`, a divergence needs
no logarithm a token.

Exact sums: whatever decides over tokens is added up as integers. A token's mass is `exp` of how far its score
lies below the best one, rounded to units of 2^-44. Telemetry is summed in float32 over blocks of 1024 tokens
and in float64 over blocks.

The nucleus without a sort: the kept tokens are a prefix of the row ordered by mass, lower ids first among
equals. Bit patterns of non-negative floats are ordered as the floats are, so a prefix is told by the bits of
its last token's value and that token's id: a `Cut`. The value is found digit by digit: masses are summed by
their leading bits, which tells in which bin the wanted sum is reached, and only the tokens of that bin are
looked at for the next digit. After three digits the value is known, and the id is that of the n-th token that
has it. A sort adds up the same integers, so it keeps the same tokens (`tests/exactness/test_nucleus.py`).
Several cuts of a row are prefixes of one order: the shortest wins.
"""

from __future__ import annotations

import math

import numpy as np

from ram_core.resampling.compiled import F32, I64, Room, inner
from ram_core.resampling.noise import Purpose

# The last token to keep: its value's bits, and its id.
Cut = tuple[int, int]

BLOCK = 1024
# Tokens that are skipped at once if none of them is among the best.
STRETCH = 128
# Sums of units stay below 2**62.
MAX_VOCAB_SIZE = 1 << 18
NUM_BINS = 1024
# Neighbours in memory go to different histograms, as an addition to one bin must wait for the last one.
NUM_LANES = 4
_UNITS = 2.0**44
_ROUNDING = 2.0**52
_ROUNDING_BITS = 0x4330000000000000
_MINUS_INF_KEY = np.int32(-0x7F800001)
_PLUS_INF_KEY = np.int32(0x7F800000)
_TOKEN = np.uint64(Purpose.TOKEN)


# Only sums may be reordered, for the vector units' sake, and that order is fixed when this is compiled.
_plain, _sums = inner("contract"), inner("contract", "reassoc")


@_plain
def exp(x: np.float32) -> np.float32:
    """`exp(x)` for x up to 0 within 2^-23 relative; 0 below -87.3, where float32 runs out of digits.

    Cody and Waite's reduction to |r| ≤ ln 2 / 2, then Cephes' polynomial: all of it vectorises.
    """
    # Adding 1.5 · 2**23 rounds to an integer, which is then the low bits of the sum.
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    scale = np.int32((np.float32(shifted).view(np.int32) << 23) + 0x3F800000)
    return np.float32(0) if x < np.float32(-87.3) else p * np.int32(scale).view(np.float32)


@_plain
def units(mass: np.float32) -> np.int64:
    """A mass in [0, 1] as a whole number of units: adding 2**52 rounds it to the low bits."""
    return np.float64(np.float64(mass) * _UNITS + _ROUNDING).view(np.int64) - _ROUNDING_BITS


@_plain
def _key(value: np.float32) -> np.int32:
    """An integer in the order of the floats; NaN lies beyond both infinities."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@_plain
def _value(key: np.int32) -> np.float32:
    return np.float32(np.int32(key ^ ((key >> 31) & 0x7FFFFFFF)).view(np.float32))


@_plain
def find_top(z: F32) -> tuple[np.float32, bool]:
    """The largest logit, and whether any is NaN or +inf, or none finite."""
    low, high = _PLUS_INF_KEY, _MINUS_INF_KEY
    for i in range(len(z)):
        key = _key(z[i])
        low, high = min(low, key), max(high, key)
    return _value(high), bool(low < _MINUS_INF_KEY or high >= _PLUS_INF_KEY or high == _MINUS_INF_KEY)


@_sums
def _exp_block(x: F32, e: F32) -> np.float32:
    total = np.float32(0)
    for i in range(BLOCK):
        e[i] = exp(x[i])
        total += e[i]
    return total


@_plain
def _spread_block(z: F32, top: np.float32, x: F32, e: F32, start: int) -> np.float32:
    own, block = z[start : start + BLOCK], x[start : start + BLOCK]
    for i in range(len(own)):
        block[i] = own[i] - top
    for i in range(len(own), BLOCK):
        block[i] = -np.inf
    return np.float32(_exp_block(block, e[start : start + BLOCK]))


@_plain
def spread(z: F32, top: np.float32, x: F32, e: F32) -> float:
    """`x = z - top`, -inf in what is beyond z, and `e = exp x`; the sum of e."""
    total = 0.0
    for start in range(0, len(x), BLOCK):
        total += _spread_block(z, top, x, e, start)
    return total


@_plain
def temper(x: F32, temperature: np.float32, into: F32, e: F32) -> None:
    """`into = x / temperature` and `e = exp` of it."""
    for i in range(len(x)):
        into[i] = x[i] / temperature
    spread(into, np.float32(0), into, e)


@_sums
def _gain_block(e: F32, a: F32, b: F32) -> np.float32:
    total = np.float32(0)
    for i in range(BLOCK):
        total += e[i] * (a[i] - b[i]) if e[i] > 0 else np.float32(0)
    return total


@_plain
def spread_aligner(z: F32, top: np.float32, room: Room) -> tuple[float, float]:
    """`spread` to y and e_y, while the block is at hand `Σ e_x (x - y)` too."""
    total, gain = 0.0, 0.0
    for start in range(0, len(room.y), BLOCK):
        b = slice(start, start + BLOCK)
        total += _spread_block(z, top, room.y, room.e_y, start)
        gain += _gain_block(room.e_x[b], room.x[b], room.y[b])
    return total, gain


@_sums
def _units_block(e: F32) -> int:
    total = 0
    for i in range(BLOCK):
        total += units(e[i])
    return total


# Which tokens to keep


@_plain
def _count(e: F32, size: int, has_units: bool, room: Room) -> int:
    """Fill the histograms of the first digit with units, or with ones; their sum."""
    histogram, total = room.histogram, 0
    for place in range(len(histogram)):
        histogram[place] = 0
    for i in range(size):
        # Masses up to 1 have ten bits here; the mask keeps whatever else inside the histogram.
        digit = (np.float32(e[i]).view(np.int32) >> 20) & (NUM_BINS - 1)
        histogram[digit * NUM_LANES + (i & (NUM_LANES - 1))] += units(e[i]) if has_units else 1
    for place in range(len(histogram)):
        total += histogram[place]
    return total


@_plain
def _find_bin(histogram: I64, lanes: int, above: int, wanted: int) -> tuple[int, int]:
    """The highest bin with which `wanted` is reached, and what lies above it."""
    for digit in range(NUM_BINS - 1, -1, -1):
        own = 0
        for lane in range(lanes):
            own += histogram[digit * lanes + lane]
        if above + own >= wanted:
            return digit, above
        above += own
    return 0, above


@_plain
def _find(e: F32, size: int, wanted: int, has_units: bool, room: Room) -> Cut:
    """The shortest prefix with a sum of `wanted`, which `_count` has just counted."""
    digit, above = _find_bin(room.histogram, NUM_LANES, 0, wanted)
    bits, ids, num = digit, room.ids, 0
    for i in range(size):
        ids[num] = i
        num += (np.float32(e[i]).view(np.int32) >> 20) == digit
    histogram = room.histogram
    for shift in range(10, -1, -10):
        for place in range(NUM_BINS):
            histogram[place] = 0
        for k in range(num):
            own = np.float32(e[ids[k]]).view(np.int32) >> shift
            histogram[own & (NUM_BINS - 1)] += units(e[ids[k]]) if has_units else 1
        digit, above = _find_bin(histogram, 1, above, wanted)
        bits = bits << 10 | digit
        num_left = 0
        for k in range(num):
            ids[num_left] = ids[k]
            num_left += (np.float32(e[ids[k]]).view(np.int32) >> shift) == bits
        num = num_left
    each = max(units(e[ids[0]]), 1) if has_units else 1
    return bits, ids[(wanted - above + each - 1) // each - 1]


@_plain
def _shorter(one: Cut, other: Cut) -> Cut:
    if one[0] != other[0]:
        return one if one[0] > other[0] else other
    return one if one[1] < other[1] else other


@_plain
def truncate(e: F32, size: int, top_k: int, top_p: np.float32, min_p: np.float32, room: Room) -> Cut:
    """What `top_k`, then `top_p` of what that left, then `min_p` leave."""
    cut = (0, size)
    if 0 < top_k < size:
        _count(e, size, False, room)
        cut = _find(e, size, top_k, False, room)
    if top_p < 1:
        total = _count(e, size, True, room)
        if cut[0]:
            total = _kept_units(e, cut)
        wanted = min(max(int(np.float64(total) * np.float64(top_p)), 1), total)
        cut = _shorter(cut, _find(e, size, wanted, True, room))
    if min_p > 0:
        cut = _shorter(cut, (np.float32(min_p).view(np.int32), size))
    return cut


@_plain
def _is_kept(e: np.float32, i: int, bits: np.int32, last: np.int32) -> bool:
    return bool(np.float32(e).view(np.int32) >= np.int32(bits + np.int32(np.int32(i) > last)))


@_plain
def _kept_units(e: F32, cut: Cut) -> int:
    total = 0
    for i in range(len(e)):
        total += units(e[i]) if _is_kept(e[i], i, np.int32(cut[0]), np.int32(cut[1])) else 0
    return total


@_plain
def drop(e: F32, x: F32, cut: Cut) -> None:
    """Take what is not kept out of the law: no mass, and a score of -inf."""
    bits, last = np.int32(cut[0]), np.int32(cut[1])
    for i in range(len(e)):
        is_kept = _is_kept(e[i], i, bits, last)
        x[i] = x[i] if is_kept else np.float32(-np.inf)
        e[i] = e[i] if is_kept else np.float32(0)


# Telemetry and scores


@_sums
def _score_block(
    x: F32, y: F32, e_x: F32, e_y: F32, mass: F32, s: F32, cut: Cut, strength: np.float32, share: np.float32
) -> tuple[np.int32, np.float32, np.float32]:
    bits, last = np.int32(cut[0]), np.int32(cut[1])
    top, in_x, in_y = _MINUS_INF_KEY, np.float32(0), np.float32(0)
    for i in range(BLOCK):
        is_kept = _is_kept(mass[i], i, bits, last) & (x[i] > np.float32(-np.inf))
        # Strength 0 is the proposal even where q is 0.
        weight = strength * y[i]
        score = share * x[i] + (weight if strength > 0 else np.float32(0))
        score = score if is_kept else np.float32(-np.inf)
        s[i] = score
        top = max(top, _key(score))
        mass_x, mass_y = e_x[i], e_y[i]
        in_x += mass_x if is_kept else np.float32(0)
        in_y += mass_y if is_kept else np.float32(0)
    return top, in_x, in_y


@_plain
def score(
    room: Room, mass: F32, cut: Cut, strength: np.float32, share: np.float32
) -> tuple[np.float32, float, float]:
    """The scores on the nucleus, -inf elsewhere; their largest, and the nucleus' part of both sums."""
    x, y, e_x, e_y, s = room.x, room.y, room.e_x, room.e_y, room.s
    top, in_x, in_y = _MINUS_INF_KEY, 0.0, 0.0
    for start in range(0, len(x), BLOCK):
        b = slice(start, start + BLOCK)
        own = (cut[0], cut[1] - start)
        found = _score_block(x[b], y[b], e_x[b], e_y[b], mass[b], s[b], own, strength, share)
        top, in_x, in_y = max(top, found[0]), in_x + found[1], in_y + found[2]
    return _value(top), in_x, in_y


@_sums
def _weigh_block(e_x: F32, e_s: F32, share: np.float32) -> tuple[np.float32, np.float32]:
    first, second = np.float32(0), np.float32(0)
    for i in range(BLOCK):
        weight = e_s[i] / e_x[i] if share > 0 else e_s[i]
        weighted = e_x[i] * weight if e_x[i] > 0 else np.float32(0)
        first += weighted
        second += weighted * weight if weighted > 0 else np.float32(0)
    return first, second


@_plain
def spread_scores(top: np.float32, share: np.float32, mass: float, room: Room) -> tuple[float, float, float]:
    """`spread` of s to e_s, with `Σ e_s (s - x)` and `telemetry.effective_sample_size`."""
    total, gain, first, second = 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(room.s), BLOCK):
        b = slice(start, start + BLOCK)
        total += _spread_block(room.s, top, room.s, room.e_s, start)
        gain += _gain_block(room.e_s[b], room.s[b], room.x[b])
        found = _weigh_block(room.e_x[b], room.e_s[b], share)
        first, second = first + found[0], second + found[1]
    # (Σ m w)² / (Σ m · Σ m w²) on the nucleus.
    size = min(first * first / (mass * second), 1.0) if second > 0 else 0.0
    return total, gain, size


@_plain
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_plain
def token_noise(seed: int, position: int) -> float:
    """`noise.uniform_noise` of a row's token."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(np.uint64(seed) + golden)
    key = _mix((key ^ np.uint64(position)) + golden)
    key = _mix((key ^ _TOKEN) + golden)
    return np.float64(_mix(key + golden) >> np.uint64(11)) * 2.0**-53


@_plain
def draw(e: F32, noise: float, sums: I64) -> tuple[int, float]:
    """The token in whose share of the line of units `noise` falls, and the logarithm of all mass."""
    total = 0
    for block in range(len(sums)):
        sums[block] = _units_block(e[block * BLOCK : (block + 1) * BLOCK])
        total += sums[block]
    wanted, block = int(noise * np.float64(total)), 0
    while wanted >= sums[block] and block < len(sums) - 1:
        wanted -= sums[block]
        block += 1
    token = block * BLOCK
    while wanted >= units(e[token]) and token < len(e) - 1:
        wanted -= units(e[token])
        token += 1
    return token, math.log(np.float64(total) / _UNITS)


@_plain
def first_top(x: F32, size: int) -> int:
    best = 0
    for i in range(size):
        if x[i] > x[best]:
            best = i
    return best


@_plain
def _is_worse(values: F32, ids: I64, one: int, other: int) -> bool:
    return bool(values[one] < values[other] or (values[one] == values[other] and ids[one] > ids[other]))


@_plain
def _sink(values: F32, ids: I64, place: int, size: int) -> None:
    """Restore the heap below `place`: its root is the worst entry, the highest id among equals."""
    while True:
        worst = place
        for child in (2 * place + 1, 2 * place + 2):
            if child < size and _is_worse(values, ids, child, worst):
                worst = child
        if worst == place:
            return
        values[place], values[worst] = values[worst], values[place]
        ids[place], ids[worst] = ids[worst], ids[place]
        place = worst


@_plain
def _largest(x: F32) -> np.float32:
    top = _MINUS_INF_KEY
    for i in range(len(x)):
        top = max(top, _key(x[i]))
    value: np.float32 = _value(top)
    return value


@_plain
def list_top(x: F32, size: int, values: F32, ids: I64) -> None:
    """The highest scores, best first, lower ids first among equals; as many as `values` has room for."""
    num = len(values)
    for i in range(num):
        values[i], ids[i] = x[i], i
    for place in range(num // 2 - 1, -1, -1):
        _sink(values, ids, place, num)
    for start in range(num, size, STRETCH):
        end = min(start + STRETCH, size)
        # Few stretches hold anything better, and the vector units find the others fast.
        if _largest(x[start:end]) > values[0]:
            for i in range(start, end):
                if x[i] > values[0]:
                    values[0], ids[0] = x[i], i
                    _sink(values, ids, 0, num)
    for last in range(num - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        ids[0], ids[last] = ids[last], ids[0]
        _sink(values, ids, 0, last)


@_plain
def leave_only(x: F32, e: F32, token: int) -> None:
    for i in range(len(x)):
        x[i], e[i] = -np.inf, 0
    x[token], e[token] = 0, 1
