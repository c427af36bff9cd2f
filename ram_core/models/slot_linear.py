"""Linear layers of models that share a module, on CPU: a layer for each slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ram_core.models.grouped_linear import current_groups, rows_of_layer
from ram_core.models.matrix_product import PANEL
from ram_core.models.packed_linear import PackedLinear, is_packable
from ram_core.models.stored import StoredTensor, Weight

Linear = nn.Linear | PackedLinear


class SlotLinear(nn.Module):
    """A linear layer for each slot, on CPU: each takes the rows of its slot, and empty ones are not read.

    They are packed if `layer` is, or would be. Others have their weights in those of an embedding that they
    are `tied` to. With `keeps_room`, memory of packed ones that went last is the next one's: what the system
    gives instead, it has to clear first.
    """

    def __init__(
        self,
        layer: Linear,
        num_slots: int,
        *,
        is_head: bool,
        tied: nn.Parameter | None,
        keeps_room: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._is_head, self._tied = is_head, tied
        self._is_packed = is_to_be_packed(layer)
        self._dtype = torch.float32 if isinstance(layer, PackedLinear) else layer.weight.dtype
        self._layers: list[nn.Module | None] = [None] * num_slots
        self._keeps_room = keeps_room
        # One, or none; in a list, as it is no part of the model.
        self._empty: list[PackedLinear] = []

    @property
    def weight(self) -> Tensor:
        """Any slot's weight, for models that ask for its dtype."""
        weight: Tensor = next(layer for layer in self._layers if layer is not None).weight  # type: ignore[assignment]
        return weight

    def stage(self, slot: int, weights: Mapping[str, Weight]) -> None:
        """Lay a slot's weights out."""
        layer = nn.Linear(1, 1, bias="bias" in weights, device="meta")
        layer.in_features, layer.out_features = self.in_features, self.out_features
        if (bias := weights.get("bias")) is not None:
            layer.bias = nn.Parameter(self._own(bias), requires_grad=False)
        weight = weights["weight"]
        if self._is_packed:
            empty = self._empty.pop() if self._empty else None
            # What a file has is never in memory as a whole, but as it is multiplied.
            rows = weight.rows(self._dtype, PANEL) if isinstance(weight, StoredTensor) else [weight]
            self._layers[slot] = PackedLinear(layer, rows, empty)
            return
        own = self._own(weight) if self._tied is None else self._tied[slot]
        layer.weight = nn.Parameter(own, requires_grad=False)
        self._layers[slot] = layer

    def _own(self, weight: Weight) -> Tensor:
        return weight.read(self._dtype) if isinstance(weight, StoredTensor) else weight.clone()

    def clear(self, slot: int) -> None:
        """Let a slot's weights go."""
        layer, self._layers[slot] = self._layers[slot], None
        if self._keeps_room and isinstance(layer, PackedLinear):
            self._empty[:] = [layer]

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight[slot of each row].T`, for `x` of shape [..., in_features]."""
        spans = rows_of_layer(self._is_head).spans
        assert spans is not None
        if not spans:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if len(spans) == 1:
            return self._product(spans[0][0], x)
        rows = x.reshape(-1, self.in_features)
        parts: dict[int, Tensor] = {}
        for slot, pieces in spans:
            own = [rows[start:end] for start, end in pieces]
            out = self._product(slot, own[0] if len(own) == 1 else torch.cat(own))
            lengths = [end - start for start, end in pieces]
            parts |= dict(zip((start for start, _ in pieces), torch.split(out, lengths), strict=True))
        return torch.cat([parts[start] for start in sorted(parts)]).view(*x.shape[:-1], -1)

    def rows_of(self, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token input"]:
        """Of each token's slot some row of the weight, which is packed."""
        spans = current_groups().tokens.spans
        assert spans is not None
        rows = torch.empty(len(ids), self.in_features, dtype=self._dtype)
        for slot, pieces in spans:
            layer = self._layers[slot]
            assert isinstance(layer, PackedLinear)
            for start, end in pieces:
                rows[start:end] = layer.rows_of(ids[start:end])
        return rows

    def _product(self, slot: int, rows: Tensor) -> Tensor:
        layer = self._layers[slot]
        assert layer is not None
        out: Tensor = layer(rows)
        return out


def is_to_be_packed(layer: Linear) -> bool:
    """Whether a layer's like are packed, on CPU."""
    return isinstance(layer, PackedLinear) or is_packable(layer)
