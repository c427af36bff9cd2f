"""Attention over pages as compiled kernels: the interpreter's cases, and sizes that it has no time for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvPool
from ram_core.models.packing import Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.triton_attention import TritonAttention
from tests.exactness.test_triton_attention import (
    CASES,
    DECODE,
    KINDS,
    OPTIONS,
    VERIFY,
    Case,
    check,
    setting_of,
)
from tests.models import FAMILIES, VOCAB_SIZE, Family, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
TOLERANCES = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""As in the interpreter, but for float32, which matrix units take in two parts."""

# Llama 8B, Qwen 2.5 7B, Gemma 2, gpt-oss, DeepSeek's heads without their compression, one key for 71 heads.
REAL_SHAPES = [
    (32, 8, 128, 128),
    (28, 4, 128, 128),
    (8, 4, 256, 256),
    (64, 8, 64, 64),
    (16, 16, 192, 128),
    (71, 1, 64, 64),
]
LONG = ((999, 1), (1023, 1), (1024, 1), (0, 1), (700, 1))
LONG_VERIFY = ((900, 5), (513, 5), (64, 5))
LONG_PREFILL = ((800, 1), (0, 300), (512, 257), (130, 64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_give_what_the_reference_gives(case: Case) -> None:
    check(case, CUDA, TOLERANCES)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [LONG, LONG_VERIFY, LONG_PREFILL], ids=["decode", "verify", "prefill"])
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_heads_of_real_models_over_long_contexts(
    shape: tuple[int, int, int, int], rows: Any, options: dict[str, Any]
) -> None:
    check(Case(rows, torch.bfloat16, *shape, page_size=64, **options), CUDA, TOLERANCES)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_all_sizes_of_pages(page_size: int, dtype: torch.dtype) -> None:
    check(Case(((400, 1), (255, 1), (256, 1)), dtype, page_size=page_size, num_splits=4), CUDA, TOLERANCES)


@pytest.mark.parametrize("rows", [DECODE, VERIFY], ids=["decode", "verify"])
def test_a_captured_step_serves_other_contexts_when_replayed(rows: Any) -> None:
    case = Case(rows, num_pages=9, window=20, has_sinks=True, num_splits=4)
    captured = setting_of(case).on(CUDA, case.dtype)
    captured.attend(case.num_splits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.attend(case.num_splits)
    other = setting_of(replace(case, rows=tuple((start + 23, num_new) for start, num_new in rows)), seed=1)
    for name in ("page_table", "context_lens", "slots"):
        getattr(captured.batch, name).copy_(getattr(other.batch, name))
    for name in ("query", "key", "value"):
        getattr(captured, name).copy_(getattr(other, name))
    assert captured.options.sinks is not None
    assert other.options.sinks is not None
    captured.options.sinks.copy_(other.options.sinks)
    captured.pool.keys[0].copy_(other.pool.keys[0])
    captured.pool.values[0].copy_(other.pool.values[0])
    graph.replay()
    torch.testing.assert_close(out.cpu(), other.attend_plainly(), rtol=0, atol=TOLERANCES[torch.float32])


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_attention_never_waits_for_the_device(rows: Any) -> None:
    setting = setting_of(Case(rows)).on(CUDA, torch.bfloat16)
    setting.attend(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        setting.attend(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_say_the_same_through_the_kernels_as_by_themselves(
    family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the kernels that a model on CUDA takes without being asked."""
    calls: list[int] = []
    attend = TritonAttention.attend

    def watched(backend: TritonAttention, layer: int, *rest: Any) -> Any:
        calls.append(layer)
        return attend(backend, layer, *rest)

    monkeypatch.setattr(TritonAttention, "attend", watched)
    model = make_model(family, dtype=dtype).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    check_conformance(PagedModel(model, name=family), VOCAB_SIZE)
    assert set(calls) == {0, 1}


def test_experts_of_a_recorded_step_run_without_a_look_at_their_routing() -> None:
    model = make_model("gpt_oss", dtype=torch.float32).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    paged = PagedModel(model, name="experts")
    pool = KvPool(paged.geometry, 4, 16, CUDA)
    batch = pack([Row([5], 3, [1]), Row([6], 9, [2])], page_size=16, device=CUDA)
    wanted = paged.forward(batch, pool)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged.forward(batch, pool)
    graph.replay()
    torch.testing.assert_close(out, wanted)
