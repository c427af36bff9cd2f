"""Triton's kernels against the reference, in Triton's interpreter: rows of all kinds, over pages anywhere.

The reference computes in float32, on the numbers that the kernels get. `tests/gpu` runs the same cases
compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytest.importorskip("triton")

from ram_core.models import triton_attention
from ram_core.models.attention import ATTENTION_NAME, AttentionOptions, PagedAttention
from ram_core.models.kv import KvGeometry, KvPool, LayerShape
from ram_core.models.packing import TRASH_PAGE, PackedBatch, Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.triton_attention import Blocks, TritonAttention, choose_num_splits
from tests.models import VOCAB_SIZE, Family, make_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles where there is CUDA: tests/gpu does this there"
)

CPU = torch.device("cpu")
NUM_PAGES = 96
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative and, of outputs of about 1, absolute: for 16 bits, the rounding of weights and of outputs."""


@dataclass(frozen=True)
class Case:
    """Rows as (tokens before, new tokens), and what attends to them."""

    rows: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    num_heads: int = 4
    num_kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    scaling: float | None = None
    num_splits: int = 0
    num_padded_rows: int = 0
    num_pages: int = 0


DECODE = ((0, 1), (15, 1), (16, 1), (70, 1))
VERIFY = ((30, 5), (0, 5))
MIXED_VERIFY = ((33, 1), (12, 1), (62, 3), (14, 5))
PREFILL = ((20, 1), (0, 19), (64, 9))
EVEN_PREFILL = ((3, 10), (30, 10))
KINDS = {"decode": DECODE, "verify": VERIFY, "mixed_verify": MIXED_VERIFY, "prefill": PREFILL}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 1.5, "scaling": 0.4},
    "sinks": {"has_sinks": True},
    "all": {"window": 20, "softcap": 2.0, "has_sinks": True, "scaling": 0.3},
}
SHAPES = [(3, 3, 24, 24), (6, 2, 40, 40), (7, 1, 12, 8), (17, 1, 4, 20)]
BORDERS = tuple((length - 1, 1) for length in (1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 128, 129))
CASES = [Case(rows, num_splits=1, **options) for rows in KINDS.values() for options in OPTIONS.values()]
CASES += [Case(rows, num_splits=3, **OPTIONS["all"]) for rows in KINDS.values()]
CASES += [
    Case(rows, dtype, page_size=page_size, **OPTIONS["all"])
    for dtype, page_size in zip(TOLERANCES, (256, 32, 16), strict=True)
    for rows in (DECODE, PREFILL)
]
CASES += [Case(MIXED_VERIFY, torch.float32, *shape, num_splits=2) for shape in SHAPES]
# So many heads share a key that a row takes several tiles.
CASES += [
    Case(rows, num_heads=16, num_kv_heads=1, window=12, num_splits=num_splits)
    for rows, num_splits in [(PREFILL, 1), (EVEN_PREFILL, 3)]
]
CASES += [Case(BORDERS, num_kv_heads=1, num_splits=num_splits) for num_splits in (1, 2, 8)]
CASES += [Case(BORDERS, num_kv_heads=1, window=window) for window in (1, 16, 64, 65, 500)]
CASES += [Case(DECODE, num_padded_rows=3, num_pages=9, has_sinks=True)]
CASES += [Case(VERIFY, page_size=4), Case(DECODE, page_size=7)]


