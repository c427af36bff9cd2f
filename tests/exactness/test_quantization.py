"""Half precision and quantised weights: near float32, and on every path what the plain forward says."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request
from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.inspection import inspect_pair
from ram_core.models.loading import build_skeleton, load_config, load_model
from ram_core.models.packed_linear import PackedLinear
from ram_core.models.quantization import quantization_options, quantized_bytes, stored_bytes
from tests.exactness.test_engine import (
    GREEDY,
    PROMPTS,
    anew,
    cases,
    make_config,
    plain_greedy,
    plain_models,
    run_together,
)
from tests.models import make_tokenizer, save_model

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
# Of a logit, in standard deviations of all logits: how far rounding may move it from where it belongs.
TOLERANCE = {"float32": 0.0, "bfloat16": 0.03, "float16": 0.006}
# Of all logits together, against those of the float32 weights; these tiny models are wide of the mean.
RELATIVE_ERROR = {"bfloat16": 0.06, "float16": 0.01, "int8": 0.08}


def arrangements(engine: Engine) -> dict[str, Engine]:
    return {
        "together": engine,
        "cached": engine,
        "chunked": anew(engine, max_step_tokens=9),
        "static shapes": anew(engine, has_static_shapes=True, is_overlapping=True),
    }


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return make_config(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.inference_mode()
def test_in_each_dtype_every_path_draws_what_the_plain_forward_ranks_first(
    config: EngineConfig, dtype: str
) -> None:
    """Up to rounding: what is drawn is the plain forward's arg max, or a hair below it."""
    engine = Engine.load(replace(config, dtype=dtype))
    assert engine.bank.proposal.geometry.dtype == getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        config.proposal, attn_implementation="eager", dtype=getattr(torch, dtype)
    )
    assert worst_shortfall(engine, model) <= TOLERANCE[dtype]


@needs_torchao
@torch.inference_mode()
def test_every_path_of_a_quantised_proposal_draws_what_its_plain_forward_draws(config: EngineConfig) -> None:
    engine = Engine.load(replace(config, quantization="int8"))
    models = plain_models(config) | {"proposal": plain_quantized(config.proposal)}
    requests = [
        Request(str(index), prompt, GREEDY, alignment)
        for index, (prompt, alignment) in enumerate(cases(PROMPTS))
    ]
    expected = [plain_greedy(models, *case, engine.limits.vocab_size) for case in cases(PROMPTS)]
    for name, used in arrangements(engine).items():
        told = run_together(used, requests)
        drawn = [tuple(event.token_id for event in told[request.request_id]) for request in requests]
        assert drawn == expected, name
    assert engine.stats.num_cached_tokens


@pytest.mark.parametrize("kind", [kind for kind in RELATIVE_ERROR if kind != "int8"])
@torch.inference_mode()
def test_half_precision_is_near_float32(config: EngineConfig, kind: str) -> None:
    half = AutoModelForCausalLM.from_pretrained(config.proposal, dtype=getattr(torch, kind))
    assert 1e-4 < relative_error(config, half) < RELATIVE_ERROR[kind]


@needs_torchao
@torch.inference_mode()
def test_quantised_weights_are_near_float32(config: EngineConfig) -> None:
    assert 1e-4 < relative_error(config, plain_quantized(config.proposal)) < RELATIVE_ERROR["int8"]


@needs_torchao
def test_bytes_are_those_of_the_quantised_weights_and_were_foreseen(config: EngineConfig) -> None:
    plain, small = Engine.load(config).bank, Engine.load(replace(config, quantization="int8")).bank
    linears = [layer for layer in small.proposal.model.model.modules() if hasattr(layer, "in_features")]
    assert len(linears) == 14
    assert not any(isinstance(layer, PackedLinear) for layer in linears)
    numbers = sum(layer.in_features * layer.out_features for layer in linears)
    assert sum(layer.weight.numel() for layer in linears) == numbers
    assert numbers < sum(stored_bytes(layer.weight) for layer in linears) < 1.3 * numbers
    saved = plain.proposal.weight_bytes - small.proposal.weight_bytes
    assert 2.7 * numbers < saved < 3 * numbers
    skeleton = build_skeleton(load_config(config.proposal)).float()
    assert quantized_bytes(skeleton, "int8") == pytest.approx(small.proposal.weight_bytes, rel=0.01)
    # Aligners stay as they are.
    assert small.aligners["polite"].weight_bytes == plain.aligners["polite"].weight_bytes


