"""A model that says something else over pages than by itself is refused when it loads, and no other is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvPool
from ram_core.models.loading import load_model
from ram_core.models.paged import PagedModel
from tests.models import VOCAB_SIZE, save_model


def paged(directory: Path, dtype: torch.dtype = torch.float32) -> PagedModel:
    source = save_model(directory, "llama", dtype=dtype)
    model = load_model(
        str(source), device=torch.device("cpu"), dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return PagedModel(model, name="odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_forgiven_and_the_model_goes_on_over_pages(tmp_path: Path, dtype: torch.dtype) -> None:
    model = paged(tmp_path, dtype)
    check_conformance(model, VOCAB_SIZE)
    assert model.model.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 2.0)])
def test_a_small_error_in_what_the_pages_hold_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    write = KvPool.write

    def write_wrongly(pool: KvPool, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        write(pool, layer, slots, key, value * factor)

    monkeypatch.setattr(KvPool, "write", write_wrongly)
    with pytest.raises(CheckpointError, match="`odd`: a `llama` model gives other logits over paged"):
        check_conformance(paged(tmp_path, dtype), VOCAB_SIZE)


def test_a_model_that_says_nan_is_refused(tmp_path: Path) -> None:
    model = paged(tmp_path)
    next(model.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="difference nan"):
        check_conformance(model, VOCAB_SIZE)
