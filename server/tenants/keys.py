"""API keys: made, sealed for a file, and recognised."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

_PREFIX = "ram"
_SCHEME = "blake2b"
_ID_BYTES, _SECRET_BYTES, _SALT_BYTES, _DIGEST_BYTES = 6, 32, 16, 32


@dataclass(frozen=True, slots=True)
class Seal:
    """What is kept of a key: it recognises the key, and tells nothing of it.

    Keys that we make hold 256 random bits. Nobody can try them all, however fast the hash: a slow one would
    only cost time on every request. The salt is each seal's own, so that equal keys do not look equal.
    """

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, key: bytes) -> Seal:
        """Seal a key with a new salt."""
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(salt, _digest(key, salt))

    @classmethod
    def parse(cls, text: str) -> Seal:
        """The seal that `str` wrote; raises ValueError for anything else."""
        scheme, _, rest = text.partition(":")
        salt, _, digest = rest.partition(":")
        try:
            seal = cls(bytes.fromhex(salt), bytes.fromhex(digest))
        except ValueError:
            seal = cls(b"", b"")
        if scheme != _SCHEME or (len(seal.salt), len(seal.digest)) != (_SALT_BYTES, _DIGEST_BYTES):
            raise ValueError(f"not a sealed key such as {_SCHEME}:SALT:DIGEST, in hexadecimal digits")
        return seal

    @classmethod
    def of_setting(cls, text: str) -> Seal:
        """Of what a deployment's settings give, a key or its seal; raises ValueError for a bad seal."""
        return cls.parse(text) if text.startswith(f"{_SCHEME}:") else cls.of(text.encode())

    def fits(self, key: bytes) -> bool:
        """Whether this is the key, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(_digest(key, self.salt), self.digest)

    def __str__(self) -> str:
        return f"{_SCHEME}:{self.salt.hex()}:{self.digest.hex()}"


def _digest(key: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(key, key=salt, digest_size=_DIGEST_BYTES).digest()


NOBODYS = Seal.of(secrets.token_bytes(_SECRET_BYTES))
"""No key fits; tried where no key has the id that is asked for, so that the answer takes as long."""


def new_key() -> tuple[str, str]:
    """A key that nobody had before, and its id, which is its beginning and no secret."""
    key_id = secrets.token_hex(_ID_BYTES)
    return f"{_PREFIX}-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}", key_id


def id_of(key: bytes) -> str:
    """The id that a key claims to have; empty for what is not of our making."""
    prefix, _, rest = key.partition(b"-")
    key_id, _, secret = rest.partition(b"-")
    if prefix != _PREFIX.encode() or len(key_id) != 2 * _ID_BYTES or not key_id.isalnum() or not secret:
        return ""
    return key_id.decode("ascii")
