"""Where a model's files are: a local directory, or the hub's copy of it. Never imports torch."""

from __future__ import annotations

import re
from pathlib import Path

from ram_core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
# Subfolders and consolidated files hold the same weights once more.
_IGNORED_FILES = ["*/*", "consolidated*"]


def resolve_source(source: str, *, with_weights: bool) -> Path:
    """The directory of `source`: a local one as it is, or a hub id (`org/name`) after a download.

    Without `with_weights`, only configs and tokenizers are downloaded. Works offline if the hub's files are
    in its cache.

    Raises:
        CheckpointError: no such directory, or the hub does not give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"`{source}` is a file, not a directory with a model")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"`{source}`: no such directory")
    return _download(source, with_weights=with_weights)


def fetch_from_hub(hub_id: str) -> Path:
    """The hub's copy of `org/name`, whatever lies in the working directory.

    Raises:
        CheckpointError: that is no hub id, or the hub does not give it.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(f"`{hub_id[:200]}` is no id of the hub's, such as org/name")
    return _download(hub_id, with_weights=True)


def one_line(error: BaseException, max_chars: int = 240) -> str:
    """What a foreign error says, in its first sentence or so; its kind if it says nothing."""
    text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _download(hub_id: str, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = _DESCRIPTION_FILES + (["*.safetensors"] if with_weights else [])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=_IGNORED_FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{hub_id}`: no such directory, and the model hub does not give it ({one_line(error)})"
        ) from None
