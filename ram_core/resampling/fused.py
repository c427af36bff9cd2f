"""The step in compiled code, on the host: which rows it covers, their tensors, and the threads it runs on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ram_core.resampling.compiled import F32, I64, Asked, Logits, Room, Told
from ram_core.resampling.draws import Draws
from ram_core.resampling.kernel import BLOCK, NUM_BINS, NUM_LANES
from ram_core.resampling.logits import AlignerLogits
from ram_core.resampling.params import Mode, StepFeatures, StepParams
from ram_core.resampling.rows import draw_rows
from ram_core.resampling.telemetry import Telemetry


def covered_rows(
    aligner_logits: Sequence[AlignerLogits],
    params: StepParams,
    features: StepFeatures,
    allowed: Bool[Tensor, "batch vocab"] | None,
    bias: Float[Tensor, "batch vocab"] | None,
) -> Bool[Tensor, " batch"]:
    """The rows that need nothing but what is compiled; each is judged by its own request alone.

    Not compiled are `candidates`, several aligners in a row, negative strengths, grammars and biases.
    """
    is_covered = params.mode != Mode.CANDIDATES
    if features.has_mixtures or len(aligner_logits) > 1:
        num_terms = torch.zeros(len(is_covered) + 1, dtype=torch.float32)
        lowest = torch.zeros(len(is_covered) + 1, dtype=torch.float32)
        for term in aligner_logits:
            num_terms.index_add_(0, term.rows, torch.ones(len(term.rows), dtype=torch.float32))
            lowest[term.rows] = term.strength.minimum(lowest[term.rows])
        is_covered &= num_terms[:-1] <= 1
        is_covered &= (lowest[:-1] >= 0) | (params.mode == Mode.PROPOSAL)
    if allowed is not None:
        is_covered &= allowed.all(-1)
    if bias is not None:
        is_covered &= ~bias.any(-1)
    return is_covered


def draw_compiled(
    proposal_logits: Float[Tensor, "batch padded_vocab"],
    aligner_logits: Sequence[AlignerLogits],
    params: StepParams,
    rows: Int64[Tensor, " rows"],
    *,
    vocab_size: int,
    eos_ids: Int64[Tensor, " eos"],
    num_top: int,
) -> Draws:
    """Draw `rows` of the batch; the entries of its other rows are zeros."""
    num_rows = len(proposal_logits)
    # The aligner's padding rows belong to the row after the last.
    aligner_row = torch.full((num_rows + 1,), -1)
    strength = torch.zeros(num_rows + 1, dtype=torch.float32)
    num_before = 0
    for term in aligner_logits:
        aligner_row[term.rows] = torch.arange(num_before, num_before + len(term.rows))
        strength[term.rows] = term.strength
        num_before += len(term.rows)
    logits = Logits(
        _as_rows([proposal_logits], vocab_size),
        _as_rows([term.logits for term in aligner_logits] or [proposal_logits[:0]], vocab_size),
        aligner_row.numpy(),
        strength.numpy(),
    )
    # Contiguous, as other strides would be compiled for anew.
    asked = Asked(*(getattr(params, name).contiguous().numpy() for name in Asked._fields))
    draws = _blank(num_rows, num_top)
    columns = {f.name: getattr(draws, f.name) for f in fields(Draws) if f.name != "telemetry"}
    columns |= {f.name: getattr(draws.telemetry, f.name) for f in fields(Telemetry)}
    told = Told(**{name: column.numpy() for name, column in columns.items()})
    _share_out(logits, asked, told, rows.numpy(), eos_ids.contiguous().numpy(), vocab_size)
    return draws


def _as_rows(logits: Sequence[Tensor], vocab_size: int) -> F32:
    """All rows in one float32 array: without a copy where there is but one such tensor."""
    if len(logits) > 1:
        logits = [torch.cat([one[:, :vocab_size].float() for one in logits])]
    array: F32 = logits[0].detach().float().contiguous().numpy()
    return array


def _blank(num_rows: int, num_top: int) -> Draws:
    def floats() -> Tensor:
        return torch.zeros(num_rows, dtype=torch.float32)

    def flags() -> Tensor:
        return torch.zeros(num_rows, dtype=torch.bool)

    return Draws(
        torch.zeros(num_rows, dtype=torch.int64),
        floats(),
        torch.zeros(num_rows, num_top, dtype=torch.int64),
        torch.zeros(num_rows, num_top, dtype=torch.float32),
        Telemetry(floats(), floats(), floats(), floats(), flags()),
        flags(),
    )


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile the step, or load it from the disk, so that no request waits for it; only the host needs it."""
    if torch.device(device).type != "cpu":
        return
    params, rows = StepParams.empty(1), torch.zeros(1, dtype=torch.int64)
    term = AlignerLogits(rows, torch.zeros(1, 2), torch.ones(1))
    draw_compiled(torch.zeros(1, 2), [term], params, rows, vocab_size=2, eos_ids=rows, num_top=1)


# Less work than this is done sooner than another thread begins.
_TOKENS_A_THREAD = 1 << 14
_own = threading.local()


def _rooms(num_rooms: int, vocab_size: int) -> Room:
    """Memory for at least so many threads; the calling thread keeps it from step to step."""
    num_blocks = -(-vocab_size // BLOCK)
    rooms: Room | None = getattr(_own, "rooms", None)
    if rooms is None or rooms.sums.shape[1] != num_blocks or len(rooms.sums) < num_rooms:
        x, y, e_x, e_y, s, e_s = np.empty((6, num_rooms, num_blocks * BLOCK), np.float32)
        sums = np.empty((num_rooms, num_blocks), np.int64)
        histogram = np.empty((num_rooms, NUM_BINS * NUM_LANES), np.int64)
        ids = np.empty((num_rooms, num_blocks * BLOCK), np.int32)
        _own.rooms = rooms = Room(x, y, e_x, e_y, s, e_s, sums, histogram, ids)
    return rooms


def _share_out(logits: Logits, asked: Asked, told: Told, rows: I64, eos_ids: I64, vocab_size: int) -> None:
    """Draw the rows on as many threads as torch has, this one among them."""
    worthwhile = len(rows) * vocab_size // _TOKENS_A_THREAD
    num_threads = max(min(torch.get_num_threads(), len(rows), worthwhile), 1)
    rooms = _rooms(num_threads, vocab_size)
    draw_rows(logits, asked, told, rooms, rows, eos_ids, vocab_size, num_threads)
