"""Who must go, so that another version fits into memory. Plain Python."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ram_core.aligners.states import Version, VersionKey


class Room:
    """The memory for weights while it is decided what to load: what is free, and what is being freed."""

    def __init__(self, versions: Iterable[Version], memory_bytes: int) -> None:
        self._versions = list(versions)
        self._coming_bytes = sum(version.held_bytes for version in self._versions if version.is_freeing)
        self._free_bytes = memory_bytes - sum(version.held_bytes for version in self._versions)

    def reserve(self, need_bytes: int, protected: Collection[VersionKey]) -> tuple[bool, list[Version]]:
        """Whether so much is free at once, and who must be freed for it: the least recently used first.

        What is reserved is gone for those who ask later, unless no room can be made at all; then nobody goes.
        """
        shortage = need_bytes - self._free_bytes - self._coming_bytes
        victims: list[Version] = []
        for version in self._idle(protected) if shortage > 0 else ():
            victims.append(version)
            shortage -= version.held_bytes
            if shortage <= 0:
                break
        if shortage > 0:
            return False, []
        self._coming_bytes += sum(version.held_bytes for version in victims)
        at_once = min(need_bytes, self._free_bytes)
        self._free_bytes -= at_once
        self._coming_bytes -= need_bytes - at_once
        return at_once == need_bytes, victims

    def _idle(self, protected: Collection[VersionKey]) -> list[Version]:
        """What may be evicted, the least recently used first."""
        idle = [
            version
            for version in self._versions
            if version.is_loaded
            and not (version.num_references or version.is_pinned or version.is_virtual)
            and version.key not in protected
        ]
        return sorted(idle, key=lambda version: (version.last_used_s, version.key))
