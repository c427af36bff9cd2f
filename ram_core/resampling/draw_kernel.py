"""A row's whole step as one program of a kernel: what `step.draw_with_tensors` does in hundreds of launches.

The program reads the row's logits some twenty times, block by block; they stay in the device's cache. Weights
`exp(x - top)` stand for probabilities. The nucleus is cut where `nucleus` cuts it, by the bits of the weights
and by their sums as integers, which do not depend on the order of adding; the cut is found by halving.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ram_core.resampling.params import MIN_TEMPERATURE, Mode

# Units of weight in 1.0: the sum over any vocabulary stays far below 2**63.
_UNITS: tl.constexpr = tl.constexpr(2.0**44)
_PROPOSAL: tl.constexpr = tl.constexpr(int(Mode.PROPOSAL))
_MIN_TEMPERATURE: tl.constexpr = tl.constexpr(MIN_TEMPERATURE)
_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
_NO_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _read(logits, at, size):
    return tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _key(weight):
    # Floats that are not negative are in the order of their bits.
    return weight.to(tl.int32, bitcast=True)


@triton.jit
def _units(weight):
    return (weight * _UNITS).to(tl.int64)


@triton.jit
def _find_top(logits, size, block: tl.constexpr):
    """The largest logit, and whether any is NaN or +inf, or none is finite."""
    top = tl.full((block,), float("-inf"), tl.float32)
    odd = tl.zeros((block,), tl.int32)
    for start in range(0, size, block):
        x = _read(logits, start + tl.arange(0, block), size)
        odd |= ((x != x) | (x == float("inf"))).to(tl.int32)
        top = tl.maximum(top, x)
    largest = tl.max(top, 0)
    return largest, (tl.max(odd, 0) > 0) | (largest == float("-inf"))


@triton.jit
def _sum_up(p, q, top_p, top_q, has_q, size, block: tl.constexpr):
    """Sums of both models' weights, of the proposal's as units too, their divergence's sum, the least key."""
    sum_p = tl.zeros((block,), tl.float32)
    sum_q = tl.zeros((block,), tl.float32)
    gain = tl.zeros((block,), tl.float32)
    units = tl.zeros((block,), tl.int64)
    least = tl.full((block,), _NO_KEY, tl.int32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = _read(p, at, size) - top_p
        weight = tl.exp(x)
        sum_p += weight
        units += _units(weight)
        key = _key(weight)
        least = tl.minimum(least, tl.where(key > 0, key, _NO_KEY))
        if has_q:
            y = _read(q, at, size) - top_q
            sum_q += tl.exp(y)
            gain += tl.where(weight > 0, weight * (x - y), 0.0)
    return tl.sum(sum_p, 0), tl.sum(sum_q, 0), tl.sum(gain, 0), tl.sum(units, 0), tl.min(least, 0)


@triton.jit
def _find_cut(p, top_p, target, first, size, block: tl.constexpr):
    """The key of the last token of the nucleus, and the units of all above it.

    It lies from `first` to `last`, both of them keys of tokens; a pass halves that.
    """
    last = tl.full((), 0x3F800000, tl.int32)
    above = tl.zeros((), tl.int64)
    while first < last:
        middle = first + (last - first + 1) // 2
        units = tl.zeros((block,), tl.int64)
        least = tl.full((block,), _NO_KEY, tl.int32)
        most = tl.zeros((block,), tl.int32)
        for start in range(0, size, block):
            weight = tl.exp(_read(p, start + tl.arange(0, block), size) - top_p)
            key = _key(weight)
            is_upper = (key >= middle) & (key <= last)
            units += tl.where(is_upper, _units(weight), 0)
            least = tl.minimum(least, tl.where(is_upper, key, _NO_KEY))
            most = tl.maximum(most, tl.where(key < middle, key, 0))
        mass = above + tl.sum(units, 0)
        is_enough = mass >= target
        first = tl.where(is_enough, tl.min(least, 0), first)
        last = tl.where(is_enough, last, tl.max(most, 0))
        above = tl.where(is_enough, above, mass)
    return first, above


@triton.jit
def _find_end(p, top_p, cut, num_equal, size, block: tl.constexpr):
    """The last of the first `num_equal` tokens that have the key `cut`."""
    end = tl.full((block,), -1, tl.int32)
    seen = tl.zeros((), tl.int32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        is_equal = (_key(tl.exp(_read(p, at, size) - top_p)) == cut) & (at < size)
        rank = seen + tl.cumsum(is_equal.to(tl.int32), 0)
        end = tl.maximum(end, tl.where(is_equal & (rank <= num_equal), at, -1))
        seen += tl.sum(is_equal.to(tl.int32), 0)
    return tl.max(end, 0)


@triton.jit
def _weigh(p, q, top_p, top_q, strength, cut, end, at, size):
    """Of a block: the proposal's log-weights, the aligner's, its importance's, and which tokens are kept."""
    x = _read(p, at, size) - top_p
    y = _read(q, at, size) - top_q
    # Strength 0 is the proposal even where q is 0: 0 · -inf is no NaN here.
    log_weight = tl.where(strength == 0, 0.0, strength * y)
    key = _key(tl.exp(x))
    is_kept = (key > cut) | ((key == cut) & (at <= end))
    return x, y, log_weight, is_kept & (at < size) & (x > float("-inf"))


@triton.jit
def _look_inside(p, q, top_p, top_q, strength, cut, end, size, block: tl.constexpr):
    """In the nucleus: the best score and the best importance, and the weight that each model has there."""
    top_s = tl.full((block,), float("-inf"), tl.float32)
    top_w = tl.full((block,), float("-inf"), tl.float32)
    in_p = tl.zeros((block,), tl.float32)
    in_q = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x, y, log_weight, is_kept = _weigh(p, q, top_p, top_q, strength, cut, end, at, size)
        top_s = tl.maximum(top_s, tl.where(is_kept, x + log_weight, float("-inf")))
        top_w = tl.maximum(top_w, tl.where(is_kept, log_weight, float("-inf")))
        in_p += tl.where(is_kept, tl.exp(x), 0.0)
        in_q += tl.where(is_kept, tl.exp(y), 0.0)
    return tl.max(top_s, 0), tl.max(top_w, 0), tl.sum(in_p, 0), tl.sum(in_q, 0)


@triton.jit
def _score_sums(p, q, top_p, top_q, strength, cut, end, top_s, top_w, size, block: tl.constexpr):
    """Of scores at temperature 1: their weights' sum, their divergence's; and the effective size's two."""
    sum_s = tl.zeros((block,), tl.float32)
    gain = tl.zeros((block,), tl.float32)
    once = tl.zeros((block,), tl.float32)
    twice = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x, _y, log_weight, is_kept = _weigh(p, q, top_p, top_q, strength, cut, end, at, size)
        score = tl.where(is_kept, x + log_weight - top_s, float("-inf"))
        weight = tl.exp(score)
        sum_s += weight
        gain += tl.where(weight > 0, weight * (score - x), 0.0)
        importance = tl.exp(tl.where(is_kept, log_weight - top_w, float("-inf")))
        weighted = tl.exp(x) * importance
        once += weighted
        twice += weighted * importance
    return tl.sum(sum_s, 0), tl.sum(gain, 0), tl.sum(once, 0), tl.sum(twice, 0)


@triton.jit
def _final(p, q, top_p, top_q, strength, cut, end, is_active, top_s, temperature, at, size):
    """Of a block: scores over the temperature, 0 the best; the proposal's own where no aligner acts."""
    x, _y, log_weight, is_kept = _weigh(p, q, top_p, top_q, strength, cut, end, at, size)
    score = tl.where(is_kept, x + log_weight - top_s, float("-inf"))
    return tl.where(is_active, score, x) / temperature


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _noise(seed, position, purpose: tl.constexpr):
    """The first lane of `noise.uniform_noise`."""
    golden = tl.full((), _GOLDEN, tl.uint64)
    key = _mix(seed.to(tl.uint64) + golden)
    key = _mix((key ^ position.to(tl.uint64)) + golden)
    key = _mix((key ^ tl.full((), purpose, tl.uint64)) + golden)
    return (_mix(key + golden) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _align(p, q, top_p, top_q, sum_p, sum_q, units, least, strength, share, size, block: tl.constexpr):
    """Cut the nucleus to `share` of the mass and score it: the cut, the best score, what is told of it."""
    target = (units.to(tl.float64) * share.to(tl.float64)).to(tl.int64)
    target = tl.minimum(tl.maximum(target, 1), units)
    cut, above = _find_cut(p, top_p, target, least, size, block)
    each = tl.maximum(_units(cut.to(tl.float32, bitcast=True)), 1)
    end = _find_end(p, top_p, cut, (target - above + each - 1) // each, size, block)
    # All of them, those without any weight too.
    cut = tl.where(share >= 1, -1, cut)
    top_s, top_w, in_p, in_q = _look_inside(p, q, top_p, top_q, strength, cut, end, size, block)
    sum_s, gain, once, twice = _score_sums(p, q, top_p, top_q, strength, cut, end, top_s, top_w, size, block)
    kl_pi_p = tl.maximum(gain / sum_s - tl.log(sum_s) + tl.log(sum_p), 0.0)
    square = in_p * twice
    ess = tl.where(square > 0, tl.minimum(once * once / tl.maximum(square, 1e-38), 1.0), 0.0)
    return cut, end, top_s, kl_pi_p, ess, tl.minimum(in_q / sum_q, 1.0)


@triton.jit
def _draw(
    p,
    q,
    top_p,
    top_q,
    strength,
    cut,
    end,
    is_active,
    top_s,
    temperature,
    noise,
    size,
    block: tl.constexpr,
):
    """Temperature and draw: the token, and its log-probability."""
    is_greedy = temperature < _MIN_TEMPERATURE
    temperature = tl.where(is_greedy, 1.0, temperature)
    total = tl.zeros((block,), tl.float32)
    units = tl.zeros((block,), tl.int64)
    best_score = tl.full((block,), float("-inf"), tl.float32)
    best = tl.full((block,), _NO_KEY, tl.int32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        score = _final(p, q, top_p, top_q, strength, cut, end, is_active, top_s, temperature, at, size)
        total += tl.exp(score)
        units += _units(tl.exp(score))
        # The first of equals: a later one is not better.
        best = tl.where(score > best_score, at, best)
        best_score = tl.maximum(best_score, score)
    best = tl.where(best_score == tl.max(best_score, 0), best, _NO_KEY)
    wanted = (noise * tl.sum(units, 0).to(tl.float64)).to(tl.int64)
    before = tl.zeros((block,), tl.int32)
    running = tl.zeros((), tl.int64)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        score = _final(p, q, top_p, top_q, strength, cut, end, is_active, top_s, temperature, at, size)
        weight = _units(tl.exp(score))
        is_before = (running + tl.cumsum(weight, 0) <= wanted) & (at < size)
        before += is_before.to(tl.int32)
        running += tl.sum(weight, 0)
    token = tl.where(is_greedy, tl.min(best, 0), tl.sum(before, 0))
    token = tl.maximum(tl.minimum(token, size - 1), 0)
    score = _final(p, q, top_p, top_q, strength, cut, end, is_active, top_s, temperature, token, size)
    return token, score - tl.log(tl.sum(total, 0))


@triton.jit
def draw_rows(
    proposal,
    aligner,
    aligner_row,
    strengths,
    mode,
    temperatures,
    top_ps,
    kl_thresholds,
    seeds,
    positions,
    token_out,
    is_bad_out,
    is_fallback_out,
    floats_out,
    proposal_stride,
    aligner_stride,
    size,
    num_rows,
    purpose: tl.constexpr,
    block: tl.constexpr,
):
    """`floats_out` is [5, row]: log-probability, KL(p‖q), KL(π‖p), effective size, the aligner's mass.

    The outputs hold zeros before.
    """
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(aligner_row + row)
    has_q = own >= 0
    p = proposal + row * proposal_stride
    q = aligner + tl.maximum(own, 0) * aligner_stride
    top_p, is_bad = _find_top(p, size, block)
    top_q, is_bad_q = _find_top(q, tl.where(has_q, size, 0), block)
    is_bad |= has_q & is_bad_q
    tl.store(is_bad_out + row, is_bad.to(tl.int8))
    # A bad row has no law, and nothing is read of it any more.
    size = tl.where(is_bad, 0, size)
    sum_p, sum_q, gain, units, least = _sum_up(p, q, top_p, top_q, has_q, size, block)
    strength = tl.load(strengths + row)
    is_aligned = has_q & (tl.load(mode + row) != _PROPOSAL)
    is_active = is_aligned
    cut, end = tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    top_s = tl.full((), 0.0, tl.float32)
    if is_aligned:
        share = tl.load(top_ps + row)
        cut, end, top_s, kl_pi_p, ess, mass = _align(
            p, q, top_p, top_q, sum_p, sum_q, units, least, strength, share, size, block
        )
        kl_p_q = tl.maximum(gain / sum_p - tl.log(sum_p) + tl.log(sum_q), 0.0)
        is_active = (top_s > float("-inf")) & (kl_p_q <= tl.load(kl_thresholds + row))
        tl.store(floats_out + num_rows + row, kl_p_q)
        tl.store(floats_out + 2 * num_rows + row, tl.where(is_active, kl_pi_p, 0.0))
        tl.store(floats_out + 3 * num_rows + row, ess)
        tl.store(floats_out + 4 * num_rows + row, mass)
        tl.store(is_fallback_out + row, (is_active == 0).to(tl.int8))
    noise = _noise(tl.load(seeds + row), tl.load(positions + row), purpose)
    temperature = tl.load(temperatures + row)
    token, log_prob = _draw(
        p, q, top_p, top_q, strength, cut, end, is_active, top_s, temperature, noise, size, block
    )
    tl.store(token_out + row, token.to(tl.int64))
    tl.store(floats_out + row, log_prob)
