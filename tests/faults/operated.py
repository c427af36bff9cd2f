"""`ram serve` as an operator runs it, in processes of its own, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from server.tenants.editing import add_tenant
from tests.http.standin import count_metrics

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""Loading takes seconds, on a busy machine many of them."""


@dataclass
class Operated:
    """A running server: its processes, its address, a key, and the files that it writes."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    log: Path
    home: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def engine_pid(self) -> int:
        [child] = children_of(self.process.pid)
        return child

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, headers=self.headers)

    def metrics(self) -> Counter[str]:
        return count_metrics(httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text)

    def metric(self, name: str) -> float:
        return self.metrics()[name]

    def num_ended(self, reason: str) -> int:
        """Requests that ended so."""
        told = f'reason="{reason}"'
        counts = self.metrics().items()
        return int(sum(n for name, n in counts if "requests_finished_total" in name and told in name))

    @property
    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/health/ready", timeout=PATIENCE_S).status_code == 200

    @property
    def is_idle(self) -> bool:
        """No sequence runs or waits, and no page is in use."""
        seen = self.metrics()
        return not any(
            seen[f"ram_{name}"] for name in ("requests_running", "requests_waiting", "kv_pages_used")
        )

    @property
    def num_files(self) -> int:
        """Open files and connections of the serving process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory_bytes(self) -> int:
        """What both processes hold in memory."""
        return sum(_resident_bytes(pid) for pid in (self.process.pid, *children_of(self.process.pid)))

    def num_server_errors(self) -> int:
        """Answers with a status of 500 or more, 503 left out."""
        kind = re.compile(r'ram_http_requests_total.*status="5(?!03)')
        return int(sum(count for name, count in self.metrics().items() if kind.search(name)))

    def leave(self, sig: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sig)


@contextlib.contextmanager
def operate(home: Path, proposal: Path, *words: str, **environment: str) -> Iterator[Operated]:
    """Serve a proposal to one tenant, with a usage log; what nobody caught there fails the block."""
    tenants, usage = home / "tenants.toml", home / "usage.jsonl"
    key = add_tenant(tenants, "acme")
    options = ["--tenants-file", str(tenants), "--usage-log", str(usage), "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(proposal)]
    log, banner = home / "log", home / "banner"
    with log.open("wb") as errors, banner.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, *words],
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAM_SERVED_MODEL_NAME": "big"}
            | environment,
        )
    try:
        until(lambda: "ram chat" in banner.read_text() or process.poll() is not None, "the server is ready")
        found = re.search(r"Ready at (http://[\d.:]+)/v1", banner.read_text())
        assert found, log.read_text()
        yield Operated(process, found[1], key, log, home)
        said = log.read_text()
        assert not re.search(r"Request \S+ failed|A stream failed|Exception in ASGI|never retrieved", said), (
            said
        )
    finally:
        process.kill()
        process.wait()


def until(is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Seconds until it was so."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < patience_s, f"not within {patience_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _resident_bytes(pid: int) -> int:
    """Of memory that is its own: files that are mapped into it come and go with the kernel's needs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [kilobytes] = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return kilobytes * 1024
