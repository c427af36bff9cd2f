"""Forwards of a model whose weights are still on their way: each of its leaves waits for its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ram_core.models.cores import all_threads

_PATIENCE_S = 0.25
"""A forward waits for all its weights together: whoever comes meanwhile waits as long."""


class WeightsMissing(Exception):
    """A forward was given up, as weights that it needs have not come; what it wrote means nothing."""


class Filling:
    """How far the weights of a model have come, leaf by leaf in the order in which they do.

    One thread brings them, another may wait; once all are there, it has all cores.
    """

    def __init__(self, num_leaves: int) -> None:
        self._changed = threading.Condition()
        self._num_leaves = num_leaves
        self._num_there = 0
        self._is_void = False

    def bring(self) -> None:
        """The next leaf has its weights."""
        with self._changed:
            self._num_there += 1
            self._changed.notify_all()

    def give_up(self) -> None:
        """No more will come, and what there is may be overwritten."""
        with self._changed:
            self._is_void = True
            self._changed.notify_all()

    @contextmanager
    def awaited(self, leaves: Mapping[nn.Module, int]) -> Iterator[None]:
        """Have each leaf that runs inside the block wait for its weights, given its place in their order.

        Raises:
            WeightsMissing: they have not come soon enough, or will not come.
        """
        deadline_s = time.monotonic() + _PATIENCE_S

        def waiting_for(place: int) -> Callable[..., None]:
            def wait(module: nn.Module, args: Any) -> None:
                self._wait(place, deadline_s)

            return wait

        with ExitStack() as hooks:
            for leaf, place in leaves.items():
                hooks.callback(leaf.register_forward_pre_hook(waiting_for(place)).remove)
            try:
                yield
            except Exception:
                # Weights that are taken away under a forward may break it in any way.
                self._require()
                raise
        self._require()

    def _wait(self, place: int, deadline_s: float) -> None:
        with self._changed:
            left_s = deadline_s - time.monotonic()
            self._changed.wait_for(lambda: self._is_void or self._num_there > place, left_s)
            if self._is_void or self._num_there <= place:
                raise WeightsMissing
        if self._num_there == self._num_leaves:
            all_threads()

    def _require(self) -> None:
        if self._is_void:
            raise WeightsMissing from None
