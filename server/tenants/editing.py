"""Changes to `tenants.toml` that leave everything else in it, comments too, as it was."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import AoT, Array

from server.tenants.book import TenantsError, parse_tenants
from server.tenants.keys import Seal, new_key
from server.tenants.policy import check_tenant_name


def add_tenant(path: Path, name: str) -> str:
    """Add a tenant to the file, which is made if there is none; the tenant's key.

    Raises:
        TenantsError: the file cannot be used, or has such a tenant.
    """
    try:
        check_tenant_name(name)
    except ValueError as error:
        raise TenantsError(f"`{name[:64]}`: {error}") from None
    key, entry = _new_entry()
    with _edited(path, is_made=True) as document:
        tenants = _tenants_of(document)
        if name in tenants:
            raise TenantsError(
                f"{path}: there is a tenant `{name}` already; `ram tenant rotate` renews its key."
            )
        table = tomlkit.table()
        table["keys"] = tomlkit.array()
        _append(table["keys"], entry)
        tenants[name] = table
    return key


def rotate_key(path: Path, name: str, *, keep_s: float, now: datetime | None = None) -> str:
    """Give a tenant a new key; of those before, the newest stays valid for `keep_s` seconds.

    Raises:
        TenantsError: the file cannot be used, or has no such tenant.
    """
    now = now or datetime.now(UTC)
    key, entry = _new_entry()
    with _edited(path) as document:
        table = _tenant_of(document, path, name)
        keys = table.setdefault("keys", tomlkit.array())
        valid = [index for index, key in enumerate(keys) if "expires" not in key or key["expires"] > now]
        kept = valid[-1:] if keep_s else []
        until = (now + timedelta(seconds=keep_s)).replace(microsecond=0)
        for index in reversed(range(len(keys))):
            if index in kept:
                keys[index]["expires"] = min(until, keys[index].get("expires", until))
            else:
                del keys[index]
        _append(keys, entry)
    return key


def remove_tenant(path: Path, name: str) -> None:
    """Raises `TenantsError` if the file cannot be used, or has no such tenant."""
    with _edited(path) as document:
        _tenant_of(document, path, name)
        del document["tenants"][name]


def _new_entry() -> tuple[str, dict[str, str]]:
    key, key_id = new_key()
    return key, {"id": key_id, "hash": str(Seal.of(key.encode()))}


def _append(keys: Array | AoT, entry: dict[str, str]) -> None:
    """Add a key to an array, or to tables `[[tenants.NAME.keys]]`, whichever the file has."""
    if isinstance(keys, AoT):
        keys.append(tomlkit.item(entry))
        return
    line = tomlkit.inline_table()
    line.update(entry)
    keys.append(line)
    keys.multiline(True)


def _tenants_of(document: tomlkit.TOMLDocument) -> Any:
    return document.setdefault("tenants", tomlkit.table(is_super_table=True))


def _tenant_of(document: tomlkit.TOMLDocument, path: Path, name: str) -> Any:
    tenants = _tenants_of(document)
    if name not in tenants:
        raise TenantsError(f"{path}: there is no tenant `{name[:64]}`.")
    return tenants[name]


@contextmanager
def _edited(path: Path, *, is_made: bool = False) -> Iterator[tomlkit.TOMLDocument]:
    """The file's content, to be changed; replaced as a whole afterwards, if it can still be used.

    Others who edit it wait, and readers see the old file or the new one.
    """
    # A link stays a link.
    path = path.resolve()
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            text = "" if is_made and not path.exists() else path.read_text(encoding="utf-8")
            _check(path, text)
            document = tomlkit.parse(text)
            yield document
            changed = tomlkit.dumps(document)
            _check(path, changed)
            _replace(path, changed)
            os.fsync(folder)
        finally:
            os.close(folder)
    except UnicodeDecodeError:
        raise TenantsError(f"{path}: it is not UTF-8.") from None
    except OSError as error:
        raise TenantsError(f"{path} cannot be changed: {error.strerror or error}.") from None


def _check(path: Path, text: str) -> None:
    try:
        parse_tenants(text)
    except TenantsError as error:
        raise TenantsError(f"{path}: {error}") from None


def _replace(path: Path, text: str) -> None:
    """Write a file that nobody else may read, and put it in the other's place."""
    file, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    new = Path(name)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