@dataclass(frozen=True)
class Setting:
    """A case's numbers on a device."""

    batch: PackedBatch
    pool: KvPool
    query: Tensor
    key: Tensor
    value: Tensor
    options: AttentionOptions

    def on(self, device: torch.device, dtype: torch.dtype) -> Setting:
        """The same numbers elsewhere, or in more bits, in memory of their own."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, dtype, copy=True)

        size = self.pool.page_size
        pool = KvPool(replace(self.pool.geometry, dtype=dtype), self.pool.num_pages, size, device)
        pool.keys = [moved(keys) for keys in self.pool.keys]
        pool.values = [moved(values) for values in self.pool.values]
        tensors = ("input_ids", "positions", "slots", "page_table", "context_lens", "logit_tokens")
        copied = {name: getattr(self.batch, name).to(device, copy=True) for name in tensors}
        batch = replace(self.batch, **copied)
        options = replace(self.options, sinks=moved(self.options.sinks))
        return Setting(batch, pool, moved(self.query), moved(self.key), moved(self.value), options)

    def attend(self, num_splits: int) -> Tensor:
        backend = TritonAttention(self.batch, self.pool, num_splits)
        return backend.attend(0, self.query, self.key, self.value, self.options)

    def attend_plainly(self) -> Tensor:
        backend = PagedAttention(self.batch, self.pool)
        return backend.attend(0, self.query, self.key, self.value, self.options)


def setting_of(case: Case, seed: int = 0) -> Setting:
    """Random numbers everywhere, in pages that nobody owns too; a row's pages are in no order."""
    noise = torch.Generator().manual_seed(seed)
    geometry = KvGeometry((LayerShape(case.num_kv_heads, case.key_dim, case.value_dim),), case.dtype)
    pool = KvPool(geometry, NUM_PAGES, case.page_size, CPU)
    for memory in (*pool.keys, *pool.values):
        memory.copy_(torch.randn(memory.shape, generator=noise))
    free = (torch.randperm(NUM_PAGES - 1, generator=noise) + 1).tolist()
    rows = []
    for start, num_new in case.rows:
        num_pages = -(-(start + num_new) // case.page_size)
        rows.append(Row([0] * num_new, start, [free.pop() for _ in range(num_pages)]))
    num_rows = len(rows) + case.num_padded_rows
    batch = pack(rows, page_size=case.page_size, device=CPU, num_rows=num_rows, num_pages=case.num_pages)
    num_tokens = len(batch.input_ids)

    def draw(heads: int, dim: int) -> Tensor:
        # Heads lie within tokens, as projections leave them.
        return torch.randn(num_tokens, heads, dim, generator=noise).to(case.dtype).transpose(0, 1)

    sinks = torch.randn(case.num_heads, generator=noise).to(case.dtype) if case.has_sinks else None
    return Setting(
        batch,
        pool,
        2 * draw(case.num_heads, case.key_dim),
        draw(case.num_kv_heads, case.key_dim),
        draw(case.num_kv_heads, case.value_dim),
        AttentionOptions(case.scaling, case.window, case.softcap, sinks),
    )


def check(case: Case, device: torch.device, tolerances: dict[torch.dtype, float]) -> None:
    """Outputs and memory are the reference's; nothing is said of padding but that it writes to its page."""
    setting = setting_of(case)
    tried, reference = setting.on(device, case.dtype), setting.on(CPU, torch.float32)
    num_real = sum(num_new for _, num_new in case.rows)
    out, wanted = tried.attend(case.num_splits).cpu(), reference.attend_plainly()
    assert out.dtype == case.dtype
    assert out.shape == wanted.shape
    bound = tolerances[case.dtype]
    torch.testing.assert_close(out[:num_real].float(), wanted[:num_real], rtol=bound, atol=bound)
    for kept in ("keys", "values"):
        memory, wanted_memory = getattr(tried.pool, kept)[0], getattr(reference.pool, kept)[0]
        assert torch.equal(memory[TRASH_PAGE + 1 :].cpu().float(), wanted_memory[TRASH_PAGE + 1 :])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_what_the_reference_gives(case: Case) -> None:
    check(case, CPU, TOLERANCES)


class Recorder:
    """Stands where a kernel does and notes its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, ...]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been launched: kernel, grid, arguments."""
    noted: list[tuple[Any, ...]] = []
    for name in ("write_kv", "attend_tile", "join_splits"):
        monkeypatch.setattr(triton_attention, name, Recorder(getattr(triton_attention, name), noted))
    return noted


@pytest.mark.parametrize("rows", [DECODE, VERIFY], ids=["decode", "verify"])
def test_launches_can_be_replayed_on_other_numbers(launches: list[tuple[Any, ...]], rows: Any) -> None:
    """As a captured graph does it: the same integers and pointers, behind which all is another batch's."""
    case = Case(rows, num_pages=9, window=20, has_sinks=True, num_splits=4)
    recorded = setting_of(case)
    out = recorded.attend(case.num_splits)
    later = replace(case, rows=tuple((start + 23, num_new) for start, num_new in rows))
    other = setting_of(later, seed=1)
    for name in ("page_table", "context_lens", "slots"):
        getattr(recorded.batch, name).copy_(getattr(other.batch, name))
    for name in ("query", "key", "value"):
        getattr(recorded, name).copy_(getattr(other, name))
    recorded.options.sinks.copy_(other.options.sinks)
    recorded.pool.keys[0].copy_(other.pool.keys[0])
    recorded.pool.values[0].copy_(other.pool.values[0])
    for kernel, grid, args, kwargs in launches:
        kernel[grid](*args, **kwargs)
    assert len(launches) == 3
    torch.testing.assert_close(out, other.attend_plainly(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_a_launch_reads_no_number(launches: list[tuple[Any, ...]], rows: Any) -> None:
    """Fake tensors have none: see tests/unit/test_no_look_from_host.py."""
    setting = setting_of(Case(rows, window=20))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = setting.on(CPU, torch.bfloat16)
        out = fake.attend(0)
    assert isinstance(fake.batch.context_lens, FakeTensor)
    assert out.shape == (sum(num_new for _, num_new in rows), 4, 16)
    assert len(launches) >= 2


def test_a_batch_takes_one_launch_for_rows_of_one_token_and_one_for_all_others(
    launches: list[tuple[Any, ...]],
) -> None:
    for rows, expected in [(DECODE, 1), (VERIFY, 1), (MIXED_VERIFY, 2), (PREFILL, 2), (PREFILL[1:], 1)]:
        launches.clear()
        setting_of(Case(rows)).attend(1)
        assert sum(len(grid) == 3 for _, grid, _, _ in launches) == expected


def test_batches_of_many_shapes_take_few_kernels(launches: list[tuple[Any, ...]]) -> None:
    """Each other constant is another kernel, whose first step would wait for the compiler."""
    for length in (2, 3, 5, 8, 13, 21, 34, 55):
        setting_of(Case(((7, 1), (0, length), (3, 2)), num_pages=length)).attend(0)
    constants = {
        tuple(
            (name, kwargs[name]) for name in sorted(kwargs) if name.startswith(("block", "tile", "is", "has"))
        )
        for _, grid, _, kwargs in launches
        if len(grid) == 3
    }
    assert len(constants) == 5, "tiles of 16 lines for rows of one token, of 16 to 128 for the rest"


def test_padding_changes_nothing_and_nothing_but_the_trash_page() -> None:
    case = Case(DECODE, num_splits=2)
    bare, padded = setting_of(case), setting_of(replace(case, num_padded_rows=3, num_pages=9))
    for name in ("query", "key", "value"):
        getattr(padded, name)[:, : len(DECODE)] = getattr(bare, name)
    torch.testing.assert_close(padded.attend(2)[: len(DECODE)], bare.attend(2), rtol=0, atol=0)
    assert torch.equal(padded.pool.keys[0][1:], bare.pool.keys[0][1:])
    assert torch.isfinite(padded.attend(2)).all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_pages_before_the_window_are_not_read(num_splits: int) -> None:
    """Nor are pages behind the context: one that is not there would be a fault on a device."""
    setting = setting_of(Case(((200, 1), (150, 7)), num_pages=20, window=40, has_sinks=True))
    wanted = setting.on(CPU, torch.float32).attend_plainly()
    table = setting.batch.page_table
    for row, (first, last) in enumerate([(160, 200), (110, 156)]):
        seen = torch.arange(table.shape[1])
        is_seen = (seen >= (first + 1) // 16) & (seen <= last // 16)
        for page in table[row][~is_seen].tolist():
            setting.pool.keys[0][page] = torch.nan
            setting.pool.values[0][page] = torch.nan
    torch.testing.assert_close(setting.attend(num_splits), wanted, rtol=0, atol=3e-6)


def test_what_is_not_finite_is_written_as_zeros() -> None:
    setting = setting_of(Case(DECODE))
    setting.key[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    setting.value[1, 2, 5] = torch.nan
    reference = setting.on(CPU, torch.float32)
    setting.attend(1)
    reference.attend_plainly()
    assert torch.equal(setting.pool.keys[0], reference.pool.keys[0])
    assert torch.equal(setting.pool.values[0], reference.pool.values[0])
    assert torch.isfinite(setting.pool.keys[0]).all()


def test_splits_are_enough_for_all_cores_and_not_more_than_blocks() -> None:
    assert choose_num_splits(num_programs=8, max_blocks=1000, num_cores=132) == 32
    assert choose_num_splits(num_programs=8, max_blocks=20, num_cores=132) == 16
    assert choose_num_splits(num_programs=8 * 64, max_blocks=1000, num_cores=132) == 1
    assert choose_num_splits(num_programs=1, max_blocks=0, num_cores=132) == 1


def test_blocks_are_powers_of_two_that_fit_into_shared_memory() -> None:
    for itemsize in (2, 4):
        for dim in (8, 64, 80, 128, 192, 256, 576):
            for group in (1, 3, 7, 8, 71):
                for longest in (1, 5, 2000):
                    blocks = Blocks.of(longest, group, dim, min(dim, 512), itemsize)
                    sizes = (blocks.query, blocks.tokens, blocks.key, blocks.value)
                    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                    assert group <= blocks.tile_tokens * group <= blocks.query
                    # A float32 is held in two parts.
                    width = 8 if itemsize == 4 else itemsize
                    num_bytes = width * blocks.tokens * (blocks.key + blocks.value)
                    assert num_bytes <= 32 * 1024 or blocks.tokens == 16


def test_kernels_compile_for_cuda_and_fit_into_its_smaller_shared_memories(tmp_path: Path) -> None:
    """With the shapes of real models; 99 KiB are what a GeForce has."""
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernel_compiler"],
        env=hidden | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    compiled = json.loads(ran.stdout)
    assert {each["kernel"] for each in compiled} == {"write_kv", "attend_tile", "join_splits"}
    for each in compiled:
        assert each["shared_bytes"] <= 99 * 1024
        assert each["has_matrix_units"] == each["has_async_copies"] == (each["kernel"] == "attend_tile")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_model_says_the_same_through_the_kernels(family: Family) -> None:
    wanted = logits_of(family, "torch")
    torch.testing.assert_close(logits_of(family, "triton"), wanted, rtol=0, atol=1e-5 * wanted.std().item())


def logits_of(family: Family, attention: str) -> Tensor:
    """Of prompts in chunks beside a row of one token, then of drafts, then of single tokens."""
    model = make_model(family)
    model.set_attn_implementation(ATTENTION_NAME)
    paged = PagedModel(model, name=family, attention=attention)
    pool = KvPool(paged.geometry, 10, 16, CPU)
    ids = torch.arange(100).mul(7919).remainder(VOCAB_SIZE).tolist()
    steps = [
        [Row(ids[:1], 0, [3]), Row(ids[:12], 0, [5])],
        [Row(ids[1:2], 1, [3]), Row(ids[12:20], 12, [5, 1])],
        [Row(ids[2:5], 2, [3]), Row(ids[20:23], 20, [5, 1])],
        [Row(ids[5:6], 5, [3]), Row(ids[23:24], 23, [5, 1])],
    ]
    return torch.stack([paged.forward(pack(rows, page_size=16, device=CPU), pool) for rows in steps])