@needs_torchao
@torch.inference_mode()
def test_a_checkpoint_that_brings_its_own_quantisation_is_served(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config, model = save_quantized(tmp_path, Int8WeightOnlyConfig())
    engine = Engine.load(config)
    assert worst_shortfall(engine, model) == 0
    num_bytes = engine.bank.proposal.weight_bytes
    assert num_bytes < 110_000  # Of 156,288 in float32.
    report = inspect_pair(config.proposal, {}, dtype="float32").proposal
    assert report.weight_bytes == pytest.approx(num_bytes, rel=0.03)
    with pytest.raises(CheckpointError, match="are quantised already; leave it out"):
        Engine.load(replace(config, quantization="int8"))


@needs_torchao
@torch.inference_mode()
def test_activations_may_be_rounded_row_by_row_but_not_all_rows_by_one_scale(tmp_path: Path) -> None:
    """By one scale, the tokens of a request would depend on who else is in the batch."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor

    config, model = save_quantized(tmp_path / "rows", Int8DynamicActivationInt8WeightConfig())
    assert worst_shortfall(Engine.load(config), model) < 0.05
    config, _ = save_quantized(
        tmp_path / "one", Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())
    )
    with pytest.raises(CheckpointError, match="gives other logits over paged KV memory than by itself"):
        Engine.load(config)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ("int3", "`quantization` must be one of none, int8, int4, fp8, got 'int3'"),
        ("int4", "needs a CUDA device of compute capability 8.0 or more, which `cpu` is not; int8 runs"),
        ("fp8", "needs a CUDA device of compute capability 8.9 or more, which `cpu` is not; int8 runs"),
    ],
)
def test_what_cannot_be_had_here_is_refused_in_one_line(
    tmp_path: Path, quantization: str, reason: str
) -> None:
    source = str(save_model(tmp_path, "llama"))
    with pytest.raises(CheckpointError) as caught:
        load_model(
            source, device=CPU, dtype=None, attn_implementation=ATTENTION_NAME, quantization=quantization
        )
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ram_core.models.quantization.find_spec", lambda _: None)
    source = str(save_model(tmp_path, "llama"))
    with pytest.raises(
        CheckpointError, match=r"needs the package torchao: install `ram-server\[quantized\]`"
    ):
        load_model(source, device=CPU, dtype=None, attn_implementation=ATTENTION_NAME, quantization="int8")


def save_quantized(directory: Path, kind: object) -> tuple[EngineConfig, PreTrainedModel]:
    """A checkpoint that transformers quantised and saved, and the model that was."""
    plain = save_model(directory / "plain", "llama", vocab_size=320)
    model = AutoModelForCausalLM.from_pretrained(
        plain, attn_implementation="eager", dtype=torch.float32, quantization_config=TorchAoConfig(kind)
    )
    saved = directory / "quantized"
    model.save_pretrained(saved)
    make_tokenizer().save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    return EngineConfig(str(saved), device="cpu", dtype="float32", page_size=4, max_batch=8), model


def worst_shortfall(engine: Engine, model: PreTrainedModel) -> float:
    """How far below the plain forward's best is what any path draws, in standard deviations of logits."""
    requests = [Request(str(index), prompt, GREEDY) for index, prompt in enumerate(PROMPTS)]
    worst = 0.0
    for used in arrangements(engine).values():
        for index, events in run_together(used, requests).items():
            drawn = [event.token_id for event in events]
            logits = plain_logits(model, PROMPTS[int(index)], drawn, engine.limits.vocab_size)
            ranked = logits.gather(1, torch.tensor(drawn)[:, None])[:, 0]
            worst = max(worst, ((logits.amax(1) - ranked) / logits.std()).max().item())
    return worst


def relative_error(config: EngineConfig, model: PreTrainedModel) -> float:
    """Of all logits of a few texts, against those of the float32 weights."""
    ids = torch.arange(200).view(4, 50) + 20
    plain = plain_models(config)["proposal"](ids).logits
    return float((model(ids).logits.float() - plain).norm() / plain.norm())


def plain_logits(
    model: PreTrainedModel, prompt: tuple[int, ...], drawn: list[int], vocab_size: int
) -> torch.Tensor:
    """Of each drawn token, what the model says after everything before it."""
    ids = torch.tensor([[*prompt, *drawn[:-1]]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :, :vocab_size].float().cpu()


def plain_quantized(source: str) -> PreTrainedModel:
    """Straight from transformers."""
    return AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32, **quantization_options("int8", CPU)
    )
