"""Server-sent events out of raw bytes, however the network has cut them."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Collects the `data` of events; names, ids and comments are read over, as we have no use for them.

    Follows the HTML standard's grammar: lines end with LF, CRLF or CR, several `data` lines are joined with
    LF, and an event whose blank line has not come is not an event.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._is_first_line = True
        self._ignores_line_feed = False

    def feed(self, raw: bytes) -> list[bytes]:
        """The data of the events that these bytes complete, in order."""
        if self._ignores_line_feed and raw:
            raw = raw.removeprefix(b"\n")
            self._ignores_line_feed = False
        # A CR ends its line at once; if a LF comes with the next bytes, it belongs to that CR.
        self._ignores_line_feed = raw.endswith(b"\r") or (self._ignores_line_feed and not raw)
        *lines, self._rest = _LINE_END.split(self._rest + raw)
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> bytes | None:
        """Note one line; return an event's data if the line ends one."""
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        if not self._data:
            return None
        event = b"\n".join(self._data)
        self._data.clear()
        return event
