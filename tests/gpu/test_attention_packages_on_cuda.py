"""flash-attn and FlashInfer over our pages give what the reference gives, for what they take; no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.backends import choose_backend
from ram_core.models.conformance import check_conformance
from ram_core.models.paged import PagedModel
from tests.exactness.test_triton_attention import CPU, KINDS, OPTIONS, Case, setting_of
from tests.gpu.test_attention_on_cuda import CUDA, LONG, LONG_PREFILL, LONG_VERIFY, TOLERANCES
from tests.models import VOCAB_SIZE, Family, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PAGE_SIZES = {"flash_attn": 256, "flashinfer": 16}


@pytest.fixture(params=PAGE_SIZES)
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(name)
    return name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "softcap"])
@pytest.mark.parametrize("rows", [*KINDS.values(), LONG, LONG_VERIFY, LONG_PREFILL], ids=str)
def test_a_package_gives_what_the_reference_gives(
    package: str, rows: Any, name: str, dtype: torch.dtype
) -> None:
    setting = setting_of(Case(rows, dtype, 8, 2, 64, 64, page_size=PAGE_SIZES[package], **OPTIONS[name]))
    tried = setting.on(CUDA, dtype)
    backend = choose_backend(tried.batch, tried.pool, package)
    out = backend.attend(0, tried.query, tried.key, tried.value, tried.options)
    wanted = setting.on(CPU, torch.float32).attend_plainly()
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(out.cpu().float(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_models_say_the_same_through_flash_attn_as_by_themselves(family: Family) -> None:
    pytest.importorskip("flash_attn")
    model = make_model(family, dtype=torch.bfloat16).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    check_conformance(PagedModel(model, name=family, attention="flash_attn"), VOCAB_SIZE)


def test_sinks_are_refused(package: str) -> None:
    model = make_model("gpt_oss", dtype=torch.bfloat16).to(CUDA)
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(CheckpointError, match="knows no attention sinks"):
        check_conformance(PagedModel(model, name="sinks", attention=package), VOCAB_SIZE)
