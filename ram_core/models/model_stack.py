"""What stacks of models have in common: slots, one forward for any mix of them, and how a slot is filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ram_core.models.filling import Filling
from ram_core.models.grouped_linear import ForwardGroups, RowGroups, forward_groups
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from ram_core.models.stored import StoredTensor, Weight
from ram_core.models.tied_embedding import is_tied


class Twin(Protocol):
    """What stands in a stack for a layer of the model."""

    def stage(self, slot: int, weights: Mapping[str, Any]) -> None:
        """Put a slot's weights where the layer will read them; on a device, by the current stream."""

    def clear(self, slot: int) -> None:
        """Let go of what only this slot needs."""


class ModelStack:
    """Some models in one module. Each token of a forward is computed with the weights of its slot.

    Filling a slot disturbs no forward of the others: on a device, copies run on a stream of their own. On CPU
    one of the slot itself may run meanwhile: every leaf waits for its weights.

    `slot_bytes` are the bytes of what a slot has for itself.
    """

    def __init__(
        self, paged: PagedModel, num_slots: int, twins: Mapping[str, Twin], *, slot_bytes: int
    ) -> None:
        self.paged = paged
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._twins = twins
        self._stream: torch.cuda.Stream | None = None
        if paged.device.type == "cuda":
            self._stream = torch.cuda.Stream(paged.device)  # type: ignore[no-untyped-call]
        self._staged: dict[int, tuple[torch.cuda.Event, object]] = {}
        self._fillings: dict[int, Filling] = {}

    def forward(
        self, batch: PackedBatch, pool: KvPool, slots: Int64[Tensor, " token"]
    ) -> Float[Tensor, "logit padded_vocab"]:
        """Advance every row, as `PagedModel.forward`; on a device, shapes do not depend on `slots`.

        Raises:
            WeightsMissing: a slot is being filled, and its weights have not come soon enough.
        """
        tokens = RowGroups.of(slots, self.num_slots)
        logits = RowGroups.of(slots[batch.logit_tokens], self.num_slots)
        with forward_groups(ForwardGroups(tokens, logits)), self._awaiting(tokens):
            return self.paged.forward(batch, pool)

    def settle(self, slot: int) -> None:
        """Have everything that is launched from now on wait for what was staged; the host does not wait."""
        if slot in self._staged:
            torch.cuda.current_stream(self.paged.device).wait_event(self._staged.pop(slot)[0])

    def wait_settled(self, slot: int) -> None:
        """Return once all copies into a slot are done; for other threads than that of the steps."""
        if slot in self._staged:
            self._staged[slot][0].synchronize()

    def is_settled(self, slot: int) -> bool:
        """Whether all copies into a slot are done, so that nobody would wait for them."""
        return slot not in self._staged or bool(self._staged[slot][0].query())  # type: ignore[no-untyped-call]

    def clear(self, slot: int) -> None:
        """Let go of what a slot holds; no forward may use it any more."""
        for twin in self._twins.values():
            twin.clear(slot)

    @torch.no_grad()
    def _copy(self, slot: int, weights: Mapping[str, Mapping[str, Weight]]) -> None:
        """Fill a slot; `weights` are by twin."""
        if self._stream is None:
            self._fill(slot, weights)
            return
        source = {twin: {name: _pinned(each) for name, each in own.items()} for twin, own in weights.items()}
        # Steps that the caller launched may still read what the slot held.
        self._stream.wait_stream(torch.cuda.current_stream(self.paged.device))
        with torch.cuda.stream(self._stream):
            for name, twin in self._twins.items():
                twin.stage(slot, source.get(name, {}))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        # The source must outlive the copies.
        self._staged[slot] = (done, source)

    def _fill(self, slot: int, weights: Mapping[str, Mapping[str, Weight]]) -> None:
        filling = self._fillings[slot] = Filling(len(self._twins))
        try:
            for name, twin in self._twins.items():
                twin.stage(slot, weights.get(name, {}))
                filling.bring()
        except BaseException:
            # It stays: whoever has not heard of it yet must not run on what there is.
            filling.give_up()
            raise
        del self._fillings[slot]

    @contextmanager
    def _awaiting(self, tokens: RowGroups) -> Iterator[None]:
        """Wait, leaf by leaf, for weights of tokens' slots that are on their way."""
        with ExitStack() as waits:
            # Seldom any, so that a step is not looked at for nothing.
            for slot, filling in [*self._fillings.items()]:
                if any(slot == used for used, _ in tokens.spans or ()):
                    waits.enter_context(filling.awaited(self._leaves()))
            yield

    def _leaves(self) -> dict[nn.Module, int]:
        """What reads weights, with its place in the order in which they come."""
        model, places = self.paged.model, {name: place for place, name in enumerate(self._twins)}
        leaves = {model.get_submodule(name): place for name, place in places.items()}
        tied = [module for module in model.modules() if is_tied(module) and module.head in leaves]
        return leaves | {embedding: leaves[embedding.head] for embedding in tied}


def _pinned(weight: Weight) -> Weight:
    if isinstance(weight, StoredTensor):
        # It passes through pinned memory on its way.
        return weight
    return weight if weight.is_cuda or weight.is_pinned() else weight.pin_memory()


def by_module(weights: Mapping[str, Weight]) -> dict[str, dict[str, Weight]]:
    """Weights by the name of their module, and then by their own."""
    found: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        module, _, own = name.rpartition(".")
        found.setdefault(module, {})[own] = weight
    return found


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's
    return head


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module where the one of that name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
