"""flash-attn over our pages gives what the reference gives, for what it takes; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("flash_attn")

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.conformance import check_conformance
from ram_core.models.flash_attention import FlashAttention
from ram_core.models.paged import PagedModel
from tests.exactness.test_triton_attention import CPU, KINDS, OPTIONS, Case, setting_of
from tests.gpu.test_attention_on_cuda import CUDA, LONG, LONG_PREFILL, LONG_VERIFY, TOLERANCES
from tests.models import VOCAB_SIZE, Family, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "softcap"])
@pytest.mark.parametrize("rows", [*KINDS.values(), LONG, LONG_VERIFY, LONG_PREFILL], ids=str)
def test_flash_attn_gives_what_the_reference_gives(rows: Any, name: str, dtype: torch.dtype) -> None:
    setting = setting_of(Case(rows, dtype, 8, 2, 64, 64, page_size=256, **OPTIONS[name]))
    tried = setting.on(CUDA, dtype)
    backend = FlashAttention(tried.batch, tried.pool)
    out = backend.attend(0, tried.query, tried.key, tried.value, tried.options)
    wanted = setting.on(CPU, torch.float32).attend_plainly()
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(out.cpu().float(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_models_say_the_same_through_flash_attn_as_by_themselves(family: Family) -> None:
    model = make_model(family, dtype=torch.bfloat16).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    check_conformance(PagedModel(model, name=family, attention="flash_attn"), VOCAB_SIZE)


def test_sinks_are_refused() -> None:
    model = make_model("gpt_oss", dtype=torch.bfloat16).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(CheckpointError, match="knows no attention sinks"):
        check_conformance(PagedModel(model, name="sinks", attention="flash_attn"), VOCAB_SIZE)
