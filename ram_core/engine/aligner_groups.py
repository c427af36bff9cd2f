"""Groups of aligners that one forward serves, and how the weights of an aligner are changed while it runs.

Aligners of one architecture share a module with a leading slot axis, LoRA adapters of one base that base; any
other is a group of its own, with a forward of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from ram_core.models.kv import KvPool
from ram_core.models.lora_stack import LoraStack
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel

Stack = StackedModel | LoraStack


@dataclass(frozen=True, slots=True)
class Version:
    """What an aligner's new sequences use: its slot in the group, and a number that never comes again."""

    slot: int
    number: int


class AlignerGroup:
    """Aligners `names`, of which the i-th is in slot i of `served`; a lone model has the one slot.

    To change an aligner while it serves: `stage` its weights into a free slot, wait for `is_settled`, `flip`
    its name, and `free` the old slot once no sequence uses it. Until then these go on with what they began
    with: pages of KV memory are named by version, so that none is found by a sequence of another.

    `stage` may be called by any thread, the others by the one that makes the steps.
    """

    def __init__(self, name: str, served: PagedModel | Stack, names: Iterable[str]) -> None:
        self.name = name
        self.served = served
        self._numbers = itertools.count()
        self._versions = {each: Version(slot, next(self._numbers)) for slot, each in enumerate(names)}
        self._free = set(range(len(self._versions), served.num_slots if isinstance(served, Stack) else 1))

    @property
    def model(self) -> PagedModel:
        """The model whose module serves the group."""
        return self.served.paged if isinstance(self.served, Stack) else self.served

    @property
    def is_stacked(self) -> bool:
        """Whether each token's slot has to be told."""
        return isinstance(self.served, Stack)

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners that can be asked for."""
        return tuple(self._versions)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that `stage` may fill."""
        return tuple(sorted(self._free))

    def lane(self, name: str) -> tuple[str, int]:
        """What a new sequence of an aligner keeps for life: the name of its pages, and its slot.

        The slot is -1 where none has to be told. No two versions of any aligners have pages of one name.
        """
        version = self._versions[name]
        return f"{name}:{version.number}", version.slot if self.is_stacked else -1

    def forward(
        self, batch: PackedBatch, pool: KvPool, slots: Int64[Tensor, " token"] | None
    ) -> Float[Tensor, "logit padded_vocab"]:
        """As `PagedModel.forward`; `slots` if the group is stacked."""
        if isinstance(self.served, Stack):
            assert slots is not None
            return self.served.forward(batch, pool, slots)
        return self.served.forward(batch, pool)

    @property
    def weight_bytes(self) -> dict[str, int]:
        """What the group takes on its device, in words, and the bytes of each."""
        if not isinstance(self.served, Stack):
            return dict.fromkeys(self.names, self.model.weight_bytes)
        own = self.served.slot_bytes
        found = dict.fromkeys(self.names, own)
        if isinstance(self.served, LoraStack):
            found[f"the base of {', '.join(self.names)}"] = self.model.weight_bytes
        num_free = self.served.num_slots - len(self.names)
        return found | ({f"the free slots of {self.name}": num_free * own} if num_free else {})

    def stage(self, slot: int, weights: Mapping[str, Any]) -> None:
        """Begin to fill a free slot; running steps do not notice.

        Args:
            slot: one of `free_slots`.
            weights: as `StackedModel.stage` or `LoraStack.stage` takes them; pinned memory is copied fastest.

        Raises:
            CheckpointError: they do not fit the group; the slot stays free.
            ValueError: the slot is not free, or the group cannot be changed.
        """
        if slot not in self._free:
            raise ValueError(f"slot {slot} of `{self.name}` is not free; free are {self.free_slots}")
        self._stack.stage(slot, weights)
        self._free.discard(slot)

    def is_settled(self, slot: int) -> bool:
        """Whether all that was staged has arrived, so that `flip` makes no step wait."""
        return self._stack.is_settled(slot)

    def flip(self, name: str, slot: int) -> int:
        """From now on new sequences of an aligner use a staged slot; returns the one it had.

        Raises:
            ValueError: nothing was staged there, or an aligner uses it already.
        """
        if slot in self._free or not 0 <= slot < self._stack.num_slots or slot in self._used:
            raise ValueError(f"slot {slot} of `{self.name}` holds nothing that waits for a name")
        self._stack.settle(slot)
        before = self._versions[name]
        self._versions[name] = Version(slot, next(self._numbers))
        return before.slot

    def free(self, slot: int) -> None:
        """Let another be staged into a slot; no sequence may use it any more, waiting ones included.

        Raises:
            ValueError: an aligner's new sequences use it.
        """
        if slot in self._used:
            raise ValueError(f"slot {slot} of `{self.name}` is in use")
        self._stack.clear(slot)
        self._free.add(slot)

    @property
    def _used(self) -> set[int]:
        return {version.slot for version in self._versions.values()}

    @property
    def _stack(self) -> Stack:
        if not isinstance(self.served, Stack):
            raise ValueError(f"`{self.name}` is a model by itself, which has no slots; see `aligner_slots`")
        return self.served
