"""Products in which each row has a weight matrix of its own, out of a stack of them.

Which slot of the stack a row takes is data, not shape: on a device, one captured graph serves any mix. Slots
without rows are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import linear

Span = tuple[int, int]
"""Rows from the first number up to, not including, the second."""


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The rows of a matrix by the slot that each takes.

    `order` lists the rows, those of a slot together; slot i's are `order[offsets[i] : offsets[i + 1]]`.
    `spans` are the host's copy, for each slot with rows the pieces in which they lie, one after the other;
    None on a device, which nobody asks.
    """

    slots: Int64[Tensor, " row"]
    order: Int64[Tensor, " row"]
    offsets: Int64[Tensor, " slot_plus_one"]
    spans: tuple[tuple[int, tuple[Span, ...]], ...] | None

    @classmethod
    def of(cls, slots: Int64[Tensor, " row"], num_slots: int) -> RowGroups:
        """Group rows; `slots` are below `num_slots`. Only on CPU are the numbers looked at."""
        ordered, order = slots.sort(stable=True)
        bounds = torch.arange(num_slots + 1, device=slots.device)
        spans = _spans(slots.tolist()) if slots.device.type == "cpu" else None
        return cls(slots, order, torch.searchsorted(ordered, bounds), spans)


def _spans(slots: Sequence[int]) -> tuple[tuple[int, tuple[Span, ...]], ...]:
    """The runs of equal numbers, by number."""
    spans: dict[int, list[Span]] = {}
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[start]:
            spans.setdefault(slots[start], []).append((start, end))
            start = end
    return tuple((slot, tuple(pieces)) for slot, pieces in spans.items())


@dataclass(frozen=True, slots=True)
class ForwardGroups:
    """The groups of a forward: of all its tokens, and of those whose logits are wanted."""

    tokens: RowGroups
    logits: RowGroups


_groups: ContextVar[ForwardGroups] = ContextVar("forward_groups")


@contextmanager
def forward_groups(groups: ForwardGroups) -> Iterator[None]:
    """Serve every layer of a stack that runs inside the block by `groups`."""
    token = _groups.set(groups)
    try:
        yield
    finally:
        _groups.reset(token)


def current_groups() -> ForwardGroups:
    """The groups of the forward that is under way."""
    return _groups.get()


def grouped_linear(
    x: Float[Tensor, "row in"],
    weight: Float[Tensor, "slot out in"],
    bias: Float[Tensor, "slot out"] | None,
    groups: RowGroups,
    *,
    add_to: Float[Tensor, "row out"] | None = None,
) -> Float[Tensor, "row out"]:
    """`x[i] @ weight[slot of i].T + bias[slot of i]` for every row; added to `add_to`, in place, if given."""
    if x.is_cuda:
        from ram_core.models.triton_grouped_linear import grouped_linear_triton

        return grouped_linear_triton(x, weight, bias, groups, add_to=add_to)
    return grouped_linear_reference(x, weight, bias, groups, add_to=add_to)


def grouped_linear_reference(
    x: Float[Tensor, "row in"],
    weight: Float[Tensor, "slot out in"],
    bias: Float[Tensor, "slot out"] | None,
    groups: RowGroups,
    *,
    add_to: Float[Tensor, "row out"] | None = None,
) -> Float[Tensor, "row out"]:
    """The same, a plain product for each slot that has rows; on CPU only."""
    assert groups.spans is not None
    out = x.new_zeros(len(x), weight.shape[1]) if add_to is None else add_to
    for slot, spans in groups.spans:
        own_bias = None if bias is None else bias[slot]
        for start, end in spans:
            out[start:end] += linear(x[start:end], weight[slot], own_bias)
    return out


def rows_of_layer(is_head: bool) -> RowGroups:
    """The groups of the rows that a linear layer sees: a head is asked for the wanted logits alone."""
    groups = current_groups()
    return groups.logits if is_head else groups.tokens
