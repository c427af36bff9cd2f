"""A manifest means what it says, or is refused by its field; a watched directory shows what is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ram_core.aligners.directory import AlignersDirectory, Changes
from ram_core.aligners.files import content_version, hash_files, list_files, take_snapshot
from ram_core.aligners.manifest import (
    MANIFEST_FILE,
    OWN_TERMS,
    FileRecord,
    Manifest,
    Term,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from ram_core.errors import CheckpointError
from ram_core.params import Resampling

LEAST: dict[str, Any] = {"name": "polite", "version": "v1"}
SHA = "0" * 64


def parse(**fields: Any) -> Manifest:
    return parse_manifest(json.dumps(LEAST | fields).encode(), "here")


def refusal(text: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(text, "here")
    assert "\n" not in str(caught.value)
    assert "`here`" in str(caught.value)
    return str(caught.value)


def test_the_least_manifest_has_the_defaults():
    assert parse() == Manifest(
        name="polite",
        version="v1",
        terms=OWN_TERMS,
        strength=1.0,
        resampling=Resampling.PRODUCT,
        kl_threshold=None,
        candidates=None,
        tokenizer="",
        license="",
        provenance={},
        files={},
    )


def test_what_is_written_is_read_again_and_is_always_the_same_text(tmp_path):
    manifest = Manifest(
        name="org/polite",
        version="2026.1",
        tokenizer=SHA,
        terms=(Term("self", 1.5), Term("./before", -0.5), Term("plain", -1.0)),
        strength=-2.0,
        resampling=Resampling.NUCLEUS,
        kl_threshold=0.25,
        candidates=20,
        license="Apache-2.0",
        provenance={"z": "last", "a": "first \u2028"},
        files={"b": FileRecord(SHA, 2, "e" * 64), "a/c": FileRecord("f" * 64, 0)},
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    raw = json.loads(manifest_bytes(manifest))
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in reversed(raw.items())
    }
    shuffled = parse_manifest(json.dumps(turned).encode(), "here")
    assert manifest_bytes(shuffled) == manifest_bytes(manifest) == (tmp_path / MANIFEST_FILE).read_bytes()
    assert manifest.parts == (".", "./before")
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_manifest(tmp_path, parse())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, parse(version="v2"))
    assert read_manifest(tmp_path) == parse()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"colour": "red"}, "`colour`"),
        ({"schema": 2}, "`schema` must be 1"),
        ({"name": "../up"}, "`name`"),
        ({"name": "identity"}, "`name`"),
        ({"name": "a/b/c"}, "`name`"),
        ({"name": "x" * 97}, "`name`"),
        ({"name": 3}, "$.name"),
        ({"version": "v/1"}, "`version`"),
        ({"version": ".v1"}, "`version`"),
        ({"version": "v1\n"}, "`version`"),
        ({"tokenizer": "abc"}, "`tokenizer`"),
        ({"terms": []}, "`terms`"),
        ({"terms": [{"model": "self"}, {"model": "self"}]}, "`terms`"),
        ({"terms": [{"model": "polite"}]}, "`terms`"),
        ({"terms": [{"model": "self", "weight": 101}]}, "$.terms[0]"),
        ({"terms": [{"model": "self", "weight": float("nan")}]}, "`weight`"),
        ({"terms": [{"model": "self", "weight": "1"}]}, "$.terms[0].weight"),
        ({"terms": [{"model": "./../up"}]}, "`model`"),
        ({"terms": [{"model": "/etc"}]}, "`model`"),
        ({"terms": [{"model": "./"}]}, "`model`"),
        ({"terms": [{"model": "self", "path": "x"}]}, "`path`"),
        ({"strength": 101}, "`strength`"),
        ({"strength": True}, "$.strength"),
        ({"resampling": "lottery"}, "$.resampling"),
        ({"kl_threshold": -0.1}, "`kl_threshold`"),
        ({"kl_threshold": float("inf")}, "`kl_threshold`"),
        ({"candidates": 0}, "`candidates`"),
        ({"candidates": 257}, "`candidates`"),
        ({"candidates": 5.5}, "candidates"),
        ({"files": {"../up": {"sha256": SHA, "bytes": 1}}}, "`files`"),
        ({"files": {"./a": {"sha256": SHA, "bytes": 1}}}, "`files`"),
        ({"files": {"a//b": {"sha256": SHA, "bytes": 1}}}, "`files`"),
        ({"files": {"a\\b": {"sha256": SHA, "bytes": 1}}}, "`files`"),
        ({"files": {MANIFEST_FILE: {"sha256": SHA, "bytes": 1}}}, "`files`"),
        ({"files": {"a": {"sha256": "0" * 63, "bytes": 1}}}, "`sha256`"),
        ({"files": {"a": {"sha256": SHA, "bytes": -1}}}, "`bytes`"),
        ({"files": {"a": {"sha256": SHA, "bytes": 1, "blake3": "0" * 63}}}, "`blake3`"),
        ({"files": {"a": SHA}}, "$.files"),
        ({"provenance": {"a": 1}}, "$.provenance"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(fields, named):
    assert named in refusal(json.dumps(LEAST | fields).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name": "polite", "version": ' + b"1" * 5000 + b"}",
        b'{"name": "polite"}',
        json.dumps(LEAST).encode()[:-3],
    ],
)
def test_a_broken_manifest_is_one_line(text):
    refusal(text)


def test_a_field_that_is_said_twice_is_refused():
    assert "`name` is said twice" in refusal(b'{"name": "a", "version": "1", "name": "b"}')


def test_a_huge_manifest_is_not_read(tmp_path):
    (tmp_path / MANIFEST_FILE).write_bytes(b" " * (5 << 20))
    with pytest.raises(CheckpointError, match="larger"):
        read_manifest(tmp_path)


def write_model(directory: Path, fill: float = 0.0) -> Path:
    """Files as a model has them, small; nobody loads them here."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file({"w": np.full((4,), fill, np.float32)}, directory / "model.safetensors")
    return directory


