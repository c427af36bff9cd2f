"""An embedding that is tied to a packed head gives the rows that it had, and keeps none of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.loading import load_model
from ram_core.models.packed_linear import PackedLinear, pack_linears
from ram_core.models.paged import PagedModel
from ram_core.models.slot_linear import SlotLinear
from ram_core.models.stacked import StackedModel, plain_weights
from ram_core.models.tied_embedding import is_tied
from tests.models import Family, save_model

NUM_ROWS, SIZE = 39, 8


class Scaled(nn.Embedding):
    """As gemmas have them: it looks at its weight beside looking rows up."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(3.0).to(self.weight.dtype)


class Tied(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(SIZE, NUM_ROWS, bias=False)
        self.head.weight = embedding.weight


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("shape", [(1, 7), (5,), (2, 3), (1, 0), ()])
def test_rows_are_those_that_it_had(kind: type[nn.Embedding], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, ids = Tied(kind(NUM_ROWS, SIZE, padding_idx=NUM_ROWS - 1)), torch.randint(NUM_ROWS, shape)
    x = torch.randn(3, SIZE)
    weight, rows, logits = model.embedding.weight.detach().clone(), model.embedding(ids), model.head(x)
    pack_linears(model)
    with torch.inference_mode():
        assert torch.equal(model.embedding(ids), rows)
        assert (model.head(x) - logits).abs().max() < 1e-6
    # As a whole, for those who look at it.
    assert torch.equal(model.embedding.weight, weight)
    assert not list(model.parameters())


def test_others_keep_their_weights() -> None:
    """One that is tied to no head, and one that changes the rows that it looks up."""
    apart, changing = Tied(nn.Embedding(NUM_ROWS, SIZE)), Tied(nn.Embedding(NUM_ROWS, SIZE, max_norm=1.0))
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    for model in (apart, changing):
        before = model.embedding.weight.detach().clone()
        pack_linears(model)
        assert isinstance(model.head, PackedLinear)
        assert not is_tied(model.embedding)
        assert torch.equal(model.embedding.weight, before)


def held_bytes(paged: PagedModel) -> int:
    """Of all weights that a model holds, or all models of a stack, packed and not."""
    modules = list(paged.model.modules())
    modules += [layer for each in modules if isinstance(each, SlotLinear) for layer in each._layers if layer]
    panels = [layer._panels for layer in modules if isinstance(layer, PackedLinear)]
    return sum(each.nbytes for each in [*paged.model.parameters(), *panels])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_tied_weight_is_in_memory_once(tmp_path: Path, family: Family) -> None:
    source = save_model(tmp_path, family, is_tied=True, vocab_size=304)
    model = load_model(
        str(source), device=torch.device("cpu"), dtype=None, attn_implementation=ATTENTION_NAME
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    alone = PagedModel(model, name="alone")
    assert held_bytes(alone) == alone.weight_bytes
    weights = plain_weights(model)
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    stack = StackedModel(alone, num_slots=1)
    stack.stage(0, weights)
    assert held_bytes(stack.paged) == stack.slot_bytes
