"""All tenants, as `tenants.toml` and the environment name them: whose key is this?"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ram_core.errors import RamError
from server.tenants.keys import NOBODYS, Seal, id_of
from server.tenants.policy import Tenant

DEFAULT_TENANT = "default"
"""Whom the key of the environment belongs to."""


class TenantsError(RamError):
    """A tenants' file that cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class _Entry:
    seal: Seal
    tenant: Tenant
    key_id: str
    expires_s: float | None


class TenantBook:
    """The tenants of one moment. A key is found by its id, so that a thousand tenants take no longer."""

    def __init__(self, tenants: Iterable[Tenant] = (), environment_key: Seal | None = None) -> None:
        """Raises `TenantsError` if two tenants share a name, or two keys an id."""
        self.tenants = tuple(tenants)
        self._by_id: dict[str, _Entry] = {}
        for tenant in self.tenants:
            for key in tenant.keys:
                expires_s = key.expires.timestamp() if key.expires else None
                entry = _Entry(Seal.parse(key.hash), tenant, key.id, expires_s)
                if self._by_id.setdefault(key.id, entry) is not entry:
                    raise TenantsError(f"Two keys have the id `{key.id}`.")
        # Found by no id: the operator chose it. It is what is tried when nobody else fits.
        self._fallback = _Entry(NOBODYS, Tenant(name=DEFAULT_TENANT), "", None)
        if environment_key is not None:
            if any(tenant.name == DEFAULT_TENANT for tenant in self.tenants):
                raise TenantsError(
                    f"`{DEFAULT_TENANT}` is the tenant of the environment's key; choose another name."
                )
            self._fallback = _Entry(environment_key, self._fallback.tenant, "environment", None)
            self.tenants = (*self.tenants, self._fallback.tenant)

    def find(self, key: bytes, now_s: float) -> tuple[Tenant, str] | None:
        """Whose key this is, and its id; `now_s` in seconds since 1970. One hash, whatever the answer."""
        entry = self._by_id.get(id_of(key), self._fallback)
        if not entry.seal.fits(key) or (entry.expires_s is not None and now_s >= entry.expires_s):
            return None
        return entry.tenant, entry.key_id


def parse_tenants(text: str) -> list[Tenant]:
    """The tenants of a file's text; raises `TenantsError` naming the field at fault."""
    try:
        data: Mapping[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TenantsError(f"not valid TOML: {error}") from None
    if unknown := set(data) - {"tenants"}:
        raise TenantsError(f"`{min(unknown)}` is not a known field; tenants are tables [tenants.NAME]")
    tables = data.get("tenants", {})
    if not isinstance(tables, dict):
        raise TenantsError("`tenants` must be a table of tables [tenants.NAME]")
    return [_parse_tenant(name, table) for name, table in tables.items()]


def _parse_tenant(name: str, table: object) -> Tenant:
    if not isinstance(table, dict) or "name" in table:
        raise TenantsError(f"`tenants.{name[:64]}` must be a table, without a `name` inside")
    try:
        return Tenant.model_validate({**table, "name": name})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise TenantsError(f"`tenants.{name[:64]}{place}`: {reason[:1].lower()}{reason[1:]}") from None


def read_tenants(path: Path) -> list[Tenant]:
    """The tenants of a file; raises `TenantsError`, which does not name the file."""
    try:
        return parse_tenants(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TenantsError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TenantsError("not valid TOML: it is not UTF-8") from None
