"""A ragged batch laid out flat: every number of it, by hand."""

from __future__ import annotations

import torch

from ram_core.models.packing import Row, pack

CPU = torch.device("cpu")


def test_a_batch_is_laid_out_flat_and_each_token_knows_its_place() -> None:
    """Two rows that write, the first at a page's end, and two that read, one of them on with a prompt."""
    rows = [
        Row([50], start=7, pages=[5, 2, 9]),
        Row([60], start=0, pages=[3]),
        Row([70, 71, 72], start=3, pages=[8, 4], wants_logits=False),
        Row([80, 81], start=0, pages=[6]),
    ]
    batch = pack(rows, page_size=4, device=CPU)
    assert batch.input_ids.tolist() == [50, 60, 70, 71, 72, 80, 81]
    assert batch.positions.tolist() == [7, 0, 3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [2 * 4 + 3, 3 * 4, 8 * 4 + 3, 4 * 4, 4 * 4 + 1, 6 * 4, 6 * 4 + 1]
    # As wide as the longest context, not as its reserve; 0 is the page of nobody.
    assert batch.page_table.tolist() == [[5, 2], [3, 0], [8, 4], [6, 0]]
    assert batch.context_lens.tolist() == list(batch.host_context_lens) == [8, 1, 6, 2]
    assert batch.query_lens == (1, 1, 3, 2)
    assert batch.logit_tokens.tolist() == [0, 1, 6]
    assert batch.num_decode == 2


def test_rows_of_one_token_behind_longer_ones_are_read_like_these() -> None:
    batch = pack([Row([5], 2, [3]), Row([1, 2], 0, [1]), Row([3], 0, [2])], page_size=4, device=CPU)
    assert batch.num_decode == 1
    assert batch.query_lens == (1, 2, 1)
    assert batch.logit_tokens.tolist() == [0, 2, 3]


def test_a_padded_batch_has_the_shapes_of_a_larger_one() -> None:
    """Padding reads and writes the trash page, and its logits come last."""
    batch = pack([Row([50], 7, [5, 2]), Row([60], 0, [3])], page_size=4, device=CPU, num_rows=4, num_pages=3)
    assert batch.input_ids.tolist() == [50, 60, 0, 0]
    assert batch.positions.tolist() == [7, 0, 0, 0]
    assert batch.slots.tolist() == [2 * 4 + 3, 3 * 4, 0, 0]
    assert batch.page_table.tolist() == [[5, 2, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert batch.context_lens.tolist() == [8, 1, 1, 1]
    assert batch.logit_tokens.tolist() == [0, 1, 2, 3]
    assert batch.num_decode == 4
