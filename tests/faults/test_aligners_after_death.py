"""The engine dies while aligners are in its memory, and on their way there."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from ram_core.aligners.states import State
from ram_core.engine.supervisor import SupervisedEngine
from tests.faults.test_engine_death import until
from tests.http.house import house, make_models


def test_what_was_there_comes_back_and_who_waited_goes_on(tmp_path):
    models = make_models(tmp_path / "models")
    root = tmp_path / "aligners"
    for name, model in (("a", "one"), ("b", "two"), ("c", "three")):
        (root / name).mkdir(parents=True)
        models.put(model, root / name / "1")
    with (
        house(models, root, preload=("a",), start=SupervisedEngine.start, aligner_wait_s=600) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        before = {name: running.ask(name).json()["choices"] for name in "ab"}
        running.is_holding = True
        waiting = pool.submit(running.ask, "c")
        running.wait_held()
        running.held.clear()
        os.kill(running.engine.pid, signal.SIGKILL)
        until(lambda: running.client.get("/health/ready").status_code == 503, "it is noticed")
        assert running.ask("a").status_code == 503
        until(lambda: running.client.get("/health/ready").status_code == 200, "the engine comes back")
        until(lambda: running.version("b", "1").state is State.RESIDENT, "the registry hears of it")
        assert {name: running.ask(name).json()["choices"] for name in "ab"} == before
        assert not waiting.done()
        running.wait_held()
        assert [order.aligner for order in running.held] == ["c@1"], "the others need no new order"
        running.release_loads()
        assert running.versions_of(waiting.result()) == "c@1"
        assert all(running.version(name, "1").num_references == 0 for name in "abc")
