"""Whatever is wrong with an aligner's directory is found by the check that it belongs to, in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ram_core.aligners.files import list_files
from ram_core.aligners.manifest import MANIFEST_FILE, FileRecord, Term, read_manifest, write_manifest
from ram_core.aligners.pack import Wishes, pack
from ram_core.aligners.report import Outcome, VerificationReport
from ram_core.aligners.verification import verify
from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.models.vocabulary import fingerprint, load_tokenizer
from ram_core.params import Resampling
from tests.models import make_tokenizer, save_model, save_pair


@pytest.fixture(autouse=True)
def _without_progress_bars():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proposal, an aligner for it, and a LoRA adapter of the aligner."""
    root = tmp_path_factory.mktemp("saved")
    save_pair(root, aligners=("polite",))
    save_lora(root / "lora", "../polite", hidden=16)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def polite(root: Path) -> Path:
    pack(root / "polite", Wishes())
    return root / "polite"


@pytest.fixture(scope="module")
def tokenizer(saved: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(saved / "proposal"))


def save_lora(directory: Path, base: str, *, hidden: int, rank: int = 2) -> None:
    """An adapter as PEFT writes it."""
    directory.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": 4}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {
        name.format("A"): torch.zeros(rank, hidden),
        name.format("B"): torch.zeros(hidden, rank),
    }
    save_file(weights, directory / "adapter_model.safetensors")


def outcomes(report: VerificationReport) -> dict[str, str]:
    return {check.name: check.outcome.value for check in report.checks}


def failure(report: VerificationReport, check: str) -> str:
    """What a check says that failed, alone."""
    assert not report.is_sound
    found = [each for each in report.checks if each.outcome is Outcome.FAILED]
    assert [each.name for each in found] == [check]
    assert "\n" not in found[0].detail
    with pytest.raises(CheckpointError):
        report.require_sound()
    return found[0].detail


def test_a_packed_aligner_is_sound_and_every_check_tells_its_time(polite, tokenizer):
    progress: list[tuple[int, int]] = []
    report = verify(polite, proposal=tokenizer, on_progress=lambda *told: progress.append(told))
    report.require_sound()
    names = ["files", "manifest", "hashes", "config", "weights", "tokenizer", "vocabulary"]
    assert outcomes(report) == dict.fromkeys(names, "passed")
    assert all(check.seconds > 0 for check in report.checks)
    assert report.fingerprint == fingerprint(tokenizer)
    num_bytes = sum(path.stat().st_size for path in polite.iterdir())
    assert report.snapshot.num_bytes == num_bytes
    assert progress == sorted(progress)
    hashed = num_bytes - (polite / MANIFEST_FILE).stat().st_size
    assert progress[-1] == (hashed, hashed)
    report.snapshot.require_unchanged()


def test_without_a_manifest_defaults_hold(root, tokenizer):
    report = verify(root / "polite", proposal=tokenizer)
    report.require_sound()
    assert not report.has_manifest
    assert report.manifest.name == "polite"
    packed = pack(root / "polite", Wishes())
    assert packed.version == report.manifest.version, "a hash of what the files hold"
    assert outcomes(report)["hashes"] == "skipped"


def test_packing_writes_what_was_wished_and_keeps_the_rest(root, tokenizer):
    directory = root / "polite"
    first = pack(
        directory,
        Wishes(
            name="org/kind",
            version="7",
            strength=1.5,
            resampling=Resampling.NUCLEUS,
            kl_threshold=0.5,
            candidates=20,
            license="MIT",
            provenance={"data": "x"},
            terms=(Term("self"), Term("plain", -1.0)),
        ),
    )
    assert first == read_manifest(directory)
    assert first.tokenizer == fingerprint(tokenizer)
    assert set(first.files) == set(list_files(directory)) - {MANIFEST_FILE}
    again = pack(directory, Wishes(provenance={"by": "y"}, kl_threshold=float("inf")))
    assert again.provenance == {"data": "x", "by": "y"}
    assert (again.kl_threshold, again.candidates) == (None, 20)
    assert (again.name, again.version, again.strength, again.terms) == ("org/kind", "7", 1.5, first.terms)
    (directory / "README.md").write_text("new")
    renewed = pack(directory, Wishes())
    assert renewed.version not in ("7", "")
    assert "README.md" in renewed.files
    assert pack(directory, Wishes(version="8")).version == "8"
    verify(directory).require_sound()


@pytest.mark.parametrize("wishes", [Wishes(name="../up"), Wishes(version=""), Wishes(strength=1000.0)])
def test_a_wish_that_no_manifest_grants_changes_nothing(polite, wishes):
    before = (polite / MANIFEST_FILE).read_bytes()
    with pytest.raises(CheckpointError):
        pack(polite, wishes)
    assert (polite / MANIFEST_FILE).read_bytes() == before


def flip_a_bit(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])


def remove(directory: Path) -> None:
    (directory / "generation_config.json").unlink()


