"""A step never asks the device what its numbers are: each such look would make the host wait.

Fake tensors have shapes and no numbers, so whatever branches on a number, or reads one, fails on them.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvPool
from ram_core.models.kv_watch import watched_kv
from ram_core.models.loading import load_model
from ram_core.models.packing import PackedBatch, Row, pack
from ram_core.models.paged import PagedModel
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import AlignerLogits, StepFeatures, StepParams
from ram_core.resampling.step import draw_with_tensors
from tests.models import save_model

VOCAB_SIZE = 50
CPU = torch.device("cpu")
ONE = (AlignerTerm("a"),)
ASKED = {
    "identity": (SamplingParams(), AlignmentParams()),
    "product": (SamplingParams(top_p=0.5, top_k=4, min_p=0.1), AlignmentParams(ONE)),
    "nucleus": (SamplingParams(temperature=0), AlignmentParams(ONE, resampling=Resampling.NUCLEUS)),
    "candidates": (
        SamplingParams(),
        AlignmentParams(ONE, resampling=Resampling.CANDIDATES, kl_threshold=0.1),
    ),
    "mixture": (
        SamplingParams(num_top_log_probs=5),
        AlignmentParams((*ONE, AlignerTerm("b", -0.5)), eos_priority=True, proposal_top_k=7),
    ),
}


def faked(mode: FakeTensorMode, value: Any) -> Any:
    """The same dataclass with fake tensors."""
    changes = {
        field.name: mode.from_tensor(getattr(value, field.name))
        for field in fields(value)
        if isinstance(getattr(value, field.name), torch.Tensor)
    }
    return replace(value, **changes)


@pytest.mark.parametrize("names", [[name] for name in ASKED] + [list(ASKED)], ids=str)
def test_resampling_reads_no_number(names: list[str]) -> None:
    asked = [ASKED[name] for name in names]
    num_rows = len(asked)
    rows = torch.arange(num_rows)
    term = AlignerLogits(rows, torch.randn(num_rows, VOCAB_SIZE + 6), torch.ones(num_rows))
    params = StepParams.of(asked, seeds=[1] * num_rows, positions=[2] * num_rows)
    mode = FakeTensorMode()
    fake = [faked(mode, term), faked(mode, term), faked(mode, params)]
    logits, eos_ids = (mode.from_tensor(torch.randn(num_rows, VOCAB_SIZE)), mode.from_tensor(rows[:1]))
    with mode:
        draws = draw_with_tensors(
            logits, fake[:2], fake[2], StepFeatures.of(asked), vocab_size=VOCAB_SIZE, eos_ids=eos_ids
        )
    assert draws.token.shape == (num_rows,)


def test_a_fake_tensor_tells_on_whoever_looks() -> None:
    mode = FakeTensorMode()
    number = mode.from_tensor(torch.ones(1))
    with mode, pytest.raises(DataDependentOutputException):
        bool(number > 0)
    with mode, pytest.raises(DynamicOutputShapeException):
        number[number > 0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("is_prefill", [False, True])
def test_a_forward_reads_no_number(tmp_path: Path, family: str, is_prefill: bool) -> None:
    """bfloat16, as on a device: float32 on CPU goes another way, which no device takes."""
    path = save_model(tmp_path, family)
    model = load_model(str(path), device=CPU, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME)
    paged = PagedModel(model, name=family)
    pool = KvPool(paged.geometry, 8, 4, CPU)
    rows = [Row([5], 6, [1, 2]), Row([6], 0, [3])] + [Row([7, 8, 9], 2, [4, 5])] * is_prefill
    batch: PackedBatch = pack(rows, page_size=4, device=CPU)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = faked(mode, batch)
    pool.keys = [mode.from_tensor(keys) for keys in pool.keys]
    pool.values = [mode.from_tensor(values) for values in pool.values]
    with mode, watched_kv() as watch:
        logits, is_broken = paged.forward(batch, pool), watch.is_broken
    assert logits.shape[0] == len(rows)
    assert is_broken.shape == batch.input_ids.shape
