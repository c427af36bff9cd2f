"""`ram aligner list|compare|load|unload|promote|rollback`: a running server's aligners, by its admin API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ram_core.errors import RamError
from server.commands.bench import DEFAULT_URL
from server.commands.failing import fail
from server.commands.tables import AsJson, add_row, make_console, new_table

if TYPE_CHECKING:
    from server.commands.admin_client import AdminClient

DEFAULT_WAIT_S = 300.0
NOT_YET = 3
"""The exit code of what was begun, but is not done within the time to wait."""

remote_app = typer.Typer()

Name = Annotated[str, typer.Argument(help="The aligner's name.")]
Url = Annotated[str, typer.Option(help="Where the server is.")]
Key = Annotated[
    str, typer.Option(envvar="RAM_ADMIN_KEY", show_default=False, help="The admin's key, if there is one.")
]
Version = Annotated[str | None, typer.Option(help="Default: those that answer new requests.")]
Wait = Annotated[
    float, typer.Option("--wait", min=0, help="Seconds until it must be done; exit code 3 if it is not.")
]

_POLL_S = 0.25
_MEASURES = ("requests", "errors", "tokens", "KL(p‖q)", "KL(π‖p)", "ESS", "fallbacks")

Answer = TypeVar("Answer")


@remote_app.command("list")
def list_aligners(
    name: Annotated[str | None, typer.Argument(help="One aligner; default: all.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    is_json: AsJson = False,
) -> None:
    """Show a running server's aligners: versions, states, shares and memory."""

    def ask(client: AdminClient) -> dict[str, Any]:
        return client.aligners() if name is None else client.aligner(name)

    told = _with_client(url, key, ask)
    if is_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        _print_aligners(told["data"] if name is None else [told])


@remote_app.command()
def compare(name: Name, url: Url = DEFAULT_URL, key: Key = "", is_json: AsJson = False) -> None:
    """Show side by side what was measured of an aligner's versions, since the server began."""
    told = _with_client(url, key, lambda client: client.aligner(name))
    if is_json:
        measured = {version["version"]: version["measured"] for version in told["versions"]}
        typer.echo(json.dumps(measured, indent=2))
        return
    table = new_table("version", "share", *_MEASURES)
    for version in told["versions"]:
        share = _percent(told["shares"].get(version["version"]))
        add_row(table, version["version"], share, *_measures_of(version["measured"]))
    make_console().print(table)


@remote_app.command()
def load(
    name: Name,
    version: Version = None,
    path: Annotated[
        str | None, typer.Option(help="Make it known first: a directory below the server's --aligners-dir.")
    ] = None,
    hub_id: Annotated[str | None, typer.Option(help="Make it known first: a repository of the hub.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in memory.")] = False,
    wait_s: Wait = DEFAULT_WAIT_S,
    url: Url = DEFAULT_URL,
    key: Key = "",
    is_json: AsJson = False,
) -> None:
    """Bring an aligner into a running server's memory."""
    if path is None and hub_id is None:
        body = _without_none(version=version, pin=pin)
        _order(name, "load", body, wait_s=wait_s, url=url, key=key, is_json=is_json)
        return
    if version is not None:
        fail("`--version` is the manifest's to say where `--path` or `--hub-id` is given.")
    body = _without_none(name=name, path=path, hub_id=hub_id, load=True, pin=pin)
    told = _with_client(
        url, key, lambda client: _watched(client, name, lambda: client.add(body, wait_s=wait_s))
    )
    _tell(*told, is_json=is_json)


@remote_app.command()
def unload(
    name: Name,
    version: Annotated[str | None, typer.Option(help="Default: all of them.")] = None,
    wait_s: Wait = DEFAULT_WAIT_S,
    url: Url = DEFAULT_URL,
    key: Key = "",
    is_json: AsJson = False,
) -> None:
    """Give an aligner's memory back, once no request runs on it."""
    body = _without_none(version=version)
    _order(name, "unload", body, wait_s=wait_s, url=url, key=key, is_json=is_json)


@remote_app.command()
def promote(
    name: Name,
    versions: Annotated[
        list[str], typer.Argument(metavar="VERSION[=WEIGHT]...", help="One version, or several by weight.")
    ],
    wait_s: Wait = DEFAULT_WAIT_S,
    url: Url = DEFAULT_URL,
    key: Key = "",
    is_json: AsJson = False,
) -> None:
    """Let a version answer all new requests, or several by weight, as soon as they are in memory."""
    try:
        body = {"versions": _weights(versions)}
    except ValueError as error:
        fail(error)
    _order(name, "promote", body, wait_s=wait_s, url=url, key=key, is_json=is_json)


@remote_app.command()
def rollback(
    name: Name,
    wait_s: Wait = DEFAULT_WAIT_S,
    url: Url = DEFAULT_URL,
    key: Key = "",
    is_json: AsJson = False,
) -> None:
    """Take an aligner's last promotion back."""
    _order(name, "rollback", {}, wait_s=wait_s, url=url, key=key, is_json=is_json)


