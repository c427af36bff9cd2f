"""`ram tenant`: who may call a server. What it does to the file is in `server.tenants.editing`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ram_core.errors import RamError
from server.commands.failing import fail

tenant_app = typer.Typer(
    help="Who may call: tenants and their keys. A running server takes changes up by itself.",
    no_args_is_help=True,
)

NameArgument = Annotated[str, typer.Argument(help="The tenant's name.")]
FileFlag = Annotated[Path, typer.Option("--file", envvar="RAM_TENANTS_FILE", help="The tenants' file.")]
DEFAULT_FILE = Path("tenants.toml")


@tenant_app.command()
def add(name: NameArgument, file: FileFlag = DEFAULT_FILE) -> None:
    """Add a tenant, and print its key: it is shown this once, and kept nowhere."""
    from server.tenants.editing import add_tenant

    try:
        typer.echo(add_tenant(file, name))
    except RamError as error:
        fail(error)


@tenant_app.command()
def rotate(
    name: NameArgument,
    file: FileFlag = DEFAULT_FILE,
    keep_hours: Annotated[
        float, typer.Option(min=0, help="How long the key in use stays valid beside the new one.")
    ] = 24.0,
) -> None:
    """Give a tenant a new key, and print it; the one in use stays valid for a while."""
    from server.tenants.editing import rotate_key

    try:
        typer.echo(rotate_key(file, name, keep_s=keep_hours * 3600))
    except RamError as error:
        fail(error)


@tenant_app.command("list")
def list_tenants(file: FileFlag = DEFAULT_FILE) -> None:
    """Show the tenants, and the ids of their keys."""
    from rich.console import Console

    from server.tenants.book import TenantsError, read_tenants

    try:
        tenants = read_tenants(file)
    except TenantsError as error:
        fail(f"{file}: {error}")
    console = Console(soft_wrap=True, highlight=False)
    for tenant in tenants:
        keys = [f"{key.id} until {key.expires.isoformat()}" if key.expires else key.id for key in tenant.keys]
        console.print(f"{tenant.name}  {', '.join(keys) or 'no key'}", markup=False)


@tenant_app.command()
def remove(name: NameArgument, file: FileFlag = DEFAULT_FILE) -> None:
    """Remove a tenant; its keys open nothing any more."""
    from server.tenants.editing import remove_tenant

    try:
        remove_tenant(file, name)
    except RamError as error:
        fail(error)


@tenant_app.command("admin-key")
def admin_key() -> None:
    """Print a new admin's key, and on a second line what to set RAM_ADMIN_KEY to."""
    from server.tenants.keys import Seal, new_key

    key, _ = new_key()
    typer.echo(f"{key}\nRAM_ADMIN_KEY={Seal.of(key.encode())}")
