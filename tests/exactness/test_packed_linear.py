"""Weights in another layout give the products of the plain ones."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from ram_core.models import packed_linear
from ram_core.models.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("keeps_plain", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (9, 24), (16, 24), (2, 37, 24), (1, 130, 24), (24,)])
def test_products_are_those_of_the_plain_layer(
    shape: tuple[int, ...], keeps_plain: bool, has_bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=has_bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        packed = PackedLinear(linear, keeps_plain=keeps_plain)
        ours, exact = packed(x), deepcopy(linear).double()(x.double())
        assert torch.equal(packed.weight, linear.weight)
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


def test_a_large_model_keeps_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_MAX_PLAIN_BYTES", 2 * 16 * 4)
    monkeypatch.setattr(packed_linear, "_is_intel", lambda: True)
    small = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    large = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    pack_linears(small)
    pack_linears(large)
    # Asked twice, a kept weight is the same; what is not kept is made anew.
    assert all(layer.weight is layer.weight for layer in small)
    assert not any(layer.weight is layer.weight for layer in large)


@pytest.mark.parametrize(
    ("vendor", "keeps"), [("GenuineIntel", True), ("AuthenticAMD", False), (None, False)]
)
def test_plain_weights_are_kept_where_they_are_faster(
    vendor: str | None, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if vendor:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(packed_linear, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(packed_linear, "_is_intel", packed_linear._is_intel.__wrapped__)
    model = nn.Sequential(nn.Linear(4, 4))
    pack_linears(model)
    assert (model[0].weight is model[0].weight) is keeps


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