def write_packed(directory: Path, name: str, version: str, fill: float = 0.0) -> Path:
    write_model(directory, fill)
    paths = list_files(directory)
    paths.pop(MANIFEST_FILE, None)
    files = {path: FileRecord(sha, paths[path].stat().st_size) for path, sha in hash_files(paths).items()}
    write_manifest(directory, Manifest(name=name, version=version, files=files))
    return directory


class Watch:
    """A watched directory whose time is set by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 0.0
        self.directory = AlignersDirectory(root, settle_s=2.0, clock=lambda: self.now_s)

    def poll(self) -> Changes:
        return self.directory.poll()

    def after(self, passed_s: float) -> Changes:
        self.now_s += passed_s
        return self.poll()

    @property
    def known(self) -> list[tuple[str, str]]:
        return [found.key for found in self.directory.known]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


def keys(found: tuple[Any, ...]) -> list[tuple[str, str]]:
    return [each.key for each in found]


def test_a_packed_version_is_taken_at_once_and_one_without_hashes_when_it_has_settled(watch):
    write_packed(watch.root / "polite" / "v1", "polite", "v1")
    write_model(watch.root / "terse" / "v1")
    write_model(watch.root / "plain")
    assert keys(watch.poll().appeared) == [("polite", "v1")]
    held_back = watch.after(1.9).held_back
    assert set(held_back) == {watch.root / "terse" / "v1", watch.root / "plain"}
    assert "may still be written" in held_back[watch.root / "plain"]
    hashed = content_version(list_files(watch.root / "plain"))
    assert keys(watch.after(0.1).appeared) == [("plain", hashed), ("terse", "v1")]
    assert not watch.after(9)
    assert watch.known == [("plain", hashed), ("polite", "v1"), ("terse", "v1")]


def test_at_a_start_what_is_there_counts_as_settled(watch):
    write_model(watch.root / "terse" / "v1")
    assert keys(watch.directory.poll(is_settled=True).appeared) == [("terse", "v1")]


def test_a_version_is_never_taken_while_it_is_copied(watch):
    """Byte by byte, in either order of files, with time passing: nothing appears before the last byte."""
    whole = write_packed(watch.root.parent / "whole", "polite", "v1")
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        target = watch.root / "polite"
        target.mkdir()
        paths = order(list(whole.iterdir()))
        total = sum(path.stat().st_size for path in paths)
        num_written = 0
        for path in paths:
            content = path.read_bytes()
            with (target / path.name).open("wb") as file:
                for start in range(0, len(content), 7):
                    num_written += file.write(content[start : start + 7])
                    file.flush()
                    changes = watch.after(0.5)
                    assert bool(changes.appeared) == (num_written == total), changes
        shutil.rmtree(target)
        assert keys(watch.poll().vanished) == [("polite", "v1")]


def test_truncated_weights_are_held_back_however_long_they_lie_there(watch):
    weights = write_model(watch.root / "polite" / "v1") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    watch.poll()
    assert "cut off" in watch.after(100).held_back[weights.parent]
    weights.unlink()
    watch.poll()
    assert "no weights" in watch.after(100).held_back[weights.parent]
    weights.write_bytes(content)
    watch.poll()
    assert keys(watch.after(100).appeared) == [("polite", "v1")]


def test_a_missing_shard_is_waited_for(watch):
    directory = write_model(watch.root / "polite" / "v1")
    index = {"weight_map": {"w": "model-1.safetensors", "x": "model-2.safetensors"}}
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    watch.poll()
    assert "shards are missing" in watch.after(100).held_back[directory]


@pytest.mark.parametrize("name", [".new", "new.partial", "new.tmp"])
def test_what_is_hidden_or_named_unfinished_is_passed_over_until_it_is_renamed(watch, name):
    for parent in (watch.root, watch.root / "polite"):
        hidden = write_packed(parent / name, "new" if parent == watch.root else "polite", "v1")
        changes = watch.after(100)
        assert not changes
        assert not changes.held_back
        hidden.rename(parent / ("new" if parent == watch.root else "v1"))
        assert len(watch.poll().appeared) == 1


def test_a_rewritten_version_stays_what_it_was_until_it_is_complete_again(watch):
    directory = write_packed(watch.root / "polite" / "v1", "polite", "v1")
    watch.poll()
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:10])
    changes = watch.after(100)
    assert not changes
    assert "10 of" in changes.held_back[directory]
    assert watch.known == [("polite", "v1")]
    write_packed(directory, "polite", "v1", fill=1.0)
    assert keys(watch.poll().changed) == [("polite", "v1")]
    assert not watch.poll()


def test_new_content_without_a_manifest_is_a_new_version(watch):
    write_model(watch.root / "plain")
    before = watch.directory.poll(is_settled=True).appeared
    write_model(watch.root / "plain", fill=1.0)
    watch.poll()
    changes = watch.after(2)
    assert changes.vanished == before
    assert [each.name for each in changes.appeared] == ["plain"]
    assert changes.appeared[0].version != before[0].version


def test_what_is_deleted_vanishes(watch):
    write_packed(watch.root / "polite" / "v1", "polite", "v1")
    write_packed(watch.root / "polite" / "v2", "polite", "v2")
    watch.poll()
    shutil.rmtree(watch.root / "polite" / "v1")
    assert keys(watch.poll().vanished) == [("polite", "v1")]
    shutil.rmtree(watch.root / "polite")
    assert keys(watch.poll().vanished) == [("polite", "v2")]


def test_if_the_directory_cannot_be_read_nothing_vanishes(watch):
    write_packed(watch.root / "polite" / "v1", "polite", "v1")
    watch.poll()
    elsewhere = watch.root.rename(watch.root.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        watch.poll()
    elsewhere.rename(watch.root)
    assert not watch.poll()
    assert watch.known == [("polite", "v1")]


def mislabel(root: Path) -> Path:
    return write_packed(root / "polite" / "v1", "polite", "v2")


def misname(root: Path) -> Path:
    return write_packed(root / "rude", "polite", "v1")


def link_out(root: Path) -> Path:
    outside = write_packed(root.parent / f"{root.name}-outside", "polite", "v1")
    (root / "polite").symlink_to(outside)
    return root / "polite"


def link_versions_out(root: Path) -> Path:
    outside = root.parent / f"{root.name}-outside"
    write_packed(outside / "v1", "polite", "v1")
    (root / "polite").symlink_to(outside)
    return root / "polite"


def link_a_version_out(root: Path) -> Path:
    outside = write_packed(root.parent / f"{root.name}-outside", "polite", "v1")
    (root / "polite").mkdir()
    (root / "polite" / "v1").symlink_to(outside)
    return root / "polite" / "v1"


def link_a_file_out(root: Path) -> Path:
    directory = write_packed(root / "polite", "polite", "v1")
    secret = root.parent / f"{root.name}-secret"
    secret.write_text("{}")
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(secret)
    return directory


def reserve(root: Path) -> Path:
    return write_packed(root / "identity" / "v1", "polite", "v1").parent


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mislabel, "its path says `polite` v1"),
        (misname, "its path says `rude`"),
        (link_out, "leads out"),
        (link_versions_out, "leads out"),
        (link_a_version_out, "leads out"),
        (link_a_file_out, "leads out"),
        (reserve, "meaning of its own"),
    ],
)
def test_what_is_not_ours_to_serve_is_held_back_with_a_reason(watch, make: Callable[[Path], Path], reason):
    path = make(watch.root)
    changes = watch.after(100)
    assert not changes
    assert reason in changes.held_back[path]


def test_links_inside_the_root_are_followed(watch):
    write_packed(watch.root / ".data" / "polite", "polite", "v1")
    (watch.root / "polite").symlink_to(Path(".data") / "polite")
    assert keys(watch.poll().appeared) == [("polite", "v1")]


def add(directory: Path) -> None:
    (directory / "more.json").write_text("{}")


def remove(directory: Path) -> None:
    (directory / "config.json").unlink()


def write_and_set_the_time_back(directory: Path) -> None:
    path = directory / "config.json"
    stat = path.stat()
    path.write_text("[]")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_and_set_the_time_back(directory: Path) -> None:
    path = directory / "config.json"
    stat = path.stat()
    (directory / "new").write_text("[]")
    os.utime(directory / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (directory / "new").replace(path)


@pytest.mark.parametrize(
    ("change", "verb"),
    [
        (add, "more.json appeared"),
        (remove, "config.json vanished"),
        (write_and_set_the_time_back, "config.json changed"),
        (replace_and_set_the_time_back, "config.json changed"),
    ],
)
def test_every_change_after_verification_is_seen(tmp_path, change, verb):
    directory = write_model(tmp_path / "polite")
    snapshot = take_snapshot(directory)
    snapshot.require_unchanged()
    change(directory)
    with pytest.raises(CheckpointError, match=verb):
        snapshot.require_unchanged()


def test_a_hash_of_contents_depends_on_contents_and_paths_alone(tmp_path):
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    versions = [content_version(list_files(path)) for path in (first, second)]
    assert versions[0] == versions[1]
    assert len(versions[0]) == 12
    write_model(second, fill=2.0)
    assert content_version(list_files(second)) != versions[0]
    (first / "config.json").rename(first / "other.json")
    assert content_version(list_files(first)) != versions[0]
