"""What aligners and their versions may be called: names become paths and labels, so they are plain."""

from __future__ import annotations

import re

MANIFEST_FILE = "aligner.json"
CONFIG_FILES = ("config.json", "adapter_config.json")
"""One of them makes a directory a model, or a LoRA adapter."""
SELF = "self"
"""In a list of terms, the model in the aligner's own directory."""

RESERVED = frozenset({SELF, "proposal", "identity"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII)
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_UNFINISHED = (".partial", ".tmp")


def require_name(name: str, field: str = "name") -> str:
    """The name itself, which may be `org/name`; raises ValueError if no aligner may be called so."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"`{field}` must be letters, digits, `.`, `_` and `-`, at most 96, not first a sign; got {name!r}"
        )
    if name in RESERVED:
        raise ValueError(f"`{field}` must not be {name!r}, which has a meaning of its own")
    return name


def require_version(version: str, field: str = "version") -> str:
    """The version itself; raises ValueError if none may be called so."""
    if not _VERSION.fullmatch(version):
        raise ValueError(
            f"`{field}` must be letters, digits, `.`, `_` and `-`, "
            f"at most 64, not first a sign; got {version!r}"
        )
    return version


def is_passed_over(file_name: str) -> bool:
    """Whether a file or directory is hidden, or named as what is still being written."""
    return file_name.startswith(".") or file_name.endswith(_UNFINISHED)
