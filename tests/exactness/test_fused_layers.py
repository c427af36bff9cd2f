"""What a decoder does between matrix products, in one pass: it gives what the model's own code gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig

from ram_core.models import layer_kernels
from ram_core.models.attention import ShapeProbe, attention_backend
from ram_core.models.fused_layers import fuse_layers
from ram_core.models.layer_kernels import rms_norm, rotate, silu_product
from tests.models import FAMILIES, make_model

SHAPES = [(1, 1, 24), (1, 7, 24), (3, 5, 4, 16), (40, 33)]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(layer_kernels, "_NUMBERS_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


def norm_of(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_norm_divides_by_the_root_of_the_mean_square(shape: tuple[int, ...], shift: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.rand(shape[-1])
    assert (rms_norm(x, weight, 1e-3, shift) - norm_of(x, weight + shift, 1e-3)).abs().max() < 2e-6


@pytest.mark.parametrize("token_axis", [1, 2])
def test_a_norm_takes_weights_that_differ_from_token_to_token(token_axis: int) -> None:
    """With a token's heads side by side, and with the tokens of a head side by side."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 6, 4, 16), torch.rand(6, 1, 16)
    if token_axis == 2:
        x, weight = x.transpose(1, 2), weight[:, 0]
    ours = rms_norm(x, weight, 1e-6, 0.0)
    assert (ours - norm_of(x, weight, 1e-6)).abs().max() < 2e-6
    for token in range(6):
        alone = rms_norm(x.select(token_axis, token), weight[token].flatten(), 1e-6, 0.0)
        assert torch.equal(alone, ours.select(token_axis, token))


@pytest.mark.parametrize("shape", SHAPES)
def test_gates_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, other = 5 * torch.randn(shape), torch.randn(shape)
    exact = silu(gate.double()) * other.double()
    assert ((silu_product(gate, other) - exact) / (1 + exact.abs())).abs().max() < 5e-7


def test_gates_hold_at_the_ends() -> None:
    gate = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e30, -1e30, torch.inf, torch.nan])
    ours = silu_product(gate, torch.full_like(gate, 2.0))
    expected = torch.tensor([0.0, -0.0, 180.0, 0.0, 2e30, 0.0, torch.inf, torch.nan])
    assert torch.allclose(ours, expected, atol=1e-30, equal_nan=True)
    assert not silu_product(torch.tensor([-torch.inf]), torch.ones(1)).isfinite().any()


def test_rotation_is_that_of_complex_numbers() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(4, 9, 16), torch.randn(9, 8, dtype=torch.float64)
    both = torch.cat([angle, angle], -1)
    halves = torch.complex(x[..., :8].double(), x[..., 8:].double())
    turned = halves * torch.polar(torch.ones_like(angle), angle)
    ours = rotate(x, both.cos().float(), both.sin().float())
    assert (ours - torch.cat([turned.real, turned.imag], -1)).abs().max() < 1e-6


# In models.


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_models_own_code(family: str) -> None:
    """Of every layer: the probe's attention needs no pages, and is the same for both."""
    model = make_model(family)
    ids = torch.arange(9)[None]

    def states() -> Tensor:
        with torch.inference_mode(), attention_backend(ShapeProbe()):
            out = model.base_model(
                input_ids=ids, position_ids=ids, use_cache=False, output_hidden_states=True
            )
        return torch.stack(out.hidden_states)

    before = states()
    fuse_layers(model)
    assert (states() - before).abs().max() < 2e-5 * before.abs().max()


def llama(**config: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes | config)).eval()  # type: ignore[arg-type]


def fused_names(model: nn.Module) -> set[str]:
    before = {name: type(module) for name, module in model.named_modules()}
    fuse_layers(model)
    return {name for name, module in model.named_modules() if type(module) is not before[name]}


def test_norms_gates_and_rotation_of_a_llama_are_fused() -> None:
    layer = "model.layers.0"
    names = {"mlp", "self_attn", "input_layernorm", "post_attention_layernorm"}
    assert fused_names(llama()) == {f"{layer}.{name}" for name in names} | {"model.norm"}


def test_norms_that_add_one_to_their_weights_are_fused_too() -> None:
    names = fused_names(make_model("gemma3"))
    assert {"model.norm", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_norm"} <= names


def test_what_computes_something_else_stays_as_it_is() -> None:
    assert "model.layers.0.mlp" not in fused_names(llama(hidden_act="gelu"))
    assert not fused_names(llama().bfloat16())
    assert not fused_names(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8)))


@pytest.mark.parametrize("is_paged", [True, False])
def test_only_our_own_forward_takes_another_way(is_paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the check at load compares it with the model's own code."""
    model = llama()
    fuse_layers(model)
    calls = []
    for name in ("rms_norm", "silu_product", "rotate"):
        real = getattr(layer_kernels, name)
        monkeypatch.setattr(
            f"ram_core.models.fused_layers.{name}",
            lambda *args, name=name, real=real: (calls.append(name), real(*args))[1],
        )
    ids = torch.arange(5)[None]
    with torch.inference_mode(), attention_backend(ShapeProbe()) if is_paged else nullcontext():
        model(input_ids=ids, position_ids=ids, use_cache=False)
    assert set(calls) == ({"rms_norm", "silu_product", "rotate"} if is_paged else set())
