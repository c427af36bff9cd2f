"""The usage log: a line of JSON for each request that has ended, there as soon as it has."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ram_core.errors import RamError

_WARN_EVERY_S = 60.0

logger = logging.getLogger(__name__)


class UsageLogError(RamError):
    """The log cannot be opened."""


class UsageRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request used. `status` is what the client was told, whether as a status or inside a stream.

    `versions` are those that answered, as NAME@VERSION; none for the proposal. `prompts` and `answers` are
    there only for tenants whose log policy is "full".
    """

    time: str
    tenant: str
    key: str
    request: str
    model: str
    aligner: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str
    status: int
    seconds: float
    versions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def timestamp(now_s: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC, to the millisecond."""
    return datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class UsageLog:
    """Appends records to a file; a file that cannot be written is counted, and fails no request.

    Each line is one write to a file opened for appending: it is the kernel's as soon as `write` returns, so
    that killing the process loses no line, and processes that share a file do not write into each other's.
    """

    def __init__(self, path: Path, on_error: Callable[[], None], clock: Callable[[], float] = time.monotonic):
        """Raises `UsageLogError` if the file cannot be opened."""
        self._path = path
        self._on_error = on_error
        self._clock = clock
        self._warned_s = -_WARN_EVERY_S
        self._file, self._is_torn = _open(path)

    def write(self, record: UsageRecord) -> None:
        """Append one line."""
        # A line that a full disk cut short is ended first, so that it spoils no other.
        line = b"\n" * self._is_torn + msgspec.json.encode(record) + b"\n"
        try:
            num_written = os.write(self._file, line)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        if num_written:
            self._is_torn = num_written < len(line)
        if num_written < len(line):
            self._fail("there is no room for a whole line")

    def reopen(self) -> None:
        """Go on in the file that has the path now; if that cannot be, in the old one."""
        try:
            file, is_torn = _open(self._path)
        except UsageLogError as error:
            logger.warning("%s The old file is written on.", error)
            return
        os.close(self._file)
        self._file, self._is_torn = file, is_torn

    def close(self) -> None:
        os.close(self._file)

    def _fail(self, reason: str) -> None:
        self._on_error()
        if self._clock() - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = self._clock()
            logger.warning("The usage log %s loses lines: %s.", self._path, reason)


def _open(path: Path) -> tuple[int, bool]:
    """The file's descriptor, and whether its last line has no end."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageLogError(f"The usage log {path} cannot be opened: {error.strerror or error}.") from None
    try:
        size = os.fstat(file).st_size
        return file, size > 0 and os.pread(file, 1, size - 1) != b"\n"
    except OSError:
        # A pipe, a terminal: it has no past.
        return file, False