def add(directory: Path) -> None:
    (directory / "note.txt").write_text("hello")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip_a_bit, "`model.safetensors` is not what the manifest's SHA-256 says"),
        (remove, "`generation_config.json` of the manifest is missing"),
        (add, "`note.txt` is not in the manifest"),
    ],
)
def test_files_that_are_not_those_of_the_manifest_are_found(polite, change, reason):
    change(polite)
    assert reason in failure(verify(polite), "hashes")


@pytest.mark.parametrize(("kind", "told"), [("sha256", "SHA-256"), ("blake3", "BLAKE3")])
def test_each_hash_in_a_manifest_is_compared(polite, kind, told):
    manifest = read_manifest(polite)
    record = msgspec.structs.replace(manifest.files["config.json"], **{kind: "0" * 64})
    files = {**manifest.files, "config.json": record}
    write_manifest(polite, msgspec.structs.replace(manifest, files=files))
    assert f"`config.json` is not what the manifest's {told} says" in failure(verify(polite), "hashes")


def test_manifests_without_blake3_stay_valid_and_get_it_when_packed_again(polite):
    manifest = pack(polite, Wishes(version="7"))
    assert all(record.blake3 for record in manifest.files.values())
    plain = {path: FileRecord(each.sha256, each.bytes) for path, each in manifest.files.items()}
    before = msgspec.structs.replace(manifest, files=plain)
    write_manifest(polite, before)
    assert b"blake3" not in (polite / MANIFEST_FILE).read_bytes()
    verify(polite).require_sound()
    assert pack(polite, Wishes()) == manifest, "the files are the same, so the version is"


def test_a_file_of_another_size_is_found_before_it_is_hashed(polite):
    cut_off(polite)
    progress = []
    report = verify(polite, on_progress=lambda *told: progress.append(told))
    assert any("bytes, the manifest says" in problem for problem in report.problems)
    assert not progress


def link_out(directory: Path) -> None:
    path = directory / "config.json"
    outside = directory.parent / "elsewhere.json"
    path.rename(outside)
    path.symlink_to(outside)


def link_far_out(directory: Path) -> None:
    (directory / "passwd.json").symlink_to("/etc/passwd")


def hide_a_link(directory: Path) -> None:
    (directory / ".hidden").symlink_to("/etc/passwd")


def link_to_a_directory(directory: Path) -> None:
    (directory / "more").symlink_to(directory)


def link_to_nothing(directory: Path) -> None:
    (directory / "gone").symlink_to("nowhere")


def link_in_a_circle(directory: Path) -> None:
    (directory / "circle").symlink_to("circle")


def make_a_pipe(directory: Path) -> None:
    os.mkfifo(directory / "pipe")


def bring(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (link_out, "leads out"),
        (link_far_out, "leads out"),
        (hide_a_link, "leads out"),
        (link_to_a_directory, "link to something else"),
        (link_to_nothing, "broken link"),
        (link_in_a_circle, "broken link"),
        (make_a_pipe, "neither a file nor a directory"),
        (bring("pytorch_model.bin"), "pickled"),
        (bring("MODEL.PT"), "pickled"),
        (bring("inner/x.ckpt"), "pickled"),
        (bring("modeling.py"), "code"),
        (bring(".hidden/modeling.py"), "code"),
    ],
)
def test_nothing_is_read_where_something_lies_that_must_not(polite, change, reason):
    change(polite)
    report = verify(polite)
    assert reason in failure(report, "files")
    assert outcomes(report) == {"files": "failed", "manifest": "skipped"}
    with pytest.raises(CheckpointError, match=reason):
        pack(polite, Wishes())


def test_a_link_gives_no_harmless_name_to_a_pickle(root, polite):
    (root / "shared.bin").write_bytes(b"x")
    (polite / "shared.txt").symlink_to(root / "shared.bin")
    assert "pickled" in failure(verify(polite, root=root), "files")


def test_links_may_lead_to_other_places_below_a_root(polite):
    link_out(polite)
    verify(polite, root=polite.parent).require_sound()


@pytest.mark.parametrize("way", ["other/../../polite", "link"])
def test_a_directory_outside_of_the_root_is_refused_whatever_the_way_to_it(root, polite, way):
    (root / "inside" / "other").mkdir(parents=True)
    (root / "inside" / "link").symlink_to(polite)
    report = verify(root / "inside" / way, root=root / "inside")
    assert "is outside of" in failure(report, "files")


def test_a_missing_directory_is_one_line(tmp_path):
    assert "no such directory" in failure(verify(tmp_path / "nowhere"), "files")


def test_a_broken_manifest_is_found_and_ends_it(polite):
    (polite / MANIFEST_FILE).write_text("{}")
    report = verify(polite)
    assert "`name`" in failure(report, "manifest")
    assert report.manifest is None


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_cannot_be_served_is_found(root):
    edit_config(root / "polite", model_type="mamba")
    assert "mamba" in failure(verify(root / "polite"), "config")


def test_weights_of_other_shapes_than_the_config_gives_are_found(root):
    edit_config(root / "polite", intermediate_size=20)
    assert "has the shape" in failure(verify(root / "polite"), "weights")


