"""Groups of aligners that one forward serves, and how aligners come and go while it runs.

Aligners of one architecture share a module with a leading slot axis, LoRA adapters of one base that base; any
other is a group of its own, with a forward of its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
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

# Over all groups: a name may come back in another one, and must not find the pages of its namesake.
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Place:
    """Where an aligner's weights are: a slot of its group, and a number that never comes again."""

    slot: int
    number: int


class AlignerGroup:
    """Aligners `names`, of which the i-th is in slot i of `served`; a lone model has the one slot.

    To bring another: `stage` its weights into a free slot beside running steps, wait for `is_settled`, and
    `add` its name. To let one go: `remove` its name, and `free` the slot once no step reads it. Pages of KV
    memory are named by place, so that none is found by a namesake that comes later.

    `kind` is the same for groups whose aligners could share a module. `stage`, `free` and `abandon` may be
    called by any thread, the others by the one that makes the steps.
    """

    def __init__(
        self, name: str, served: PagedModel | Stack, names: Iterable[str], *, kind: str = ""
    ) -> None:
        self.name = name
        self.served = served
        self.kind = kind
        self._places = {each: Place(slot, next(_numbers)) for slot, each in enumerate(names)}
        self._expected: dict[str, Place] = {}
        self._lock = threading.Lock()
        self._free = set(range(len(self._places), served.num_slots if isinstance(served, Stack) else 1))

    @property
    def model(self) -> PagedModel:
        """The model whose module serves the group."""
        return self.served.paged if isinstance(self.served, Stack) else self.served

    @property
    def is_stacked(self) -> bool:
        """Whether each token's slot has to be told."""
        return isinstance(self.served, Stack)

    @property
    def num_slots(self) -> int:
        """How many aligners the group has room for."""
        return self.served.num_slots if isinstance(self.served, Stack) else 1

    @property
    def names(self) -> tuple[str, ...]:
        """The aligners that can be asked for."""
        return tuple(self._places)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that `stage` may fill."""
        with self._lock:
            return tuple(sorted(self._free))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in any slot, nor on its way there."""
        return len(self.free_slots) == self.num_slots

    def lane(self, name: str) -> tuple[str, int]:
        """What a new sequence of an aligner keeps for life: the name of its pages, and its slot.

        The slot is -1 where none has to be told. No two aligners have pages of one name, not even two that
        had the same name one after the other.
        """
        place = self._places.get(name) or self._expected[name]
        return f"{name}:{place.number}", place.slot if self.is_stacked else -1

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

    def stage(
        self, weights: Mapping[str, Any], on_begin: Callable[[int], None] = lambda slot: None
    ) -> int | None:
        """Begin to fill a free slot; running steps do not notice. None if no slot is free.

        Args:
            weights: as `StackedModel.stage` or `LoraStack.stage` takes them; pinned memory is copied fastest.
            on_begin: told the slot before it is filled.

        Raises:
            CheckpointError: they do not fit the group; the slot stays free.
        """
        if not isinstance(self.served, Stack):
            return None
        with self._lock:
            if not self._free:
                return None
            slot = min(self._free)
            self._free.discard(slot)
        try:
            on_begin(slot)
            self.served.stage(slot, weights)
        except BaseException:
            self.abandon(slot)
            raise
        return slot

    def is_settled(self, slot: int) -> bool:
        """Whether all that was staged has arrived, so that `add` makes no step wait."""
        return self._stack.is_settled(slot)

    def wait_settled(self, slot: int) -> None:
        """Return when all that was staged has arrived; not for the thread that makes the steps."""
        self._stack.wait_settled(slot)

    def expect(self, name: str, slot: int) -> None:
        """Let sequences begin with an aligner that is still being staged; `add` or `renounce` follows."""
        self._expected[name] = Place(slot, next(_numbers))

    def renounce(self, name: str) -> None:
        """Let nobody begin any more with an aligner that was expected."""
        self._expected.pop(name, None)

    def add(self, name: str, slot: int) -> None:
        """Let new sequences ask for an aligner, whose weights are in a staged slot.

        Raises:
            ValueError: nothing was staged there, an aligner uses it already, or there is one of the name.
        """
        if slot in self.free_slots or not 0 <= slot < self.num_slots or slot in self._used:
            raise ValueError(f"slot {slot} of `{self.name}` holds nothing that waits for a name")
        if name in self._places:
            raise ValueError(f"`{self.name}` has an aligner `{name}` already")
        self._stack.settle(slot)
        expected = self._expected.pop(name) if name in self._expected else None
        self._places[name] = expected or Place(slot, next(_numbers))

    def remove(self, name: str) -> int:
        """Let nobody ask for an aligner any more; returns its slot, which stays as it is until freed."""
        return self._places.pop(name).slot

    def free(self, slot: int) -> None:
        """Let another be staged into a slot; no step may read it any more, nor any sequence use it.

        Raises:
            ValueError: an aligner's new sequences use it.
        """
        if slot in self._used:
            raise ValueError(f"slot {slot} of `{self.name}` is in use")
        self.abandon(slot)

    def abandon(self, slot: int) -> None:
        """Let go of what was staged into a slot, or was only begun to be, and never got a name."""
        if isinstance(self.served, Stack):
            self.served.clear(slot)
        with self._lock:
            self._free.add(slot)

    @property
    def _used(self) -> set[int]:
        return {place.slot for place in self._places.values()}

    @property
    def _stack(self) -> Stack:
        if not isinstance(self.served, Stack):
            raise ValueError(f"`{self.name}` is a model by itself, which has no slots; see `aligner_slots`")
        return self.served
