"""Two processes that share a proposal say what one says; if one dies or stands still, the other ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ram_core.engine.engine import Engine
from ram_core.errors import CheckpointError
from ram_core.models.tensor_parallel import check_shares, join
from tests.models import make_config, save_pair
from tests.ranks import answers, config_of

ROOT = Path(__file__).parents[2]
FAMILIES = ["llama", "qwen2", "gemma3"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes would want a CUDA device each")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("pairs")
    for family in FAMILIES:
        save_pair(home / family, family, aligners=["polite"], vocab_size=320)
    return [home / family for family in FAMILIES]


def test_two_processes_under_torchrun_say_what_one_says(pairs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "said.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.ranks", "once", str(out), *map(str, pairs)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(out.read_text())
    for directory in pairs:
        alone, together = answers(Engine.load(config_of(directory))), shared[directory.name]
        assert together["tokens"] == alone["tokens"]
        assert together["num_cached"] == alone["num_cached"] > 0
        torch.testing.assert_close(
            torch.tensor(together["logits"]), torch.tensor(alone["logits"]), rtol=1e-4, atol=1e-4
        )
        assert together["kv_heads"] == [heads // 2 for heads in alone["kv_heads"]] == [1, 1]
        assert together["weight_bytes"] < 0.75 * alone["weight_bytes"]


def test_a_rank_that_stands_still_or_is_gone_does_not_hang_the_other(
    pairs: list[Path], tmp_path: Path
) -> None:
    """The first waits as long as a collective may take, and ends; the second finds it gone, and ends."""
    with two_ranks(tmp_path / "said.json", pairs[0]) as (first, second):
        second.send_signal(signal.SIGSTOP)
        assert first.wait(timeout=20) > 0
        second.send_signal(signal.SIGCONT)
        assert second.wait(timeout=20) > 0


def test_without_torchrun_there_is_one_clear_line(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(CheckpointError, match="needs 2 processes, got 1: begin them with `torchrun --nproc"):
        join(2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("num_ranks", "reason"),
    [
        (0, "must be at least 1, got 0"),
        (3, "does not divide the model's `num_attention_heads` 4"),
        (4, "does not divide the model's `num_key_value_heads` 2"),
    ],
)
def test_heads_must_be_shared_equally(num_ranks: int, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        check_shares(num_ranks, make_config("llama"))
    check_shares(2, make_config("llama"))


@contextmanager
def two_ranks(out: Path, pair: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both of them at work, begun as torchrun does, but with nobody to look after them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", "forever", str(out), str(pair)],
            cwd=ROOT,
            env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        patience_until = time.monotonic() + 60
        while not out.exists() and time.monotonic() < patience_until:
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        assert out.exists()
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
