"""Weights in another layout give the products of the plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import nn

from ram_core.models import matrix_product
from ram_core.models.packed_linear import PackedLinear, pack_linears


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(matrix_product, "_PRODUCTS_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_out", [16, 40, 33])
@pytest.mark.parametrize(
    "shape",
    [(1, 24), (8, 24), (9, 24), (45, 24), (2, 37, 24), (1, 130, 24), (24,), (5, 512), (5, 700), (0, 24)],
)
def test_products_are_those_of_the_plain_layer(
    shape: tuple[int, ...], num_out: int, has_bias: bool, threads: None
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[-1], num_out, bias=has_bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        packed = PackedLinear(linear)
        ours, exact = packed(x), deepcopy(linear).double()(x.double())
        assert torch.equal(packed.weight, linear.weight)
    assert ours.shape == exact.shape
    assert not x.numel() or (ours - exact).abs().max() < 2e-6


def test_a_rows_product_does_not_depend_on_its_neighbours(threads: None) -> None:
    """Bit for bit, whichever of the tiles it is in: 512 inputs are copied apart, 300 are not."""
    torch.manual_seed(0)
    for num_in in (300, 512):
        layer, x = PackedLinear(nn.Linear(num_in, 70)), torch.randn(47, num_in)
        together = layer(x)
        for count in (1, 2, 3, 5, 7, 8, 15, 16, 31):
            assert torch.equal(layer(x[-count:]), together[-count:])


def test_rounding_does_not_grow_with_the_number_of_inputs() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8192, 64, bias=False), torch.randn(16, 8192)
    exact = linear.weight.double() @ x.double().T
    ours = (PackedLinear(linear)(x).T - exact).square().mean().sqrt()
    assert ours < 2 * (linear(x).T - exact).square().mean().sqrt()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_in_their_row(bad: float) -> None:
    torch.manual_seed(0)
    layer, x = PackedLinear(nn.Linear(40, 33)), torch.randn(21, 40)
    clean = layer(x)
    x[4, 7] = bad
    ours = layer(x)
    assert not ours[4].isfinite().any()
    assert torch.equal(ours[torch.arange(21) != 4], clean[torch.arange(21) != 4])


def test_the_last_panel_is_filled_up_with_zeros() -> None:
    weight = torch.randn(33, 40)
    for _ in range(20):
        # Memory that was used before holds something else.
        torch.full((3, 40, 16), torch.nan)
        panels = matrix_product.lay_out([weight], *weight.shape)
        assert torch.equal(panels[2, :, 0], weight[32])
        assert not panels[2, :, 1:].any()


def test_a_strided_input_is_read_as_it_is_meant() -> None:
    torch.manual_seed(0)
    layer, x = PackedLinear(nn.Linear(24, 40)), torch.randn(24, 9)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


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
