"""The tenants of a running server: who calls, what they may still ask for, and what the file says now."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.settings import Settings, SettingsError
from server.tenants.book import TenantBook, TenantsError, read_tenants
from server.tenants.keys import Seal
from server.tenants.limits import Ledger
from server.tenants.policy import ANYBODY, Tenant

POLL_S = 0.5
"""How often the file is looked at: a changed one counts within so many seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with which key, and the ledger that the request is entered in."""

    tenant: Tenant
    key_id: str
    ledger: Ledger

    @property
    def is_anybody(self) -> bool:
        """Whether the server has no tenants."""
        return self.tenant is ANYBODY


class Tenants:
    """Who may call; everybody, if neither a file nor a key was configured."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises `SettingsError` for a file that cannot be used."""
        self._path: Path | None = settings.tenants_file
        self._is_open = settings.needs_no_key
        self._num_places = settings.num_places
        self._clock = clock
        self._wall_clock = wall_clock
        self._environment_key = _seal_of(settings, "api_key")
        self._admin_key = _seal_of(settings, "admin_key")
        self._ledgers: dict[str, Ledger] = {}
        self._anybody = Caller(ANYBODY, "", Ledger(ANYBODY.limits, self._num_places, clock))
        self._seen = _look(self._path)
        try:
            self._open(self._read())
        except TenantsError as error:
            raise SettingsError(f"`tenants_file` {self._path}: {error}") from None

    @property
    def is_open(self) -> bool:
        """Whether anybody may call."""
        return self._is_open

    @property
    def has_keys(self) -> bool:
        """Whether there is any key to ask for, be it the admin's alone."""
        return not self.is_open or self._admin_key is not None

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin's key."""
        return self._admin_key is not None

    @property
    def num_tenants(self) -> int:
        return len(self._book.tenants)

    @property
    def file(self) -> Path | None:
        """Where tenants are read from."""
        return self._path

    def find(self, key: bytes | None) -> Caller | None:
        """Who calls with this key; None for a key that opens nothing."""
        if self.is_open:
            return self._anybody
        found = None if key is None else self._book.find(key, self._wall_clock())
        if found is None:
            return None
        tenant, key_id = found
        return Caller(tenant, key_id, self._ledgers[tenant.name])

    def is_admin(self, key: bytes | None) -> bool:
        """Whether this is the admin's key."""
        return key is not None and self._admin_key is not None and self._admin_key.fits(key)

    def reload(self) -> None:
        """Read the file again; one that cannot be used changes nothing, and is told about in one line."""
        try:
            self._open(self._read())
        except TenantsError as error:
            logger.error("Refused the changed %s: %s. The tenants stay as they were.", self._path, error)
        else:
            logger.info("Read %s: %d tenants.", self._path, self.num_tenants)

    async def watch(self) -> None:
        """Reload the file whenever it has changed, for ever."""
        while self._path is not None:
            await asyncio.sleep(POLL_S)
            seen = await asyncio.to_thread(_look, self._path)
            if seen != self._seen:
                self._seen = seen
                self.reload()

    def _read(self) -> TenantBook:
        return TenantBook(read_tenants(self._path) if self._path else (), self._environment_key)

    def _open(self, book: TenantBook) -> None:
        """Let the book count from now on; tenants that stay keep what they have used."""
        before = self._ledgers
        self._book = book
        self._ledgers = {}
        for tenant in book.tenants:
            ledger = before.get(tenant.name)
            if ledger is None:
                ledger = Ledger(tenant.limits, self._num_places, self._clock)
            else:
                ledger.configure(tenant.limits, self._num_places)
            self._ledgers[tenant.name] = ledger


def _seal_of(settings: Settings, name: str) -> Seal | None:
    secret = getattr(settings, name)
    text = secret.get_secret_value() if secret is not None else ""
    try:
        return Seal.of_setting(text) if text else None
    except ValueError as error:
        raise SettingsError(f"`{name}`: {error}") from None


def _look(path: Path | None) -> tuple[int, int, int] | None:
    """What differs when a file was written or replaced; None while there is none."""
    try:
        stat = path.stat() if path else None
    except OSError:
        return None
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else None
