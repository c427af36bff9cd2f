"""`ram serve`: bind, load while already answering health checks, serve, and leave cleanly."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer
import uvicorn
from rich.console import Console

from ram_core.engine.config import EngineConfig
from ram_core.engine.parent import begin_logging
from server.aligners.checking import Checker
from server.aligners.start import Inventory, check_inventory, take_inventory
from server.app import create_app
from server.connections import guarded
from server.serving import Loaded, Serving
from server.settings import Settings, SettingsError
from server.tenants.access import is_loopback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_WORDS_S = 5.0
"""After the grace, streams have so long to tell their clients of the end before they are cut."""
_LOOK_S = 0.1
"""So often it is looked whether somebody insists on the end."""


class GracefulServer(uvicorn.Server):
    """Goes on for a while after SIGTERM, unready; then running answers have their grace, and new ones 503."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave; a second signal, or SIGINT, skips the drain."""
        drain_s = self._serving.settings.drain_s
        if sig == signal.SIGTERM and drain_s and not self._serving.is_draining:
            self._serving.is_draining = True
            leave = super().handle_exit
            self._loop.call_soon_threadsafe(self._loop.call_later, drain_s, leave, sig, frame)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, with the door open; when the grace ends, so does the engine, as streams say."""
        self._serving.is_draining = self._serving.is_leaving = True
        grace_s = self._serving.settings.shutdown_grace_s
        ending = asyncio.create_task(self._close_after(grace_s))
        running = set(self.server_state.tasks)
        while running and not self.force_exit and not ending.done():
            _, running = await asyncio.wait(running, timeout=_LOOK_S)
        hanging_up = asyncio.create_task(self._hang_up_after(_LAST_WORDS_S / 2))
        await super().shutdown(sockets)
        for task in (ending, hanging_up):
            task.cancel()

    async def _close_after(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self._serving.close()

    async def _hang_up_after(self, delay_s: float) -> None:
        """Drop clients that do not read even their last words; uvicorn would call that our error."""
        await asyncio.sleep(delay_s)
        for connection in self.server_state.connections:
            connection.transport.abort()


def run(settings: Settings) -> None:
    """Serve until a signal comes.

    Raises:
        SettingsError: nothing to serve, or no port to serve on.
        CheckpointError: a model cannot be served.
    """
    # What is wrong with the settings is told before anything is begun.
    settings.engine_config()
    begin_logging(settings.log_level.upper())
    with ExitStack() as exits:
        listeners = [exits.enter_context(listener) for listener in _bind_all(settings)]
        exits.enter_context(_signals_end_serving())
        is_loaded = asyncio.run(_serve(settings, listeners))
    if not is_loaded:
        # A thread still reads weights and cannot be stopped; nothing else is left to do.
        os._exit(0)


@contextmanager
def _signals_end_serving() -> Iterator[None]:
    """uvicorn raises a signal again when it has shut down; by then all is done: it must do nothing."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(sig, lambda *_: None) for sig in signals]
    try:
        yield
    finally:
        for sig, handler in zip(signals, before, strict=True):
            signal.signal(sig, handler)


def _bind_all(settings: Settings) -> Iterator[socket.socket]:
    """The public port, and the admin's own if there is one; raises `SettingsError` if that cannot be."""
    listener = bind(settings.host, settings.port)
    yield listener
    _check_who_may_come(settings, listener)
    if settings.admin_port is not None:
        admin_listener = bind(settings.admin_host, settings.admin_port, flag="--admin-port")
        yield admin_listener
        _check_admin_port(settings, listener, admin_listener)


def bind(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A socket that nobody else has; raises `SettingsError` if that cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"Port {port} of {host} is in use; choose another with {flag}.") from None
        raise SettingsError(f"Cannot listen on {host}, port {port}: {error.strerror or error}.") from None
    return listener


def _check_who_may_come(settings: Settings, listener: socket.socket) -> None:
    """Raise `SettingsError` if others than this machine's users could come, without a key."""
    host = listener.getsockname()[0]
    if settings.needs_no_key and not settings.allow_anonymous and not is_loopback(host):
        raise SettingsError(
            f"On {host} anybody could use this server, as there are no keys. Name them by `--tenants-file` "
            "or RAM_API_KEY, or let everybody in by `--allow-anonymous`."
        )


def _check_admin_port(settings: Settings, listener: socket.socket, admin_listener: socket.socket) -> None:
    """Raise `SettingsError` if others than this machine's users could be admins, or callers."""
    host, port = admin_listener.getsockname()[:2]
    if port == listener.getsockname()[1]:
        # They are told apart by their numbers alone.
        raise SettingsError(f"`admin_port` and `port` are both {port}; choose another with --admin-port.")
    if not is_loopback(host) and not (settings.admin_key and settings.admin_key.get_secret_value()):
        raise SettingsError(f"An admin's port on {host} needs an admin's key: RAM_ADMIN_KEY.")


