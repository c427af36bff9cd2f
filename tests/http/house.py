"""A live server around a real engine of tiny models, and the directory of aligners that it watches."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch

from ram_core.aligners.manifest import Manifest, Term, write_manifest
from ram_core.aligners.pack import Wishes, pack
from ram_core.aligners.states import VersionStatus
from ram_core.engine.client import StreamingClient
from ram_core.engine.config import EngineConfig
from ram_core.engine.messages import LoadAligner
from ram_core.engine.thread import EngineThread
from ram_core.models.vocabulary import load_tokenizer
from server.aligners.checking import Checker
from server.aligners.service import AlignerService
from server.aligners.start import check_inventory, take_inventory
from server.routes.shared import VERSIONS_HEADER
from tests.http.standin import PATIENCE_S, LiveServer, chat, live, wait_until
from tests.models import VOCAB_SIZE, save_pair

CHAT = "/v1/chat/completions"
MODELS = ("one", "two", "three")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Models:
    """A proposal, and small models to make aligners of."""

    proposal: Path
    small: dict[str, Path]

    def put(self, model: str, path: Path, **wishes: Any) -> Path:
        """A version at `root/NAME/VERSION`, with a manifest that lists its files; there all at once."""
        new = path.parent / f".{path.name}"
        shutil.copytree(self.small[model], new)
        pack(new, Wishes(name=path.parent.name, version=path.name, **wishes))
        return new.rename(path)


def make_models(directory: Path) -> Models:
    return Models(*save_pair(directory, aligners=MODELS))


def put_preset(path: Path, **weights: float) -> None:
    """A version at `root/NAME/VERSION` that is made of other aligners."""
    path.mkdir(parents=True)
    terms = tuple(Term(name, weight) for name, weight in weights.items())
    write_manifest(path, Manifest(name=path.parent.name, version=path.name, terms=terms))


@dataclass
class House:
    """`held` has the orders to load that the engine has not been given yet, while `is_holding`.

    `keys` are those of tenants, if there are any.
    """

    server: LiveServer
    engine: Any
    client: httpx.Client
    root: Path
    keys: dict[str, str] = field(default_factory=dict)
    held: list[LoadAligner] = field(default_factory=list)
    is_holding: bool = False

    @property
    def service(self) -> AlignerService:
        return self.server.app.state.serving.aligners

    def do(self, work: Callable[[AlignerService], Result]) -> Result:
        """Have the service do something in its event loop."""

        async def run() -> Result:
            return work(self.service)

        return self.wait(lambda _: run())

    def wait(self, work: Callable[[AlignerService], Awaitable[Result]]) -> Result:
        async def run() -> Result:
            return await asyncio.wait_for(work(self.service), PATIENCE_S)

        loop = self.service._executor._loop
        return asyncio.run_coroutine_threadsafe(run(), loop).result(PATIENCE_S)

    def promote(self, name: str, weights: Any) -> None:
        self.do(lambda service: service.promote(name, weights))
        self.wait(lambda service: service.wait_promoted(name))

    def version(self, name: str, version: str) -> VersionStatus:
        status = self.do(lambda service: service.status_of(name)).status
        return next(each for each in status.versions if each.key.version == version)

    def ask(self, model: str = "polite", **fields: Any) -> httpx.Response:
        body = {"max_tokens": 6, "seed": 1, "ignore_eos": True, "model": model, **fields}
        return self.client.post(CHAT, json=chat(**body))

    def versions_of(self, answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return answer.headers[VERSIONS_HEADER]

    def release_loads(self) -> None:
        """Give the engine what it was kept from."""
        self.is_holding = False
        while self.held:
            StreamingClient.load_aligner(self.engine, self.held.pop(0))

    def wait_held(self) -> None:
        wait_until(lambda: bool(self.held))


@contextlib.contextmanager
def house(
    models: Models,
    root: Path,
    *,
    preload: tuple[str, ...] = ("all",),
    memory_bytes: int = 0,
    slots: int = 0,
    start: Callable[[EngineConfig], StreamingClient] = EngineThread.start,
    **settings: Any,
) -> Iterator[House]:
    """Serve what is in `root`, which begins with `preload`; `slots` aligners have room in one module."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(models.proposal))
    inventory = take_inventory({}, root, preload)
    inventory = check_inventory(inventory, Checker(tokenizer, VOCAB_SIZE))
    config = EngineConfig(
        proposal=str(models.proposal),
        aligners=inventory.sources(),
        device="cpu",
        kv_memory_bytes=4 * 2**20,
        max_batch=8,
        aligner_slots=slots,
        aligner_memory_bytes=memory_bytes,
    )
    engine = start(config)
    try:
        with (
            live(engine, tokenizer, inventory, **settings) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            running = House(server, engine, client, root)

            def load_aligner(order: LoadAligner) -> None:
                if running.is_holding:
                    running.held.append(order)
                else:
                    StreamingClient.load_aligner(engine, order)

            engine.load_aligner = load_aligner  # type: ignore[method-assign]
            yield running
    finally:
        torch.set_num_threads(num_threads)