def _order(
    name: str, verb: str, body: dict[str, Any], *, wait_s: float, url: str, key: str, is_json: bool
) -> None:
    def ask(client: AdminClient) -> tuple[bool, dict[str, Any]]:
        return _watched(client, name, lambda: client.order(name, verb, body, wait_s=wait_s))

    _tell(*_with_client(url, key, ask), is_json=is_json)


def _with_client(url: str, key: str, ask: Callable[[AdminClient], Answer]) -> Answer:
    """What the server answers; a line and exit code 1 if it refuses, or is not there."""
    from server.commands.admin_client import AdminClient

    try:
        with AdminClient(url, key) as client:
            return ask(client)
    except RamError as error:
        fail(error)


def _watched(client: AdminClient, name: str, order: Callable[[], Answer]) -> Answer:
    """The order's answer; meanwhile, if somebody looks, where the aligner is on its way."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        return order()
    with ThreadPoolExecutor(1) as pool, console.status(name) as line:
        answer = pool.submit(order)
        while not answer.done():
            try:
                line.update(f"{name}: {_way_of(client.aligner(name))}")
            except RamError:
                # It may not be known yet; if something is wrong, the order's own answer will say so.
                line.update(name)
            time.sleep(_POLL_S)
        return answer.result()


def _way_of(aligner: dict[str, Any]) -> str:
    moving = [
        f"{each['version']} {_state_of(each)}"
        for each in aligner["versions"]
        if each["state"] in ("verifying", "loading", "draining")
    ]
    return ", ".join(moving) or "waiting"


def _tell(is_done: bool, told: dict[str, Any], *, is_json: bool) -> None:
    """Show what became of an order; exit code 3 if it is not done yet."""
    if is_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        _print_aligners([told])
        if not is_done:
            typer.echo("Not done yet; `ram aligner list` tells how far it is.", err=True)
    raise typer.Exit(0 if is_done else NOT_YET)


def _weights(items: list[str]) -> dict[str, float]:
    """Weights of VERSION[=WEIGHT] items; raises ValueError for what is none, or is given twice."""
    weights: dict[str, float] = {}
    for item in items:
        version, _, weight = item.partition("=")
        if version in weights:
            raise ValueError(f"`{version}` is given twice")
        try:
            weights[version] = float(weight or 1)
        except ValueError:
            raise ValueError(f"`{item}` is not VERSION or VERSION=WEIGHT") from None
    return weights


def _without_none(**fields: object) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _print_aligners(aligners: list[dict[str, Any]]) -> None:
    if not aligners:
        typer.echo("There are no aligners.")
        return
    table = new_table("aligner", "version", "share", "state", "MiB", "device", "requests", "last used", "")
    for aligner in aligners:
        for version in aligner["versions"]:
            add_row(table, aligner["name"], *_cells_of(aligner, version))
    console = make_console()
    console.print(table)
    for aligner in aligners:
        for version in aligner["versions"]:
            if version["reason"]:
                console.print(f"{aligner['name']}@{version['version']}: {version['reason']}", markup=False)


def _cells_of(aligner: dict[str, Any], version: dict[str, Any]) -> list[str]:
    name = version["version"]
    share = _percent(aligner["shares"].get(name))
    if aligner["next_shares"] is not None:
        share = f"{share or '0%'} → {_percent(aligner['next_shares'].get(name)) or '0%'}"
    return [
        name,
        share,
        _state_of(version),
        f"{version['bytes'] / 2**20:.1f}" if version["bytes"] else "",
        version["device"],
        str(version["references"]),
        _ago(version["last_used"]),
        " ".join(word for word in ("pinned", "preset") if version[word]),
    ]


def _measures_of(measured: dict[str, Any]) -> list[str]:
    means = [measured["mean_kl_p_q"], measured["mean_kl_pi_p"], measured["mean_ess"]]
    num_aligned = measured["aligned_tokens"]
    return [
        *(f"{measured[field]:,}" for field in ("requests", "errors", "tokens")),
        *("–" if mean is None else f"{mean:.3f}" for mean in means),
        f"{measured['fallbacks'] / num_aligned:.1%}" if num_aligned else "–",
    ]


def _state_of(version: dict[str, Any]) -> str:
    if version["waits_for"]:
        return f"{version['state']}, waits for {'its turn' if version['waits_for'] == 'turn' else 'memory'}"
    if version["state"] in ("verifying", "loading"):
        return f"{version['state']} {version['progress']:.0%}"
    return str(version["state"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3g}" if share < 0.001 else f"{100 * share:.3g}%"


def _ago(last_used: float | None) -> str:
    if last_used is None:
        return "never"
    seconds = max(0, time.time() - last_used)
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
