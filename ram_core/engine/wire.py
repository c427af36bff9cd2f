"""What the engine's process and its parent say to each other, and how: one frozen message, one frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from ram_core import errors
from ram_core.engine.config import EngineConfig
from ram_core.engine.limits import EngineLimits
from ram_core.engine.messages import AlignerOutcome, Command, EngineBegan, EngineStats, Event
from ram_core.errors import RamError

_ERRORS: dict[str, type[RamError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RamError)
}


class Load(Struct, frozen=True, tag=True, array_like=True):
    """The first order: load this, and log from `log_level` on."""

    config: EngineConfig
    log_level: int


class Stop(Struct, frozen=True, tag=True, array_like=True):
    """The last order: end, whatever still runs."""


Order = Load | Command | Stop


class Loading(Struct, frozen=True, tag=True, array_like=True):
    """Loading has come so far, in words."""

    line: str


class Refused(Struct, frozen=True, tag=True, array_like=True):
    """Loading failed, by an error that is fit for the operator."""

    error: RamError


class Ready(Struct, frozen=True, tag=True, array_like=True):
    """The models are loaded; orders are taken from now on."""

    limits: EngineLimits
    began: EngineBegan


class AlignersChanged(Struct, frozen=True, tag=True, array_like=True):
    """What became of aligners that were ordered or are to go, and the limits that hold from now on."""

    outcomes: tuple[AlignerOutcome, ...]
    limits: EngineLimits


class Report(Struct, frozen=True, tag=True, array_like=True):
    """All that one step told, and the engine's numbers after it; without events, a sign of life."""

    events: tuple[Event, ...]
    stats: EngineStats


News = Loading | Refused | Ready | AlignersChanged | Report


def _pack(value: Any) -> Any:
    if isinstance(value, RamError):
        return [type(value).__name__, str(value), vars(value)]
    raise NotImplementedError(f"{type(value)} does not cross the engine's boundary")


def _unpack(kind: type, value: Any) -> Any:
    if kind is RamError:
        name, message, fields = value
        return _ERRORS[name](message, **fields)
    raise NotImplementedError(f"{kind} does not cross the engine's boundary")


encode = msgspec.msgpack.Encoder(enc_hook=_pack).encode
"""Bytes of an order or of news; raises OverflowError for an integer beyond 64 bits."""
decode_order: Callable[[bytes], Order] = msgspec.msgpack.Decoder(Order, dec_hook=_unpack).decode
decode_news: Callable[[bytes], News] = msgspec.msgpack.Decoder(News, dec_hook=_unpack).decode
