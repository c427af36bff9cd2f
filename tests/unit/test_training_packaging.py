"""What a server may see of a packed aligner is nothing, the old one or the new one: never a half."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ram_core.aligners.directory import AlignersDirectory
from ram_core.aligners.manifest import read_manifest
from ram_core.aligners.pack import Wishes
from ram_core.aligners.verification import verify
from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.training import packaging
from ram_core.training.errors import TrainingError
from ram_core.training.packaging import Judge, install, package
from tests.models import make_tokenizer, save_model

WISHES = Wishes(name="terse", provenance={"objective": "ram"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def judge(model):
    return Judge(str(model))


def seen(directory):
    """Names and versions of the aligners that a server finds in a directory."""
    return [found.key for found in AlignersDirectory(directory).poll(is_settled=True).appeared]


def test_a_packed_aligner_is_sound_and_leaves_nothing_beside_it(model, judge, tmp_path):
    (tmp_path / "left").mkdir()
    shutil.copytree(model, tmp_path / "left", dirs_exist_ok=True)
    (tmp_path / "left" / "training_args.bin").write_bytes(b"pickled")
    manifest = package(tmp_path / "left", tmp_path / "run" / "aligner", WISHES, judge)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["aligner"]
    assert verify(tmp_path / "run" / "aligner").is_sound
    assert read_manifest(tmp_path / "run" / "aligner") == manifest
    assert "training_args.bin" not in manifest.files
    assert (manifest.name, manifest.provenance) == ("terse", {"objective": "ram"})


def fail_in(monkeypatch, name, owner=None):
    """Let the disk be full when a function is called for the second time."""
    owner = owner or packaging
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2 or name in ("write_packed", "_sync"):
            if name == "copyfile":
                Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("where", ["copyfile", "write_packed", "fsync", "_sync"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_what_was_there(model, judge, tmp_path, monkeypatch, where, is_new):
    target = tmp_path / "terse"
    if not is_new:
        package(model, target, Wishes(name="terse", version="1"), judge)
    before = seen(tmp_path)
    owner = {"copyfile": shutil, "fsync": os}.get(where)
    with monkeypatch.context() as patched:
        fail_in(patched, where, owner)
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            package(model, target, Wishes(name="terse", version="2"), judge)
    assert seen(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_new else ["terse"])
    package(model, target, Wishes(name="terse", version="2"), judge)
    assert seen(tmp_path) == [("terse", "2")]


def killed_at(moment, model, target, judge):
    """Pack in a process of its own, which is killed at a moment."""
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    rename = Path.rename

    def die(_source, to):
        if moment == "copyfile":
            Path(to).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "copyfile":
        shutil.copyfile = die
    else:
        # Between the old one's going and the new one's coming.
        Path.rename = lambda path, to: die(path, to) if to == target else rename(path, to)
    try:
        package(model, target, Wishes(name="terse", version="2"), judge)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("moment", ["copyfile", "rename"])
def test_a_kill_leaves_nothing_that_a_server_takes(model, judge, tmp_path, moment):
    target = tmp_path / "terse"
    package(model, target, Wishes(name="terse", version="1"), judge)
    assert killed_at(moment, model, target, judge) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert seen(tmp_path) == ([("terse", "1")] if moment == "copyfile" else [])
    # The next run cleans up, whether it succeeds or not.
    with pytest.raises(VocabularyMismatch):
        package(other_model(tmp_path / ".other"), target, Wishes(name="terse", version="3"), judge)
    assert seen(tmp_path) == [("terse", "1")]
    package(model, target, Wishes(name="terse", version="2"), judge)
    assert seen(tmp_path) == [("terse", "2")]
    assert {path.name for path in tmp_path.iterdir()} == {"terse", ".other"}


def other_model(directory):
    """A model with another tokenizer than all others here."""
    directory.mkdir()
    save_model(directory, "llama")
    make_tokenizer(sentences=["quite other sentences than these"] * 3).save_pretrained(directory)
    return directory


def test_a_model_that_is_broken_is_not_packed(model, judge, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        package(broken, tmp_path / "aligners" / "terse", WISHES, judge)
    assert list((tmp_path / "aligners").iterdir()) == []


def test_an_installed_aligner_is_found_by_a_server(model, judge, tmp_path):
    manifest = package(model, tmp_path / "aligner", WISHES, judge)
    aligners = tmp_path / "aligners"
    installed = install(tmp_path / "aligner", aligners, judge)
    assert installed == aligners / "terse" / manifest.version
    assert seen(aligners) == [("terse", manifest.version)]
    assert install(tmp_path / "aligner", aligners, judge) == installed


def test_another_aligner_of_the_same_version_is_not_overwritten(model, judge, tmp_path):
    for name, objective in (("one", "ram"), ("other", "sft")):
        wishes = Wishes(name="terse", version="1", provenance={"objective": objective})
        package(model, tmp_path / name, wishes, judge)
    installed = install(tmp_path / "one", tmp_path / "aligners", judge)
    with pytest.raises(TrainingError, match="another aligner of this version"):
        install(tmp_path / "other", tmp_path / "aligners", judge)
    assert read_manifest(installed).provenance == {"objective": "ram"}
    package(model, tmp_path / "one", Wishes(name="org/terse"), judge)
    with pytest.raises(TrainingError, match="org/terse"):
        install(tmp_path / "one", tmp_path / "aligners", judge)
    with pytest.raises(TrainingError, match="no manifest"):
        install(model, tmp_path / "aligners", judge)


# PEFT's own use of what transformers will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_names_its_base_so_that_it_is_found_from_anywhere(model, judge, tmp_path, monkeypatch):
    base = shutil.copytree(model, tmp_path / "work" / "base")
    monkeypatch.chdir(base.parent)
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    adapter.save_pretrained("adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    package(Path("adapter"), tmp_path / "aligner", WISHES, judge)
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path / "aligner").is_sound
    config = json.loads((tmp_path / "aligner" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
