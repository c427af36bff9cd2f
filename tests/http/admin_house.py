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
from transformers.utils import logging as transformers_logging

from tests.http.house import CHAT, House, Models, house, make_models
from tests.http.standin import LiveServer, chat

ALIGNERS = "/v1/aligners"
ADMIN_KEY = "4dmin"
WAIT = {"wait": 60}


@dataclass(frozen=True)
class AdminHouse:
    """A house and its admin. In its directory is the version `v1` of `polite`, which is the model "one"."""

    house: House
    admin: httpx.Client
    models: Models
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def server(self) -> LiveServer:
        return self.house.server

    @property
    def root(self) -> Path:
        return self.house.root

    def stage(self, model: str = "one") -> str:
        """Put a copy of a model below the root, where the watcher does not look; its path."""
        path = f".staging/{model}-{next(self._numbers)}"
        shutil.copytree(self.models.small[model], self.root / path)
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
def admin_house(folder: Path, **settings: Any) -> Iterator[AdminHouse]:
    """Serve aligners from a new directory until the block is left; none is loaded before it is wanted."""
    # Commands run in this process, and what they say on stderr is looked at.
    transformers_logging.disable_progress_bar()
    models = make_models(folder / "models")
    root = folder / "aligners"
    shutil.copytree(models.small["one"], root / "polite" / "v1")
    (root / ".staging").mkdir()
    bearer = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with (
        house(models, root, preload=(), admin_key=ADMIN_KEY, **settings) as running,
        httpx.Client(base_url=running.server.url, timeout=90, headers=bearer) as admin,
    ):
        yield AdminHouse(running, admin, models)
    transformers_logging.enable_progress_bar()


def states(info: dict[str, Any]) -> dict[str, str]:
    """The state of each version of an aligner."""
    return {version["version"]: version["state"] for version in info["versions"]}


def error_of(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, code and field of an error, which must have OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return answer.status_code, error["code"], error["param"]
