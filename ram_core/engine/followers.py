"""The processes beside the engine's own that share its proposal: begun with it, and never left behind.

They get the environment that torchrun would give them. All are on this machine, and talk over its loopback.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading

from ram_core.engine.parent import begin_logging, die_with
from ram_core.engine.wire import Load, decode_order, encode
from ram_core.errors import RamError

_BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; from ram_core.engine.followers import main; main(sys.argv[1])"
)
_LOOPBACK = "127.0.0.1"

logger = logging.getLogger(__name__)


def begin_followers(load: Load) -> None:
    """Make this process the first of those that share the proposal, and begin the others, if any.

    Once one of them fails, this process ends at once: nobody could answer anything any more.
    """
    size = load.config.tensor_parallel
    if size <= 1:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(_free_port()),
        **_place(0),
    }
    command = [sys.executable, "-P", "-c", _BOOT, str(os.getpid()), *sys.path]
    for rank in range(1, size):
        follower = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.PIPE, env=os.environ | _place(rank)
        )
        assert follower.stdin is not None, "it has a pipe"
        follower.stdin.write(encode(load))
        follower.stdin.close()
        threading.Thread(target=_end_with, args=(follower, rank), daemon=True).start()


def main(parent_pid: str) -> None:
    """Load what stdin orders, then do this rank's share; exit code 1 if that fails."""
    die_with(int(parent_pid))
    load = decode_order(sys.stdin.buffer.read())
    assert isinstance(load, Load), "a follower is told what to load, and nothing else"
    # What loading tells, the first rank tells already.
    begin_logging(max(load.log_level, logging.WARNING))

    from transformers.utils import logging as transformers_logging

    from ram_core.engine.ranks import engine_of_ranks

    transformers_logging.disable_progress_bar()
    try:
        with engine_of_ranks(load.config):
            pass
    except RamError as error:
        sys.exit(f"ram: {error}")


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with(follower: subprocess.Popen[bytes], rank: int) -> None:
    code = follower.wait()
    if code:
        logger.error("process %d of those that share the proposal ended with exit code %d", rank, code)
        os._exit(1)
