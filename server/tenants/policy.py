"""What a tenant may do: one table of `tenants.toml`, validated and frozen."""

from __future__ import annotations

import re
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from server.tenants.keys import Seal

MAX_KEYS = 2
"""The one in use, and the one that replaces it or is replaced."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}")
_KEY_ID = re.compile(r"[0-9a-z]{12}")

LogPolicy = Literal["none", "usage", "full"]


def check_tenant_name(name: str) -> str:
    """The name itself; raises ValueError unless it is fit for files, labels and logs."""
    if not _NAME.fullmatch(name):
        raise ValueError("a tenant's name has 1 to 64 letters, digits, `.`, `_` or `-`, and begins with none")
    return name


def _check_key_id(key_id: str) -> str:
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError("a key's id is what stands between the first two dashes of the key")
    return key_id


def _check_hash(text: str) -> str:
    Seal.parse(text)
    return text


def _check_zone(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone, such as 2030-01-31T12:00:00Z")
    return moment


def _one_or_many(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""Names, or shell patterns such as "acme-*"."""
Positive = Annotated[int, Field(ge=1)]
PrefixGroup = Annotated[str, Field(max_length=64)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Key(_Table):
    """A key that opens the door until it `expires`, or for good."""

    id: Annotated[str, AfterValidator(_check_key_id)]
    hash: Annotated[str, AfterValidator(_check_hash)]
    expires: Annotated[datetime, AfterValidator(_check_zone)] | None = None


class Limits(_Table):
    """How much a tenant may ask for; None is as much as there is.

    `requests_per_minute`, `tokens_per_minute` (of prompts and answers) and `concurrent_requests` are over all
    requests, `max_tokens` and `max_n` for each. `queue_share` is the part of the engine's places (sequences
    that run and that wait) which the tenant may hold at once.
    """

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None
    max_tokens: Positive | None = None
    max_n: Positive | None = None
    queue_share: Annotated[float, Field(gt=0, le=1)] = 1.0


UNLIMITED = Limits()


class Tenant(_Table):
    """Whom a key belongs to. Of all that wait, a lower `priority` is served first.

    A tenant sees, and may use, the `aligners` that fit its patterns, and the proposal alone if its name fits
    `models`. `log` is what the usage log tells: nothing, the usage, or also what was asked and answered.
    Tenants of one `prefix_group` find each other's prefixes in KV memory; without one, nobody else does.
    """

    name: Annotated[str, AfterValidator(check_tenant_name)]
    keys: Annotated[tuple[Key, ...], BeforeValidator(_one_or_many), Field(max_length=MAX_KEYS)] = ()
    default_aligner: str = ""
    aligners: Patterns = ("*",)
    models: Patterns = ("*",)
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    log: LogPolicy = "usage"
    prefix_group: PrefixGroup = ""
    limits: Limits = UNLIMITED


def fits(name: str, patterns: Patterns) -> bool:
    """Whether any of the patterns fits the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


ANYBODY = Tenant.model_construct(name="")
"""Whoever asks a server that has no tenants."""