async def _serve(settings: Settings, listeners: list[socket.socket]) -> bool:
    """Return whether the models had been loaded when the end came."""
    app = create_app(settings)
    serving: Serving = app.state.serving
    if settings.admin_port is not None:
        serving.doors.admin_port = listeners[1].getsockname()[1]
    uvicorn_config = uvicorn.Config(
        app,
        log_level="info" if settings.log_level == "debug" else "warning",
        access_log=settings.log_level == "debug",
        http=guarded(settings.receive_timeout_s),
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=int(_LAST_WORDS_S),
        ws="none",
    )
    server = GracefulServer(uvicorn_config, serving)
    if settings.tenants_file or settings.usage_log:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, serving.reload)
    answering = asyncio.create_task(server.serve(sockets=listeners))
    loading = _load_in_thread(settings)
    await asyncio.wait((answering, loading), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        await answering
        return False
    try:
        serving.open(loading.result())
        # What is there now stays: looking through it again and again would stop everything for half a second.
        gc.collect()
        gc.freeze()
        _print_banner(settings, serving, listeners)
    except BaseException:
        server.should_exit = True
        await answering
        raise
    await answering
    return True


def _load_in_thread(settings: Settings) -> asyncio.Future[Loaded]:
    """Load off the event loop, in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    loading: asyncio.Future[Loaded] = loop.create_future()

    def tell(loaded: Loaded | None, error: Exception | None) -> None:
        if error is not None:
            loading.set_exception(error)
        elif loaded is not None:
            loading.set_result(loaded)

    def work() -> None:
        try:
            loop.call_soon_threadsafe(tell, load(settings), None)
        except Exception as error:
            loop.call_soon_threadsafe(tell, None, error)

    threading.Thread(target=work, name="ram-load", daemon=True).start()
    return loading


def load(settings: Settings) -> Loaded:
    """The engine, running, its tokenizer and the aligners that were found; tells on stderr where it is.

    Raises:
        SettingsError, CheckpointError: it cannot be served, or an aligner that was named cannot.
    """
    inventory = take_inventory(settings.aligner_sources(), settings.aligners_dir, settings.preload)
    settings.check_aligner_names(inventory.names)
    config = settings.engine_config(inventory.sources())
    return (_load_process if settings.engine == "process" else _load_thread)(config, inventory)


def _load_process(config: EngineConfig, inventory: Inventory) -> Loaded:
    """An engine in a process of its own, which loads while its aligners are verified here."""
    from ram_core.engine.supervisor import SupervisedEngine

    engine = SupervisedEngine(config, _print_progress)
    engine.begin()
    try:
        tokenizer, checker = _load_tokenizer(config)
        inventory = check_inventory(inventory, checker)
        engine.wait_loaded()
    except BaseException:
        engine.end()
        raise
    return Loaded(engine, tokenizer, checker, inventory)


def _load_thread(config: EngineConfig, inventory: Inventory) -> Loaded:
    from ram_core.engine.thread import EngineThread

    tokenizer, checker = _load_tokenizer(config)
    inventory = check_inventory(inventory, checker)
    return Loaded(EngineThread.start(config, _print_progress), tokenizer, checker, inventory)


def _load_tokenizer(config: EngineConfig) -> tuple[PreTrainedTokenizerBase, Checker]:
    """The proposal's tokenizer, and what compares aligners with it."""
    from transformers.utils import logging as transformers_logging

    from ram_core.models.loading import load_config
    from ram_core.models.vocabulary import load_tokenizer

    transformers_logging.disable_progress_bar()
    is_trusted = config.trust_remote_code
    tokenizer = load_tokenizer(config.proposal, trust_remote_code=is_trusted)
    proposal = load_config(config.proposal, trust_remote_code=is_trusted)
    return tokenizer, Checker(tokenizer, proposal.get_text_config(decoder=True).vocab_size)


def _print_progress(line: str) -> None:
    typer.echo(line, err=True)


def _print_banner(settings: Settings, serving: Serving, listeners: list[socket.socket]) -> None:
    host, url = listeners[0].getsockname()[0], _url_of(listeners[0])
    names = serving.names
    aligner = names.aligners[0] if names.aligners else names.proposal
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold]Ready[/bold] at [bold]{url}/v1[/bold]")
    console.print(f"  proposal  {settings.model_name}", markup=False)
    console.print(f"  aligners  {', '.join(names.aligners) or 'none'}", markup=False)
    console.print(f"  open to   {_who_may_come(serving, host)}", markup=False)
    console.print(f"  admin     {_who_is_admin(serving, listeners[-1])}", markup=False)
    console.print("\nTry this:")
    key = "" if serving.tenants.is_open else " -H 'Authorization: Bearer KEY'"
    console.print(
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{aligner}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
        markup=False,
    )
    console.print(f"  ram chat --url {url}\n", markup=False)


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _who_is_admin(serving: Serving, listener: socket.socket) -> str:
    """Who may load and promote aligners, and where."""
    if not serving.tenants.has_keys:
        who = "everybody on this machine, without a key"
    else:
        who = "the admin, by its key" if serving.tenants.has_admin else "nobody, as RAM_ADMIN_KEY is not set"
    return f"{who}, at {_url_of(listener)}" if serving.doors.admin_port is not None else who


def _who_may_come(serving: Serving, host: str) -> str:
    if not serving.tenants.is_open:
        count = serving.tenants.num_tenants
        return "1 tenant, by its keys" if count == 1 else f"{count} tenants, by their keys"
    return "everybody on this machine, without a key" if is_loopback(host) else "everybody, without a key"
