"""A model that says something else over pages than by itself is refused when it loads, and no other is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME, AttentionOptions, PagedAttention
from ram_core.models.conformance import check_conformance
from ram_core.models.kv import KvPool
from ram_core.models.loading import load_model, unsupported_reason
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from tests.models import FAMILIES, VOCAB_SIZE, Family, save_model


def paged(directory: Path, dtype: torch.dtype = torch.float32, family: Family = "llama") -> PagedModel:
    source = save_model(directory, family, dtype=dtype)
    model = load_model(
        str(source), device=torch.device("cpu"), dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return PagedModel(model, name="odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_forgiven_and_the_model_goes_on_over_pages(
    tmp_path: Path, dtype: torch.dtype, family: Family
) -> None:
    model = paged(tmp_path, dtype, family)
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


# Caps, sinks in all or in some layers, and layers whose heads differ in number and size.
OTHERS: dict[str, dict[str, Any]] = {
    "vaultgemma": {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "granite_swa": {},
    "granitemoe_swa": {},
    "flint": {},
    "mimo_v2_flash": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_with_caps_and_sinks_say_the_same_over_pages(family: str) -> None:
    config = CONFIG_MAPPING[family](
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **OTHERS[family],
    )
    assert unsupported_reason(config) is None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0.0, 2.0 if "sinks" in name else 0.4)
    check_conformance(PagedModel(model, name=family), VOCAB_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "name"), [("gemma2", "softcap"), ("gpt_oss", "sinks"), ("gpt_oss", "window")]
)
def test_attention_that_ignores_an_option_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family, name: str, dtype: torch.dtype
) -> None:
    attend = PagedAttention.attend

    def attend_plainly(
        backend: PagedAttention,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        return attend(backend, layer, query, key, value, replace(options, **{name: None}))

    monkeypatch.setattr(PagedAttention, "attend", attend_plainly)
    with pytest.raises(CheckpointError, match=f"a `{family}` model gives other logits over paged"):
        check_conformance(paged(tmp_path, dtype, family), VOCAB_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_place_in_eight_may_be_far_off_in_16_bits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = paged(tmp_path, dtype)
    forward = model.forward
    places = iter([1, 0, 0, 0])

    def sometimes_wrong(batch: PackedBatch, pool: KvPool) -> Tensor:
        logits = forward(batch, pool)
        logits[: next(places)] *= -1
        return logits

    monkeypatch.setattr(model, "forward", sometimes_wrong)
    if dtype == torch.bfloat16:
        check_conformance(model, VOCAB_SIZE)
    else:
        with pytest.raises(CheckpointError, match="gives other logits"):
            check_conformance(model, VOCAB_SIZE)


def test_a_model_that_says_nan_is_refused(tmp_path: Path) -> None:
    model = paged(tmp_path)
    next(model.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="difference nan"):
        check_conformance(model, VOCAB_SIZE)
