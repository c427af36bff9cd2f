"""A load takes what the steps leave it."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from ram_core.engine.aligner_loads import AlignerLoads, Arrived
from ram_core.engine.messages import AlignerFailed, LoadAligner
from ram_core.niceness import LOADING


def test_a_load_computes_on_one_thread_and_after_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    has_begun, is_done = threading.Event(), threading.Event()

    def work(order: LoadAligner, progress: object) -> list[object]:
        # Until the step's own thread has set its number again.
        assert has_begun.wait(10)
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.append((torch.get_num_threads(), priority))
        return []

    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loads = AlignerLoads(work, is_done.set)  # type: ignore[arg-type]
        loads.begin(LoadAligner("new@1", (("new@1", "/nowhere"),), max_bytes=0))
        has_begun.set()
        assert is_done.wait(10)
        [arrived] = loads.take()
        assert isinstance(arrived, Arrived)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)
    assert seen == [(1, os.getpriority(os.PRIO_PROCESS, 0) + LOADING)]


def test_a_load_that_gets_no_thread_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    is_told = threading.Event()
    loads = AlignerLoads(lambda order, progress: [], is_told.set)
    refused = LoadAligner("new@1", (("new@1", "/nowhere"),), max_bytes=0)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        loads.begin(refused)
    assert is_told.is_set()
    assert loads.take() == [AlignerFailed("new@1", "can't start new thread")]
    assert not loads.orders
    is_told.clear()
    loads.begin(refused)
    assert is_told.wait(10)
    assert loads.take() == [Arrived(refused, ())]
