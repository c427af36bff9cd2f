"""Attention that reads pages where they lie gives what attention over gathered pages gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ram_core.models import compiled_attention
from ram_core.models.attention import AttentionOptions, PagedAttention
from ram_core.models.compiled_attention import attend_decode, can_attend
from ram_core.models.kv import KvGeometry, KvPool, LayerShape
from ram_core.models.packing import PackedBatch, Row, pack

CPU = torch.device("cpu")
CONTEXTS = (1, 2, 7, 8, 9, 16, 17, 40, 63)
HEADS = {
    "alone": (4, 4, 16, 16),
    "grouped": (6, 2, 16, 16),
    "one shared": (5, 1, 12, 12),
    "uneven": (4, 2, 24, 9),
}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(compiled_attention, "_NUMBERS_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


class Step:
    """A layer's pool with random memory, rows of one token in shuffled pages, and their tensors."""

    def __init__(self, heads: str, page_size: int = 8, contexts: tuple[int, ...] = CONTEXTS) -> None:
        torch.manual_seed(0)
        num_heads, num_kv_heads, dim, value_dim = HEADS[heads]
        needed = [-(-context // page_size) for context in contexts]
        geometry = KvGeometry((LayerShape(num_kv_heads, dim, value_dim),), torch.float32)
        self.pool = KvPool(geometry, sum(needed) + 1, page_size, CPU)
        self.pool.keys[0].normal_()
        self.pool.values[0].normal_()
        free = (torch.randperm(sum(needed)) + 1).tolist()
        self.rows = [
            Row((0,), context - 1, [free.pop() for _ in range(num)])
            for context, num in zip(contexts, needed, strict=True)
        ]
        self.query = torch.randn(len(contexts), num_heads, dim).transpose(0, 1)
        self.key = torch.randn(len(contexts), num_kv_heads, dim).transpose(0, 1)
        self.value = torch.randn(len(contexts), num_kv_heads, value_dim).transpose(0, 1)

    def copy_of_pool(self) -> KvPool:
        pool = KvPool(self.pool.geometry, self.pool.num_pages, self.pool.page_size, CPU)
        pool.keys[0].copy_(self.pool.keys[0])
        pool.values[0].copy_(self.pool.values[0])
        return pool

    def batch(self, only: slice = slice(None), **shape: int) -> PackedBatch:
        return pack(self.rows[only], page_size=self.pool.page_size, device=CPU, **shape)

    def compiled(self, only: slice = slice(None), window: int | None = None) -> tuple[Tensor, KvPool]:
        pool = self.copy_of_pool()
        new = (each[:, only] for each in (self.query, self.key, self.value))
        return attend_decode(self.batch(only), pool, 0, *new, None, window), pool

    def gathered(self, options: AttentionOptions) -> tuple[Tensor, KvPool]:
        pool = self.copy_of_pool()
        backend = PagedAttention(self.batch(), pool)
        backend._write(0, self.key, self.value)
        return backend._decode(0, self.query, options), pool


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [1, 4, 8, 32])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
def test_it_equals_attention_over_gathered_pages(heads: str, page_size: int, window: int | None) -> None:
    step = Step(heads, page_size)
    ours, memory = step.compiled(window=window)
    plain, expected = step.gathered(AttentionOptions(window=window))
    assert (ours - plain).abs().max() < 3e-6
    assert torch.equal(memory.keys[0], expected.keys[0])
    assert torch.equal(memory.values[0], expected.values[0])


@pytest.mark.parametrize("scaling", [0.01, 3.0])
def test_the_layers_own_scaling_counts(scaling: float) -> None:
    step = Step("grouped")
    ours = attend_decode(
        step.batch(), step.copy_of_pool(), 0, step.query, step.key, step.value, scaling, None
    )
    # Larger scores are rounded to larger steps.
    assert (ours - step.gathered(AttentionOptions(scaling))[0]).abs().max() < 3e-6 * max(scaling, 1)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    step = Step("grouped")
    together, _ = step.compiled()
    for row in range(len(CONTEXTS)):
        alone, _ = step.compiled(slice(row, row + 1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_stay_in_their_row_and_out_of_memory(bad: float) -> None:
    step = Step("grouped")
    clean, _ = step.compiled()
    step.query[:, 4, 3] = step.key[:, 4, 2] = step.value[:, 4, 1] = bad
    ours, memory = step.compiled()
    assert not ours[4].isfinite().all()
    assert all(torch.equal(ours[row], clean[row]) for row in range(len(CONTEXTS)) if row != 4)
    assert memory.keys[0].isfinite().all()
    assert memory.values[0].isfinite().all()
    assert torch.equal(memory.keys[0], step.gathered(AttentionOptions())[1].keys[0])


def test_it_reads_contexts_from_the_batch_alone() -> None:
    """A recorded step is run again with other numbers in its tensors; what the host knew of it is old."""
    step = Step("grouped")
    expected, _ = step.compiled()
    batch = step.batch(num_pages=20)
    object.__setattr__(batch, "host_context_lens", (1,) * len(CONTEXTS))
    ours = attend_decode(batch, step.copy_of_pool(), 0, step.query, step.key, step.value, None, None)
    assert torch.equal(ours, expected)


def test_rows_beside_a_prompt_take_it_too_and_the_prompt_is_remembered() -> None:
    step = Step("grouped", contexts=(9, 16, 12))
    step.rows[2] = Row((0, 0, 0), 9, step.rows[2].pages)
    new = [
        torch.cat([each, torch.randn(each.shape[0], 2, each.shape[2])], 1) for each in (step.query, step.key)
    ]
    value = torch.cat([step.value, torch.randn(step.value.shape[0], 2, step.value.shape[2])], 1)
    options, results = AttentionOptions(), []
    for is_capable in (True, False):
        pool = step.copy_of_pool()
        with pytest.MonkeyPatch.context() as patch:
            if not is_capable:
                patch.setattr("ram_core.models.attention.can_attend", lambda _: False)
            results.append((PagedAttention(step.batch(), pool).attend(0, *new, value, options), pool))
    (ours, memory), (plain, expected) = results
    assert (ours - plain).abs().max() < 3e-6
    assert torch.equal(memory.keys[0], expected.keys[0])
    assert torch.equal(memory.values[0], expected.values[0])


def test_it_takes_plain_float32_numbers_only() -> None:
    assert can_attend(torch.ones(1))
    assert not can_attend(torch.ones(1, dtype=torch.bfloat16))
    assert not can_attend(FakeTensorMode().from_tensor(torch.ones(1)))
