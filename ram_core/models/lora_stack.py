"""LoRA adapters of one base model, served in one forward: the base is read once, adapters by the tokens'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy, deepcopy

import torch
from torch import Tensor, nn

from ram_core.errors import CheckpointError
from ram_core.models.grouped_linear import grouped_linear, rows_of_layer
from ram_core.models.lora import LoraLayer
from ram_core.models.model_stack import ModelStack, head_of, replace_module
from ram_core.models.packed_linear import PackedLinear
from ram_core.models.paged import PagedModel
from ram_core.models.slot_linear import Linear
from ram_core.models.stacked import is_linear

_RANK_STEP = 16
"""Ranks on a device are padded to multiples of this, the least that its matrix units take."""


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of each layer that an adapter may change, by name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if is_linear(layer)
    }


class LoraStack(ModelStack):
    """`num_slots` adapters of the base `paged`, on its layers `modules`, with ranks of at most `max_rank`.

    `base_shapes` are those of all layers of the base that an adapter may change.
    """

    def __init__(self, paged: PagedModel, num_slots: int, modules: Iterable[str], max_rank: int) -> None:
        self._max_rank = max_rank
        model = paged.model
        self.base_shapes = linear_shapes(model)
        twins: dict[str, SlotLora | StackedLora] = {}
        slot_bytes = 0
        for name in modules:
            layer = model.get_submodule(name)
            if not is_linear(layer):
                raise CheckpointError(f"LoRA changes `{name}`, which is no linear layer")
            kind = SlotLora if paged.device.type == "cpu" else StackedLora
            twins[name] = kind(layer, num_slots, max_rank, paged.model.dtype, is_head=layer is head_of(model))
            slot_bytes += max_rank * (layer.in_features + layer.out_features) * model.dtype.itemsize
            replace_module(model, name, twins[name])
        super().__init__(paged, num_slots, twins, slot_bytes=slot_bytes)
        self._twins: Mapping[str, SlotLora | StackedLora] = twins

    def base_again(self) -> PagedModel:
        """The base without adapters, as another module over the same weights: none is copied."""
        model = self.paged.model
        shared: dict[int, object] = {id(each): each for each in (*model.parameters(), *model.buffers())}
        shared |= {id(layer): layer for layer in model.modules() if isinstance(layer, PackedLinear)}
        shared |= {id(twin): twin.base for twin in self._twins.values()}
        again = copy(self.paged)
        again.model = deepcopy(model, shared)
        return again

    def has_room_for(self, layers: Mapping[str, LoraLayer]) -> bool:
        """Whether `stage` could take an adapter."""
        return layers.keys() <= self._twins.keys() and all(
            layer.rank <= self._max_rank for layer in layers.values()
        )

    def stage(self, slot: int, layers: Mapping[str, LoraLayer]) -> None:
        """Begin to put an adapter into a slot that nothing uses.

        Raises:
            CheckpointError: it changes a layer for which the stack has no room, or its rank is too high.
        """
        strange = sorted(layers.keys() - self._twins.keys())
        if strange:
            raise CheckpointError(f"LoRA changes `{strange[0]}`, for which the bank has no room")
        for name, layer in layers.items():
            if layer.rank > self._max_rank:
                raise CheckpointError(
                    f"LoRA of rank {layer.rank} on `{name}`; the bank has room for rank {self._max_rank}"
                )
        self._copy(slot, {name: {"a": layer.a, "b": layer.b} for name, layer in layers.items()})


class SlotLora(nn.Module):
    """A linear layer with adapters on CPU: each takes the rows of its slot."""

    def __init__(
        self, base: Linear, num_slots: int, max_rank: int, dtype: torch.dtype, *, is_head: bool
    ) -> None:
        super().__init__()
        self.base = base
        self._dtype, self._is_head = dtype, is_head
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_slots

    @property
    def weight(self) -> Tensor:
        """The base's, for models that ask for its dtype."""
        weight: Tensor = self.base.weight
        return weight

    def stage(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Keep a slot's weights, transposed; one whose adapter leaves this layer alone has none."""
        a, b = (
            (weights[name].to(self._dtype).T.contiguous() for name in ("a", "b")) if weights else (None, None)
        )
        self._layers[slot] = None if a is None or b is None else (a, b)

    def clear(self, slot: int) -> None:
        """Let a slot's weights go."""
        self._layers[slot] = None

    def forward(self, x: Tensor) -> Tensor:
        """The base's product, and to each row what its slot's adapter adds."""
        out: Tensor = self.base(x)
        rows, sums = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        spans = rows_of_layer(self._is_head).spans
        assert spans is not None
        for slot, pieces in spans:
            layer = self._layers[slot]
            if layer is not None:
                for start, end in pieces:
                    sums[start:end].addmm_(rows[start:end] @ layer[0], layer[1])
        return out


class StackedLora(nn.Module):
    """A linear layer with adapters on a device: two grouped products beside the base's."""

    def __init__(
        self, base: Linear, num_slots: int, max_rank: int, dtype: torch.dtype, *, is_head: bool
    ) -> None:
        super().__init__()
        self.base = base
        self._is_head = is_head
        rank = -(-max_rank // _RANK_STEP) * _RANK_STEP
        device = base.weight.device

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.stack_a = zeros(num_slots, rank, base.in_features)
        self.stack_b = zeros(num_slots, base.out_features, rank)

    @property
    def weight(self) -> Tensor:
        """The base's, for models that ask for its dtype."""
        weight: Tensor = self.base.weight
        return weight

    def stage(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Copy a slot's weights; what they do not fill adds nothing."""
        a, b = self.stack_a[slot].zero_(), self.stack_b[slot].zero_()
        if weights:
            rank = len(weights["a"])
            a[:rank].copy_(weights["a"], non_blocking=True)
            b[:, :rank].copy_(weights["b"], non_blocking=True)

    def clear(self, slot: int) -> None:
        """The memory stays: it is the next one's."""

    def forward(self, x: Tensor) -> Tensor:
        """The base's product, and to each row what its slot's adapter adds."""
        out: Tensor = self.base(x)
        groups = rows_of_layer(self._is_head)
        inner = grouped_linear(x.reshape(-1, x.shape[-1]), self.stack_a, None, groups)
        grouped_linear(inner, self.stack_b, None, groups, add_to=out.view(-1, out.shape[-1]))
        return out
