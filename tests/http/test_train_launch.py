"""`ram train` as a launcher begins it: several processes, of which the first alone answers and packs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ram_core.aligners.verification import verify
from tests.models import save_pair

ROOT = Path(__file__).parents[2]
RAM = [sys.executable, "-c", "from server.cli import main; main()", "train"]
SETTINGS = {
    "data.max_prompt_tokens": 40,
    "data.max_tokens": 80,
    "synthesize.max_answer_tokens": 8,
    "fit.batch_size": 4,
    "fit.max_steps": 2,
    "fit.learning_rate": 1e-3,
}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(words, num_processes):
    """Output and errors of each process; the environment is that of `accelerate launch` and `torchrun`."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [*RAM, *words],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        told = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_processes, told
    return told


def test_the_first_process_alone_answers_and_packs_and_all_fit(tmp_path):
    proposal, saved = save_pair(tmp_path, std=0.1)
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--proposal",
        str(proposal),
        "--model",
        str(saved["terse"]),
        "--data",
        str(tmp_path / "data.jsonl"),
    ]
    words += ["--output", str(tmp_path / "run"), "--name", "terse", "--json"]
    words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    (first, _), (second, _) = launch(words, 2)
    report = json.loads(first)
    assert second == ""
    assert [stage["outcome"] for stage in report["stages"]] == ["done"] * 3
    assert len((tmp_path / "run" / "synthesis.jsonl").read_text().splitlines()) == 8
    assert verify(Path(report["aligner"])).is_sound
