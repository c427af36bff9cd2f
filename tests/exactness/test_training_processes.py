"""Two processes under `accelerate launch` make the updates that one makes."""

import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch

from ram_core.progress import ignore_progress
from ram_core.training.fit import fit_model
from tests.training import PAIRS, fit_config, save_small, weights_of

SCRIPT = """
import pickle, sys
from pathlib import Path

from ram_core.training.fit import fit_model

if __name__ == "__main__":
    config, pairs = pickle.loads(Path(sys.argv[1]).read_bytes())
    summary = fit_model(config, pairs, Path(config.output) / "fit", lambda progress: None)
    print("steps", summary.steps, flush=True)
"""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(config, directory):
    """Run a fit in two processes on the CPU; a thread each."""
    (directory / "job").write_bytes(pickle.dumps((config, PAIRS)))
    (directory / "train.py").write_text(SCRIPT)
    # Its `--cpu` starts several processes by MPI alone; this way torchrun does, as for GPUs.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "train.py", "job"],
        cwd=directory,
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_two_processes_end_where_one_does(tmp_path):
    """Over the short last batch of each epoch too, which leaves a process without an example."""
    start = save_small(tmp_path / "start")
    options = {
        "objective": "ram-token",
        "proposal": start,
        "epochs": 2,
        "batch_size": 4,
        "optimizer": "adamw",
    }
    one = fit_config(tmp_path / "one", start, **options)
    alone = fit_model(one, PAIRS, tmp_path / "one" / "fit", ignore_progress)
    two = fit_config(tmp_path / "two", start, micro_batch_size=1, save_steps=3, **options)
    run = launch(two, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["steps", "8"] * 2
    ours, theirs = (weights_of(tmp_path / name / "fit" / "model") for name in ("one", "two"))
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=2e-5)
    again = fit_model(two, PAIRS, tmp_path / "two" / "fit", ignore_progress)
    assert again.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-3)
    assert again.flops == pytest.approx(alone.flops, rel=0.3)