def test_weights_that_are_cut_off_are_found_without_hashes(root):
    path = root / "polite" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut off" in failure(verify(root / "polite"), "weights")


def test_another_vocabulary_than_the_proposals_is_found(root, tokenizer):
    other = save_model(root / "other", "llama", tokenizer=make_tokenizer(sentences=["zzz zzz other words"]))
    report = verify(other, proposal=tokenizer)
    assert "cannot follow the proposal" in failure(report, "vocabulary")
    with pytest.raises(VocabularyMismatch):
        report.require_sound()
    assert verify(other).is_sound, "without a proposal nobody can tell"


def test_fewer_logits_than_the_proposal_has_tokens_are_found(root, tokenizer):
    small = save_model(root / "small", "llama", vocab_size=290)
    assert "logits for 290 tokens, the proposal for 300" in failure(
        verify(small, proposal=tokenizer), "vocabulary"
    )
    verify(small, proposal=tokenizer, num_proposal_rows=290).require_sound()


def replace_fingerprint(directory: Path, digits: str) -> None:
    manifest = read_manifest(directory)
    raw = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    write_manifest(directory, type(manifest)(**(raw | {"tokenizer": digits})))


def test_a_manifest_for_another_tokenizer_is_found_with_and_without_the_proposal(polite, tokenizer):
    replace_fingerprint(polite, "0" * 64)
    assert "not the one whose fingerprint" in failure(verify(polite), "vocabulary")
    assert "not the one whose fingerprint" in failure(verify(polite, proposal=tokenizer), "vocabulary")


def test_an_adapter_is_an_aligner_and_follows_its_bases_tokenizer(root, tokenizer):
    packed = pack(root / "lora", Wishes())
    assert packed.tokenizer == fingerprint(tokenizer)
    report = verify(root / "lora", proposal=tokenizer, root=root)
    report.require_sound()
    assert outcomes(report) == dict.fromkeys(outcomes(report), "passed")


def test_an_adapter_that_does_not_fit_its_base_is_found(root):
    shutil.rmtree(root / "lora")
    save_lora(root / "lora", "../polite", hidden=24)
    assert "make it [2, 16]" in failure(verify(root / "lora"), "weights")


def test_an_adapters_base_must_be_below_the_root(root):
    assert "is outside of" in failure(verify(root / "lora", root=root / "lora"), "config")


def test_an_adapter_of_a_base_that_is_not_here_is_judged_by_what_is_here(root, tokenizer):
    shutil.rmtree(root / "lora")
    save_lora(root / "lora", "org/not-on-this-disk", hidden=24)
    assert "not on this disk" in next(
        check.detail for check in verify(root / "lora").checks if check.name == "config"
    )
    pack(root / "lora", Wishes())
    replace_fingerprint(root / "lora", "0" * 64)
    assert "another tokenizer" in failure(verify(root / "lora", proposal=tokenizer), "vocabulary")
    (root / "lora" / "adapter_model.safetensors").write_bytes(b"123")
    (root / "lora" / MANIFEST_FILE).unlink()
    assert "cut off" in failure(verify(root / "lora"), "weights")


def test_models_below_the_aligners_own_are_verified_too(polite, tokenizer):
    shutil.copytree(polite, polite / "before", ignore=shutil.ignore_patterns(MANIFEST_FILE))
    terms = (Term("self"), Term("./before", -1.0))
    pack(polite, Wishes(terms=terms))
    report = verify(polite, proposal=tokenizer)
    report.require_sound()
    assert {"config of ./before", "weights of ./before", "tokenizer of ./before"} <= outcomes(report).keys()
    weights = load_file(polite / "before" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, polite / "before" / "model.safetensors")
    pack(polite, Wishes())
    assert "model.norm.weight" in failure(verify(polite), "weights of ./before")
    shutil.rmtree(polite / "before")
    with pytest.raises(CheckpointError):
        verify(polite).require_sound()


def test_a_preset_needs_no_model(tmp_path, tokenizer):
    (tmp_path / "mix").mkdir()
    pack(tmp_path / "mix", Wishes(terms=(Term("polite", 0.5), Term("terse", -0.5))))
    report = verify(tmp_path / "mix", proposal=tokenizer)
    report.require_sound()
    assert list(outcomes(report)) == ["files", "manifest", "hashes", "vocabulary"]


def test_a_change_between_verifying_and_loading_is_seen(polite):
    report = verify(polite)
    flip_a_bit(polite)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was verified"):
        report.snapshot.require_unchanged()


def test_a_manifest_may_promise_nothing_of_files(polite):
    manifest = read_manifest(polite)
    raw = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    write_manifest(polite, type(manifest)(**(raw | {"files": {}})))
    report = verify(polite)
    report.require_sound()
    assert outcomes(report)["hashes"] == "skipped"
    write_manifest(polite, type(manifest)(**(raw | {"files": {"config.json": FileRecord("0" * 64, 1)}})))
    assert not verify(polite).is_sound
