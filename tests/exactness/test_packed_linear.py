"""Weights in another layout give the products of the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ram_core.models.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (9, 24), (16, 24), (2, 37, 24), (1, 130, 24), (24,)])
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=has_bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        packed = PackedLinear(linear)
        ours, exact = packed(x), linear.double()(x.double())
        assert torch.equal(packed.weight, linear.float().weight)
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() < 2e-6


def test_only_plain_float32_layers_are_replaced() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "odd": Odd(4, 4),
            "bf16": nn.Linear(4, 4, dtype=torch.bfloat16),
            "deep": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        }
    )
    pack_linears(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    assert kinds["plain"] == kinds["deep.0"] == "PackedLinear"
    assert (kinds["odd"], kinds["bf16"]) == ("Odd", "Linear")
    # The bias is all that is left of a packed layer's parameters.
    assert [tuple(p.shape) for p in model["plain"].parameters()] == [(4,)]


def test_a_tied_head_leaves_the_embedding_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 8)
            self.head = nn.Linear(8, 30, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    before = model.embedding.weight.detach().clone()
    x = torch.randn(3, 8)
    expected = model.head(x)
    pack_linears(model)
    assert torch.equal(model.embedding.weight, before)
    with torch.inference_mode():
        assert (model.head(x) - expected).abs().max() < 1e-6
