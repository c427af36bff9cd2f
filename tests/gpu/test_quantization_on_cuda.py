"""Half precision and quantised weights on CUDA: near the plain ones, small, and the same on every path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.errors import CheckpointError
from ram_core.models.loading import build_skeleton, load_config
from ram_core.models.quantization import quantization_options, quantized_bytes
from tests.exactness.test_quantization import TOLERANCE, worst_shortfall
from tests.models import save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
LEAST_CAPABILITY = {"int8": (8, 0), "int4": (8, 0), "fp8": (8, 9)}
# Of all logits together, against bfloat16; four bits leave little of a net of wide noise.
RELATIVE_ERROR = {"int8": 0.15, "fp8": 0.4, "int4": 0.9}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Wide enough that no layout of four-bit weights needs padding."""
    source = save_model(tmp_path_factory.mktemp("wide"), "llama", hidden=1024, heads=8, std=0.07)
    return EngineConfig(str(source), device="cuda", dtype="bfloat16", max_batch=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_in_half_precision_every_path_draws_what_the_plain_forward_ranks_first(
    config: EngineConfig, dtype: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        config.proposal, attn_implementation="eager", dtype=getattr(torch, dtype)
    ).to(CUDA)
    assert worst_shortfall(Engine.load(replace(config, dtype=dtype)), model) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", LEAST_CAPABILITY)
@torch.inference_mode()
def test_a_quantised_proposal_is_small_near_the_plain_one_and_the_same_on_every_path(
    config: EngineConfig, kind: str
) -> None:
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY[kind]:
        pytest.skip(f"{kind} needs a newer device")
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(config.proposal, **options).to(CUDA)
    quantized = AutoModelForCausalLM.from_pretrained(
        config.proposal, **options, **quantization_options(kind, CUDA)
    )
    ids = torch.arange(200, device=CUDA).view(4, 50) + 20
    expected, got = plain(ids).logits.float(), quantized(ids).logits.float()
    assert 1e-3 < ((got - expected).norm() / expected.norm()).item() < RELATIVE_ERROR[kind]
    engine = Engine.load(replace(config, quantization=kind))
    assert worst_shortfall(engine, quantized) <= 2 * TOLERANCE["bfloat16"]
    skeleton = build_skeleton(load_config(config.proposal)).to(torch.bfloat16)
    assert engine.bank.proposal.weight_bytes == pytest.approx(quantized_bytes(skeleton, kind), rel=0.05)


def test_what_does_not_fit_is_refused_with_what_would(config: EngineConfig, tmp_path: Path) -> None:
    """By the device's real numbers, before weights are read."""
    with pytest.raises(CheckpointError, match=r"`kv_memory` 9.095 TiB > .* free beside .* lower `kv_memory`"):
        Engine.load(replace(config, kv_memory_bytes=10**13))
    lines: list[str] = []
    Engine.load(config, lines.append)
    assert any(line.split()[:2] == ["left", "free"] and line.split()[3] == "GiB" for line in lines)
