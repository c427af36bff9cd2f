"""A ragged batch, flat: tokens of all rows one after the other, never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

TRASH_PAGE = 0
"""The page that padding reads and writes; no sequence ever owns it."""


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens that one sequence contributes to a forward.

    `token_ids` stand at positions `start`, `start + 1`, …; everything before is in the KV pages already.
    `pages` are the sequence's pages in order and hold at least `start + len(token_ids)` tokens.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    wants_logits: bool = True


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of a forward, packed. The first `num_decode` rows have one token each.

    `slots` says where each token's key and value go: `page * page_size + offset`. `context_lens` counts
    the tokens of each row's sequence after this forward. `query_lens` and `host_context_lens` are the
    host's copies, so that nobody has to ask the device.
    """

    input_ids: Int64[Tensor, " token"]
    positions: Int64[Tensor, " token"]
    slots: Int64[Tensor, " token"]
    page_table: Int64[Tensor, "row page"]
    context_lens: Int64[Tensor, " row"]
    logit_tokens: Int64[Tensor, " logit"]
    query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    num_decode: int
    page_size: int


def pack(
    rows: Sequence[Row],
    *,
    page_size: int,
    device: torch.device,
    num_rows: int = 0,
    num_pages: int = 0,
) -> PackedBatch:
    """Lay rows out flat, in a single upload.

    With `num_rows`, rows that write to the trash page and want logits are added until there are so many; the
    page table gets at least `num_pages` columns. So batches of different sizes can have the same shapes.
    """
    rows = [*rows, *[_PADDING] * (num_rows - len(rows))]
    query_lens = tuple(len(row.token_ids) for row in rows)
    num_decode = next((index for index, length in enumerate(query_lens) if length != 1), len(rows))
    context_lens = tuple(row.start + n for row, n in zip(rows, query_lens, strict=True))
    used_pages = [-(-length // page_size) for length in context_lens]
    table = np.full((len(rows), max(*used_pages, num_pages)), TRASH_PAGE, dtype=np.int64)
    for index, (row, used) in enumerate(zip(rows, used_pages, strict=True)):
        held = row.pages[:used]
        table[index, : len(held)] = held

    lens = np.array(query_lens)
    ends = np.cumsum(lens)
    row_of_token = np.repeat(np.arange(len(rows)), lens)
    starts = np.array([row.start for row in rows])
    positions = np.arange(ends[-1]) - np.repeat(ends - lens, lens) + starts[row_of_token]
    slots = table[row_of_token, positions // page_size] * page_size + positions % page_size
    input_ids = np.fromiter((token for row in rows for token in row.token_ids), np.int64, int(ends[-1]))
    logit_tokens = ends[[row.wants_logits for row in rows]] - 1

    fields = (input_ids, positions, slots, np.array(context_lens), logit_tokens, table.reshape(-1))
    flat = torch.from_numpy(np.concatenate(fields))
    if device.type == "cuda":
        flat = flat.pin_memory()
    lengths = [len(field) for field in fields]
    ids, at, into, contexts, logits, pages = torch.split(flat.to(device, non_blocking=True), lengths)
    return PackedBatch(
        input_ids=ids,
        positions=at,
        slots=into,
        page_table=pages.view(table.shape),
        context_lens=contexts,
        logit_tokens=logits,
        query_lens=query_lens,
        host_context_lens=context_lens,
        num_decode=num_decode,
        page_size=page_size,
    )


_PADDING = Row(token_ids=(0,), start=0, pages=())
