"""What is found before the engine starts, what is called how, and what stays of versions that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from ram_core.aligners.manifest import FileRecord, Manifest, Term, write_manifest
from ram_core.aligners.pack import Wishes, pack
from ram_core.aligners.sizes import count_weights
from ram_core.aligners.states import VersionKey
from ram_core.errors import CheckpointError
from ram_core.models.vocabulary import load_tokenizer
from server.aligners.checking import Checker
from server.aligners.known import KnownVersion, Origin, from_settings, key_of
from server.aligners.start import check_inventory, take_inventory
from server.metrics import GONE, Meter, Metrics
from tests.models import VOCAB_SIZE, make_model, save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"), aligners=("polite",))
    return proposal, aligners["polite"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "aligners"
    path.mkdir()
    return path


@pytest.fixture
def checker(pair) -> Checker:
    return Checker(load_tokenizer(str(pair[0])), VOCAB_SIZE)


def put(model: Path, path: Path, **fields: object) -> Path:
    shutil.copytree(model, path)
    write_manifest(path, Manifest(name=path.parent.name, version=path.name, **fields))
    return path


def test_the_newest_version_of_a_name_is_the_first_and_what_is_named_wins(pair, root):
    _, model = pair
    for version in ("v9", "v10", "v1"):
        put(model, root / "polite" / version)
    put(model, root / "terse" / "2026-1-9")
    named = put(model, root.parent / "polite" / "v9")
    inventory = take_inventory({"polite": str(named)}, root, ["terse"])
    assert [str(known.key) for known in inventory.versions] == [
        "polite@v9",
        "polite@v10",
        "polite@v1",
        "terse@2026-1-9",
    ]
    assert inventory.versions[0].directory == named
    assert [(source.name, source.required) for source in inventory.sources()] == [
        ("polite@v9", True),
        ("terse@2026-1-9", False),
    ]
    assert take_inventory({}, root, ()).sources() == ()
    every = take_inventory({}, root, ["all"])
    assert [str(known.key) for known in every.loaded] == ["polite@v10", "terse@2026-1-9"]
    with pytest.raises(CheckpointError, match="no aligner `rude`"):
        take_inventory({}, root, ["rude"])


def test_what_is_named_must_be_sound_and_what_is_only_there_need_not(pair, root, checker):
    _, model = pair
    for name in ("good", "bad"):
        put(model, root / name / "1")
    (root / "bad" / "1" / "evil.py").write_text("import os")
    named = take_inventory({"good": str(root / "good" / "1")}, None, ())
    assert not check_inventory(named, checker).unsound
    bad = put(model, root.parent / "bad" / "1")
    (bad / "model.safetensors").write_bytes(b"nonsense" * 1000)
    with pytest.raises(CheckpointError):
        check_inventory(take_inventory({"bad": str(bad)}, None, ()), checker)
    shutil.rmtree(root / "bad")
    put(model, root / "bad" / "1", tokenizer="0" * 64)
    checked = check_inventory(take_inventory({}, root, ["all"]), checker)
    assert [str(key) for key in checked.unsound] == ["bad@1"]


def test_models_of_a_version_have_names_that_tell_it(pair, tmp_path):
    _, model = pair
    path = tmp_path / "org" / "tone" / "v1"
    shutil.copytree(model, path)
    shutil.copytree(model, path / "before")
    terms = (Term("self"), Term("./before", -1.0), Term("polite"))
    manifest = Manifest(name="org/tone", version="v1", terms=terms)
    write_manifest(path, manifest)
    known = from_settings("org/tone", str(path))
    assert known.parts == (("org/tone@v1", str(path)), ("org/tone@v1/before", str(path / "before")))
    assert {key_of(name) for name, _ in known.parts} == {VersionKey("org/tone", "v1")}
    num_weights = sum(weight.numel() for weight in make_model("llama", hidden=16, layers=1).parameters())
    assert count_weights(path, manifest).own == 2 * num_weights
    (path / "aligner.json").unlink()
    unnamed = from_settings("tone", str(path))
    assert unnamed.key.version == from_settings("tone", str(path)).key.version
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    assert from_settings("tone", str(path)).key.version != unnamed.key.version


def test_a_version_that_has_not_changed_is_not_read_again(pair, tmp_path, checker):
    _, model = pair
    path = put(model, tmp_path / "polite" / "1")
    known = from_settings("polite", str(path))
    sound = checker.check(known)
    assert checker.check(known) is sound
    checker.require_unchanged(known)
    (path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="after it was verified"):
        checker.require_unchanged(known)
    assert checker.check(known) is not sound
    other = KnownVersion(known.key, path, known.manifest, Origin.ADMIN)
    with pytest.raises(CheckpointError):
        checker.require_unchanged(other)
    write_manifest(path, Manifest(name="polite", version="2"))
    with pytest.raises(CheckpointError, match="manifest has changed"):
        checker.check(known)
    checker.close()


def test_hashes_are_compared_after_the_rest_and_have_the_last_word(pair, tmp_path, checker):
    """So an aligner may be loaded meanwhile, and must not be served before."""
    _, model = pair
    path = put(model, tmp_path / "polite" / "1")
    pack(path, Wishes(name="polite", version="1"))
    known = from_settings("polite", str(path))
    assert not checker.is_doubtful(known)
    checker.check(known)
    assert checker.is_doubtful(known)
    checker.require_unchanged(known)
    assert not checker.is_doubtful(known)
    weights = path / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert checker.is_doubtful(known)
    checker.check(known)
    with pytest.raises(CheckpointError, match="not what the manifest's BLAKE3 says"):
        checker.require_unchanged(known)
    assert checker.is_doubtful(known)


@pytest.mark.parametrize("kind", ["sha256", "blake3"])
def test_a_load_compares_the_hash_that_is_computed_soonest_and_manifests_without_it_stay_valid(
    pair, tmp_path, checker, kind
):
    _, model = pair
    path = put(model, tmp_path / "polite" / "1")
    manifest = pack(path, Wishes(name="polite", version="1"))
    records = manifest.files
    if kind == "sha256":
        records = {name: FileRecord(each.sha256, each.bytes) for name, each in records.items()}

    def require_sound(files: dict[str, FileRecord]) -> None:
        write_manifest(path, msgspec.structs.replace(manifest, files=files))
        known = from_settings("polite", str(path))
        checker.check(known)
        checker.require_unchanged(known)

    require_sound(records)
    name = "model.safetensors"
    wrong = records | {name: msgspec.structs.replace(records[name], **{kind: "0" * 64})}
    with pytest.raises(CheckpointError, match=f"`{name}` is not what the manifest's"):
        require_sound(wrong)


def test_what_was_counted_of_versions_that_are_gone_is_not_lost():
    metrics = Metrics("big")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    for version in ("v1", "v2"):
        metrics.add_version("polite", version)
        meter = Meter(metrics, ("polite", version), 0.0)
        meter.started(0.25, 7)
        meter.token(0, None)
        meter.ended("stop")
    total = value("vllm:prompt_tokens_total", model_name="big")
    for version in ("v1", "v2", "unknown"):
        metrics.drop_version("polite", version)
    assert value("ram_prompt_tokens_total", aligner="polite", version="v1") is None
    gone = {"aligner": GONE, "version": ""}
    assert value("ram_prompt_tokens_total", **gone) == 14
    assert value("ram_requests_finished_total", **gone, reason="stop") == 2
    assert value("ram_request_queue_time_seconds_sum", **gone) == 0.5
    assert value("ram_request_queue_time_seconds_count", **gone) == 2
    assert value("vllm:prompt_tokens_total", model_name="big") == total == 14
