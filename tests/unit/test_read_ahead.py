"""Files are in the system's memory before those who compute with them ask for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ram_core.aligners import files
from ram_core.aligners.files import read_ahead
from ram_core.aligners.pack import Wishes, pack
from ram_core.models import loading
from ram_core.models.loading import load_config
from ram_core.models.vocabulary import load_tokenizer
from server.aligners import checking
from server.aligners.checking import Checker
from server.aligners.known import Origin, read_known
from tests.models import save_model, save_pair

NUM_BYTES = 3 << 20


def is_in_memory(path: Path) -> bool:
    """Whether a file's middle can be read without the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        return bool(os.preadv(file, [bytearray(1)], NUM_BYTES // 2, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    finally:
        os.close(file)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that the system has dropped from its memory."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NUM_BYTES))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were read in each call."""
    counts: list[int] = []
    send = os.sendfile

    def watch(target: int, source: int, at: int, count: int) -> int:
        counts.append(send(target, source, at, count))
        return counts[-1]

    monkeypatch.setattr(os, "sendfile", watch)
    return counts


def test_a_file_is_in_memory_after_it(path: Path) -> None:
    try:
        if is_in_memory(path):
            pytest.skip("this file system keeps its files in memory")
    except OSError as error:
        pytest.skip(f"this file system does not tell: {error}")
    read_ahead([path])
    assert is_in_memory(path)


def test_all_files_are_read_to_their_ends_but_no_more_than_some_bytes(
    path: Path, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_AHEAD_CHUNK_BYTES", 1 << 20)
    read_ahead([path, path])
    assert sum(sent) == 2 * NUM_BYTES
    sent.clear()
    monkeypatch.setattr(files, "_MAX_AHEAD_BYTES", NUM_BYTES + 1000)
    read_ahead([path, path])
    assert sum(sent) == NUM_BYTES + 1000


def test_it_ends_when_nobody_wants_it_any_more(path: Path, sent: list[int]) -> None:
    read_ahead([path], lambda: False)
    assert not sent


def test_what_cannot_be_read_is_no_trouble(path: Path, sent: list[int]) -> None:
    read_ahead([path.with_name("missing"), path.parent])
    assert not sent


def test_small_files_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(checking, "read_ahead", lambda paths, is_wanted: read.extend(paths))
    proposal, aligners = save_pair(tmp_path, aligners=("polite",))
    pack(aligners["polite"], Wishes(name="polite", version="1"))
    known = read_known("polite", aligners["polite"], tmp_path, Origin.ADMIN)
    checker = Checker(load_tokenizer(str(proposal)), load_config(str(proposal)).vocab_size)
    checker.check(known)
    checker.require_unchanged(known)
    sizes = [path.stat().st_size for path in read]
    assert len(sizes) == len(list(aligners["polite"].iterdir()))
    assert sizes == sorted(sizes)


def test_one_skeleton_serves_all_of_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = loading.build_skeleton

    def watch(config: object, **options: bool) -> object:
        built.append(config.hidden_size)  # type: ignore[attr-defined]
        return build(config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "build_skeleton", watch)
    loading._known_skeleton.cache_clear()
    for name, hidden in (("a", 16), ("b", 16), ("c", 24), ("d", 16)):
        path = save_model(tmp_path / name, "llama", seed=len(name), hidden=hidden)
        loading.check_weights(str(path), load_config(str(path)))
    assert built == [16, 24]
    # Code of its own may differ where the config does not.
    loading.check_weights(str(path), load_config(str(path)), trust_remote_code=True)
    assert built == [16, 24, 16]
