"""One row's step in compiled code: propose, align, reduce; see `kernel` for how."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ram_core.resampling import kernel
from ram_core.resampling.compiled import F32, I64, Asked, Logits, Room, Told, entry, inner, made_of
from ram_core.resampling.kernel import (
    draw,
    drop,
    find_top,
    first_top,
    leave_only,
    list_top,
    score,
    spread,
    spread_aligner,
    spread_scores,
    temper,
    token_noise,
    truncate,
)
from ram_core.resampling.params import MIN_TEMPERATURE, Mode
from ram_core.resampling.threads import in_parallel

_plain = inner("contract")
_PROPOSAL, _PRODUCT = int(Mode.PROPOSAL), int(Mode.PRODUCT)
_MIN_TEMPERATURE = np.float32(MIN_TEMPERATURE)


@_plain
def _align(logits: Logits, asked: Asked, told: Told, room: Room, row: int, sum_x: float, size: int) -> bool:
    """Score the nucleus, tell what the aligner did; whether its scores stand in the buffers."""
    own = logits.aligner[logits.aligner_row[row]][:size]
    top, is_bad = find_top(own)
    told.is_bad[row] = is_bad
    if is_bad or asked.mode[row] == _PROPOSAL:
        return False
    sum_y, gain = spread_aligner(own, top, room)
    told.kl_p_q[row] = max(gain / sum_x - math.log(sum_x) + math.log(sum_y), 0.0)
    mass = room.e_x
    if asked.proposal_temperature[row] != 1:
        temper(room.x, max(asked.proposal_temperature[row], _MIN_TEMPERATURE), room.s, room.e_s)
        mass = room.e_s
    cut = truncate(mass, size, asked.proposal_top_k[row], asked.proposal_top_p[row], np.float32(0), room)
    share = np.float32(asked.mode[row] == _PRODUCT)
    top_s, in_x, in_y = score(room, mass, cut, logits.strength[row], share)
    told.aligner_mass[row] = min(in_y / sum_y, 1.0)
    is_empty = top_s == -np.inf
    told.is_fallback[row] = is_empty or told.kl_p_q[row] > asked.kl_threshold[row]
    if is_empty:
        return False
    sum_s, gain, told.ess[row] = spread_scores(top_s, share, in_x, room)
    if told.is_fallback[row]:
        return False
    told.kl_pi_p[row] = max(gain / sum_s - math.log(sum_s) + math.log(sum_x), 0.0)
    return True


@_plain
def _reduce(x: F32, e: F32, asked: Asked, told: Told, room: Room, row: int, size: int) -> None:
    """Truncate the law of scores `x` and masses `e`, draw from it, and tell its log-probabilities."""
    cut = truncate(e, size, asked.top_k[row], asked.top_p[row], asked.min_p[row], room)
    if cut[0] > 0 or cut[1] < size:
        drop(e, x, cut)
    token, log_sum = draw(e, token_noise(asked.seed[row], asked.position[row]), room.sums)
    if asked.temperature[row] < _MIN_TEMPERATURE:
        # Of what truncation left: two scores may differ by too little for it to tell them apart.
        token = first_top(x, size)
    told.token[row] = token
    told.log_prob[row] = x[token] - log_sum
    if told.top_token.shape[1]:
        values = told.top_log_prob[row]
        list_top(x, size, values, told.top_token[row])
        for i in range(len(values)):
            values[i] -= log_sum


@_plain
def _draw_row(
    logits: Logits, asked: Asked, told: Told, room: Room, row: int, eos_ids: I64, size: int
) -> None:
    """One row's step; a bad row is told and has no law."""
    own, is_aligned = logits.proposal[row][:size], logits.aligner_row[row] >= 0
    top, told.is_bad[row] = find_top(own)
    if told.is_bad[row]:
        return
    x, e_x, s, e_s = room.x, room.e_x, room.s, room.e_s
    sum_x = spread(own, top, x, e_x)
    if is_aligned and _align(logits, asked, told, room, row, sum_x, size):
        x, e_x = s, e_s
    if told.is_bad[row]:
        return
    if asked.has_eos_priority[row]:
        proposed = first_top(own, size)
        for eos_id in eos_ids:
            if eos_id == proposed:
                leave_only(x, e_x, proposed)
    temperature = asked.temperature[row]
    if temperature != 1 and temperature >= _MIN_TEMPERATURE:
        temper(x, temperature, s, e_s)
        x, e_x = s, e_s
    _reduce(x, e_x, asked, told, room, row, size)


@_plain
def _draw_part(
    logits: Logits,
    asked: Asked,
    told: Told,
    rooms: Room,
    rows: I64,
    eos_ids: I64,
    size: int,
    first: int,
    stride: int,
) -> None:
    room = Room(
        rooms.x[first],
        rooms.y[first],
        rooms.e_x[first],
        rooms.e_y[first],
        rooms.s[first],
        rooms.e_s[first],
        rooms.sums[first],
        rooms.histogram[first],
        rooms.ids[first],
    )
    for i in range(first, len(rows), stride):
        _draw_row(logits, asked, told, room, rows[i], eos_ids, size)


def _compile(key: int) -> Any:
    """`key` is what numba's cache tells versions of this code by, besides this file."""

    @entry
    def draw_rows(
        logits: Logits,
        asked: Asked,
        told: Told,
        rooms: Room,
        rows: I64,
        eos_ids: I64,
        size: int,
        num_threads: int,
    ) -> None:
        """Draw `rows`; `told` holds zeros before, `rooms` has memory for each thread."""
        assert key >= 0
        in_parallel(_draw_part, (logits, asked, told, rooms, rows, eos_ids, size), num_threads)

    return draw_rows


draw_rows = _compile(made_of(kernel))
