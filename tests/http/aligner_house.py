"""A server with a directory of aligners around a real engine, and an admin at its door."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.commands.serve import load
from server.settings import Settings
from tests.http.standin import LiveServer, chat, live
from tests.models import save_pair

CHAT, ALIGNERS = "/v1/chat/completions", "/v1/aligners"
ADMIN_KEY = "4dmin"
WAIT = {"wait": 60}


@dataclass(frozen=True)
class House:
    """`root` is the directory of aligners, where `polite/v1` is found; others are copied from `saved`."""

    server: LiveServer
    admin: httpx.Client
    root: Path
    proposal: Path
    saved: dict[str, Path]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def stage(self, saved: str = "polite") -> str:
        """Put a copy below the root, where the watcher does not look; its path."""
        path = f".staging/{saved}-{next(self._numbers)}"
        shutil.copytree(self.saved[saved], self.root / path)
        return path

    def add(self, name: str, path: str, **fields: Any) -> dict[str, Any]:
        answer = self.admin.post(ALIGNERS, json={"name": name, "path": path, **fields}, params=WAIT)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def do(self, name: str, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.admin.post(f"{ALIGNERS}/{name}/{verb}", json=body, params=WAIT)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, name: str) -> dict[str, Any]:
        return self.admin.get(f"{ALIGNERS}/{name}").json()

    def text_of(self, model: str, **fields: Any) -> str:
        body = chat(**{"model": model, "max_tokens": 8, "seed": 1, "ignore_eos": True, **fields})
        answer = self.admin.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]


@contextlib.contextmanager
def open_house(folder: Path, **settings: Any) -> Iterator[House]:
    """Serve aligners from a new directory until the block is left."""
    proposal, saved = save_pair(folder / "pair", max_position_embeddings=1024)
    root = folder / "aligners"
    shutil.copytree(saved["polite"], root / "polite" / "v1")
    (root / ".staging").mkdir()
    chosen = Settings(
        proposal=str(proposal), aligners_dir=root, engine="thread", device="cpu", kv_memory=2**22, max_batch=4
    )
    loaded = load(chosen)
    keys = {"admin_key": ADMIN_KEY, **settings}
    with (
        live(loaded.engine, loaded.tokenizer, loaded.inventory, **keys) as server,
        httpx.Client(
            base_url=server.url, timeout=90, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        ) as admin,
    ):
        yield House(server, admin, root, proposal, saved)


def states(info: dict[str, Any]) -> dict[str, str]:
    """The state of each version of an aligner."""
    return {version["version"]: version["state"] for version in info["versions"]}


def error_of(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, code and field of an error, which must have OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return answer.status_code, error["code"], error["param"]
