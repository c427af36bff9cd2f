"""A forward whose leaves wait for their weights."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from ram_core.models import filling
from ram_core.models.cores import all_threads, one_thread
from ram_core.models.filling import Filling, WeightsMissing


class Watched(nn.Linear):
    """Says when it runs."""

    def __init__(self, seen: list[str], name: str) -> None:
        super().__init__(2, 2)
        self._seen, self._name = seen, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._seen.append(self._name)
        return super().forward(x)


@pytest.fixture
def seen() -> list[str]:
    return []


@pytest.fixture
def leaves(seen: list[str]) -> dict[nn.Module, int]:
    """Two leaves, of which the second is the first to have its weights."""
    return {Watched(seen, "first"): 1, Watched(seen, "second"): 0}


def run(filling: Filling, leaves: dict[nn.Module, int]) -> None:
    x = torch.ones(1, 2)
    with filling.awaited(leaves):
        for leaf in leaves:
            x = leaf(x)


def test_each_leaf_waits_for_its_own(leaves: dict[nn.Module, int], seen: list[str]) -> None:
    filling = Filling(2)
    thread = threading.Thread(target=run, args=(filling, leaves))
    thread.start()
    filling.bring()
    time.sleep(0.05)
    assert seen == []
    filling.bring()
    thread.join(10)
    assert seen == ["first", "second"]


def test_what_is_there_is_not_waited_for(leaves: dict[nn.Module, int], seen: list[str]) -> None:
    filling = Filling(2)
    filling.bring()
    [_, second] = leaves
    run(filling, {second: 0})
    assert seen == ["second"]


@pytest.mark.parametrize("num_there", [0, 1])
def test_nobody_waits_for_ever(
    leaves: dict[nn.Module, int], seen: list[str], num_there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leaves together wait so long, and none that runs later waits for anything."""
    monkeypatch.setattr(filling, "_PATIENCE_S", 0.05)
    own = Filling(2)
    for _ in range(num_there):
        own.bring()
    began = time.monotonic()
    with pytest.raises(WeightsMissing):
        run(own, leaves)
    assert 0.05 <= time.monotonic() - began < 5
    assert seen == []
    for leaf in leaves:
        leaf(torch.ones(1, 2))
    assert seen == ["first", "second"]


def test_who_waits_hears_that_no_more_will_come(
    leaves: dict[nn.Module, int], seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_PATIENCE_S", 30)
    own = Filling(2)
    threading.Timer(0.02, own.give_up).start()
    began = time.monotonic()
    with pytest.raises(WeightsMissing):
        run(own, leaves)
    assert time.monotonic() - began < 10
    assert seen == []


def test_nothing_runs_on_what_may_be_overwritten(leaves: dict[nn.Module, int], seen: list[str]) -> None:
    filling = Filling(2)
    filling.bring()
    filling.bring()
    filling.give_up()
    with pytest.raises(WeightsMissing):
        run(filling, leaves)
    assert seen == []


def test_what_was_computed_of_weights_that_were_taken_away_is_void(leaves: dict[nn.Module, int]) -> None:
    """Whatever came of it: a result, or any error."""
    filling = Filling(2)
    with pytest.raises(WeightsMissing), filling.awaited(leaves):
        filling.give_up()
    with pytest.raises(WeightsMissing), filling.awaited(leaves):
        raise AttributeError("a layer that is gone")


def test_with_all_weights_there_a_forward_has_all_cores(leaves: dict[nn.Module, int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    filling, used = Filling(3), []
    filling.bring()
    filling.bring()
    try:
        with one_thread():
            run(filling, leaves)
            used.append(torch.get_num_threads())
            filling.bring()
            run(filling, leaves)
            used.append(torch.get_num_threads())
        assert [*used, torch.get_num_threads()] == [1, 2, 2]
        all_threads()
        assert torch.get_num_threads() == 2, "nobody has left any"
    finally:
        torch.set_num_threads(before)


def test_other_errors_stay_what_they_are(leaves: dict[nn.Module, int]) -> None:
    with pytest.raises(KeyError), Filling(2).awaited(leaves):
        raise KeyError("a bug")
