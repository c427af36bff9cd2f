"""A ragged batch, flat: tokens of all rows one after the other, never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
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
    host's copies, so that nobody has to ask the device; where every row has one token there is no
    `host_context_lens`, as such a forward may be recorded once and run for other contexts.
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


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """All of a packed batch but its numbers: two batches of equal layouts differ in nothing else."""

    query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    num_decode: int
    num_pages: int
    num_logits: int
    page_size: int

    @property
    def num_rows(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def has_silent_tokens(self) -> bool:
        """Whether there are tokens whose logits nobody wants."""
        return self.num_logits < self.num_tokens

    @property
    def num_numbers(self) -> int:
        """How many numbers a batch of this layout has."""
        return 3 * self.num_tokens + self.num_rows * (1 + self.num_pages) + self.num_logits

    def read(self, flat: Int64[Tensor, " number"]) -> PackedBatch:
        """The batch whose numbers are `flat`, laid out by `lay_out`; nothing is copied."""
        tokens, rows, pages = self.num_tokens, self.num_rows, self.num_rows * self.num_pages
        fields = torch.split(flat, [tokens, tokens, tokens, rows, self.num_logits, pages])
        input_ids, positions, slots, context_lens, logit_tokens, table = fields
        return PackedBatch(
            input_ids=input_ids,
            positions=positions,
            slots=slots,
            page_table=table.view(rows, self.num_pages),
            context_lens=context_lens,
            logit_tokens=logit_tokens,
            query_lens=self.query_lens,
            host_context_lens=self.host_context_lens,
            num_decode=self.num_decode,
            page_size=self.page_size,
        )


def pack(
    rows: Sequence[Row],
    *,
    page_size: int,
    device: torch.device,
    num_rows: int = 0,
    num_pages: int = 0,
) -> PackedBatch:
    """Lay rows out flat, in a single upload; see `lay_out`."""
    layout, numbers = lay_out(rows, page_size=page_size, num_rows=num_rows, num_pages=num_pages)
    return layout.read(ready_to_send(numbers, device).to(device, non_blocking=True))


def ready_to_send(numbers: NDArray[np.int64], device: torch.device) -> Int64[Tensor, " number"]:
    """Numbers in memory of the host from which `device` copies them without anybody waiting."""
    flat = torch.from_numpy(numbers)
    return flat.pin_memory() if device.type == "cuda" else flat


def lay_out(
    rows: Sequence[Row], *, page_size: int, num_rows: int = 0, num_pages: int = 0
) -> tuple[BatchLayout, NDArray[np.int64]]:
    """A batch's layout and all its numbers, one after the other.

    With `num_rows`, rows that write to the trash page and want logits are added until there are so many; the
    page table gets at least `num_pages` columns. So batches of different sizes can have the same layout.
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
    layout = BatchLayout(
        query_lens=query_lens,
        host_context_lens=context_lens if num_decode < len(rows) else (),
        num_decode=num_decode,
        num_pages=table.shape[1],
        num_logits=len(logit_tokens),
        page_size=page_size,
    )
    fields = (input_ids, positions, slots, np.array(context_lens), logit_tokens, table.reshape(-1))
    return layout, np.concatenate(fields)


_PADDING = Row(token_ids=(0,), start=0, pages=())
