"""Events out of bytes, wherever those were cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.sse import EventParser


def parse(*pieces: bytes) -> list[bytes]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(
    ("raw", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\n\n", [b""]),
        (b": ping\n\ndata: a\n\n", [b"a"]),
        (b"event: message\nid: 7\ndata: a\nretry: 3\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a\n", []),
        (b"database: a\n\n", []),
        (b'data: {"x": "a: b"}\n\n', [b'{"x": "a: b"}']),
        ("data: dé 🙂\n\n".encode(), ["dé 🙂".encode()]),
    ],
)
def test_the_grammar(raw, events):
    assert parse(raw) == events


LINE_ENDS = [b"\n", b"\r\n", b"\r"]


@st.composite
def cut_streams(draw):
    """A stream of events with any line ends, comments between, and the pieces it comes in."""
    payloads = draw(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8), max_size=6)
    )
    end = draw(st.sampled_from(LINE_ENDS))
    blocks = []
    for payload in payloads:
        if draw(st.booleans()):
            blocks.append(b": keep-alive" + end + end)
        blocks += [b"data: " + line.encode() + end for line in payload.split("\n")] + [end]
    raw = b"".join(blocks)
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return [payload.encode() for payload in payloads], pieces


@pytest.mark.parametrize("end", LINE_ENDS)
def test_no_single_cut_changes_anything(end):
    """Every place, so also between the CR and the LF of a line within an event."""
    raw = b"data: a\ndata: b\n\n: c\n\ndata: d\n\n".replace(b"\n", end)
    for cut in range(len(raw) + 1):
        assert parse(raw[:cut], b"", raw[cut:]) == [b"a\nb", b"d"]


@given(cut_streams())
def test_cuts_change_nothing(stream):
    payloads, pieces = stream
    assert parse(*pieces) == payloads


@pytest.mark.parametrize("end", LINE_ENDS)
def test_an_event_is_out_with_its_last_byte(end):
    """Not with the next one's first: its time would be wrong by a whole gap."""
    parser = EventParser()
    for payload in (b"a", b"b", b"c"):
        *before, last = (bytes([value]) for value in b"data: " + payload + end + end)
        early = [event for byte in before for event in parser.feed(byte)]
        # After CR alone, a LF could still follow: the line has ended all the same.
        assert early + parser.feed(last) == [payload]
        assert early == ([] if end != b"\r\n" else [payload])
