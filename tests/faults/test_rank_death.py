"""A server's engine in two processes that share the proposal: if one dies both end, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ram_core.engine.engine import Engine
from ram_core.engine.messages import FailedEvent, Request, TokenEvent
from ram_core.engine.supervisor import SupervisedEngine
from ram_core.errors import EngineUnavailable
from tests.models import save_pair
from tests.ranks import ALIGNED, GREEDY, PROMPTS, answers, config_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes would want a CUDA device each")
PATIENCE_S = 60.0


def test_a_shared_proposal_is_served_and_outlives_the_death_of_a_rank(tmp_path: Path) -> None:
    save_pair(tmp_path, aligners=["polite"], vocab_size=320)
    alone = answers(Engine.load(config_of(tmp_path)))["tokens"][1]
    lines: list[str] = []
    engine = SupervisedEngine.start(config_of(tmp_path, tensor_parallel=2), lines.append)
    assert engine.pid is not None
    assert sum(line == "start-up plan" for line in lines) == 1, "only the first rank tells"

    async def tokens() -> list[int]:
        drawn = []
        async with engine.submit(Request("a", PROMPTS[1], GREEDY, ALIGNED)) as events:
            async for event in events:
                assert not isinstance(event, FailedEvent)
                if isinstance(event, TokenEvent):
                    drawn.append(event.token_id)
        return drawn

    assert asyncio.run(tokens()) == alone
    [follower] = children(engine.pid)
    os.kill(follower, signal.SIGKILL)
    until_s = time.monotonic() + PATIENCE_S
    while engine.num_restarts == 0 or engine.trouble is not None:
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert asyncio.run(tokens()) == alone
    [follower] = children(engine.pid)
    engine.end()
    until_s = time.monotonic() + PATIENCE_S
    while is_alive(follower):  # the kernel ends it once its parent is gone, which takes a moment
        assert time.monotonic() < until_s
        time.sleep(0.05)
    with pytest.raises(EngineUnavailable):
        asyncio.run(tokens())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
