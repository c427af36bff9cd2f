"""The one call that measures a card: its claims, its time, and what only the engine's insides tell."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import cuda
from benchmarks.adapters import save_adapter
from benchmarks.common import Options, Pair, random_prompts
from benchmarks.cuda import Found, Run
from benchmarks.device_way import DeviceWay
from benchmarks.engine_way import Job
from benchmarks.shapes import PAIRS, save_checkpoint

TINY = PAIRS["tiny"]


def read(*arguments: str) -> argparse.Namespace:
    options = Options("…")
    cuda.add_options(options)
    return options.read(arguments)


def test_a_card_is_measured_on_large_shapes_and_a_trial_on_tiny_ones():
    usual, quick, own = read(), read("--quick"), read("--quick", "--pair", "small")
    assert (usual.pair, usual.device, usual.dtype) == ("llama", "cuda", "bfloat16")
    assert usual.json.name == "bars-cuda.json"
    assert (quick.pair, quick.device, quick.dtype, quick.json) == ("tiny", "cpu", "float32", None)
    assert own.pair == "small"
    claims = cuda.claims(usual)
    assert len({claim.name for claim in claims}) == len(claims)
    assert all(claim.expected is not None for claim in claims)


def test_what_the_time_does_not_allow_for_is_left_out_and_the_rest_is_told(monkeypatch):
    def quick(run: Run) -> None:
        run.found.figures[cuda.COPY] = 1.0

    def broken(run: Run) -> None:
        raise RuntimeError("Traceback …\nno such kernel")

    def endless(run: Run) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(cuda, "PARTS", (quick, broken, endless, broken))
    pair = Pair("proposal", ("aligner",), TINY)
    monkeypatch.setattr(cuda, "checkpoints", lambda options: nullcontext(pair))
    outcome = cuda.run(read("--quick", "--seconds", "0.5"))
    assert outcome.figures == {cuda.COPY: 1.0}
    assert [note.partition(":")[0] for note in outcome.notes] == ["`broken` failed", "Not all was measured"]
    assert "no such kernel" in outcome.notes[0]


def test_only_what_was_measured_has_a_table():
    assert Found().outcome(read("--quick")).tables == []


@pytest.fixture(scope="module")
def way(tmp_path_factory) -> DeviceWay:
    root = tmp_path_factory.mktemp("pair")
    for name, shape in zip(("proposal", "aligner"), TINY, strict=True):
        save_checkpoint(shape, root / name, "float32", "cpu", seed=0)
    base = str(root / "aligner")
    adapter = save_adapter(TINY[1], base, root / "adapter", "float32", rank=4)
    room = Pair(str(root / "proposal"), (base,), TINY).kv_bytes(4, 200, "float32")
    aligners = (base, base, adapter, adapter)
    return DeviceWay(Job(str(root / "proposal"), aligners, "cpu", "float32", 4, room, aligner_slots=3))


def test_gaps_lie_between_steps(way):
    way.hold(random_prompts(read("--quick"), 2, 8, seed=0), [0, 2])
    launch = type(way.engine._runner).launch
    assert 0 < way.gap_share(6) < 0.9
    assert way.engine._runner.launch.__func__ is launch, "it left its marks behind"
    runner, plan = way.engine._runner, way.engine._scheduler.plan
    way.engine._scheduler.plan = lambda: time.sleep(0.05) or plan()
    try:
        assert way.gap_share(4) > 0.5, "a host that is late was not seen"
    finally:
        del way.engine._scheduler.plan
    assert "_compute" not in vars(runner)
    way.release()


def test_an_aligner_is_swapped_while_others_are_used(way: DeviceWay, tmp_path: Path):
    way.hold(random_prompts(read("--quick"), 2, 8, seed=0), [0, 3])
    group = way.engine.bank.group_of["aligner-1"]
    before = group.lane("aligner-1")
    save_checkpoint(TINY[1], tmp_path / "another", "float32", "cpu", seed=5)
    rest_s, took_s = way.swap_steps("aligner-1", str(tmp_path / "another"), 2)
    assert len(rest_s) == 4
    assert len(took_s) >= 4
    assert group.lane("aligner-1") != before
    assert len(group.free_slots) == 1
    way.release()
