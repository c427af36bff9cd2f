"""`ram aligner`: what people and scripts see of an aligner's directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ram_core.aligners.manifest import MANIFEST_FILE
from tests.http.test_cli import ROOT, assert_one_line, ram
from tests.models import make_tokenizer, save_model, save_pair


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_pair(root, aligners=("polite",))
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "root")
    return tmp_path / "root"


def test_what_was_packed_is_verified_and_shown(root):
    polite = str(root / "polite")
    code, output, errors = ram(
        *("aligner", "pack", polite, "--version", "v1", "--strength", "1.5", "--resampling", "nucleus"),
        *("--term", "self", "--term", "plain=-0.5", "--kl-threshold", "0.25"),
        *("--license", "MIT", "--provenance", "data=letters [of] thanks"),
    )
    assert (code, errors) == (0, "")
    assert "self=1 plain=-0.5" in output
    code, output, errors = ram("aligner", "verify", polite, "--proposal", str(root / "proposal"))
    assert (code, errors) == (0, "")
    assert "✓ sound" in output
    for check in ("files", "manifest", "hashes", "config", "weights", "tokenizer", "vocabulary"):
        assert any(line.split()[:2] == ["✓", check] for line in output.splitlines()), check
    code, output, errors = ram("aligner", "inspect", polite)
    assert (code, errors) == (0, "")
    for word in (
        "v1",
        "1.5",
        "nucleus",
        "0.25 nats",
        "MIT",
        "letters [of] thanks",
        "LlamaForCausalLM",
        "F32",
    ):
        assert word in output


def test_scripts_get_json(root):
    polite = str(root / "polite")
    code, output, _ = ram("aligner", "pack", polite, "--name", "kind", "--json")
    packed = json.loads(output)
    assert code == 0
    assert packed == json.loads((root / "polite" / MANIFEST_FILE).read_text())
    code, output, _ = ram("aligner", "verify", polite, "--json")
    verified = json.loads(output)
    assert (code, verified["is_sound"], verified["name"]) == (0, True, "kind")
    assert (verified["version"], verified["tokenizer"]) == (packed["version"], packed["tokenizer"])
    assert {check["outcome"] for check in verified["checks"]} == {"passed"}
    code, output, _ = ram("aligner", "inspect", polite, "--json")
    shown = json.loads(output)
    assert (code, shown["manifest"]) == (0, packed)
    assert [model["architecture"] for model in shown["models"]] == ["LlamaForCausalLM"]
    assert shown["models"][0]["dtypes"] == {"F32": shown["models"][0]["num_parameters"]}
    assert shown["bytes"] == sum(shown["files"].values())


def test_packing_again_keeps_what_was_said(root):
    polite = str(root / "polite")
    ram("aligner", "pack", polite, "--version", "v1", "--strength", "2", "--kl-threshold", "1")
    code, output, _ = ram("aligner", "pack", polite, "--kl-threshold", "inf", "--json")
    packed = json.loads(output)
    assert (code, packed["version"], packed["strength"], packed["kl_threshold"]) == (0, "v1", 2.0, None)


def test_what_is_unsound_gives_exit_code_1_and_the_reason(root):
    ram("aligner", "pack", str(root / "polite"))
    path = root / "polite" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, output, _ = ram("aligner", "verify", str(root / "polite"))
    assert code == 1
    assert "✗ not sound" in output
    assert "`model.safetensors` is not what the manifest's SHA-256 says" in " ".join(output.split())
    code, output, _ = ram("aligner", "verify", str(root / "polite"), "--json")
    assert (code, json.loads(output)["is_sound"]) == (1, False)


def test_an_aligner_of_another_vocabulary_is_unsound_beside_that_proposal_only(root):
    other = str(save_model(root / "other", "llama", tokenizer=make_tokenizer(sentences=["zzz zzz"])))
    assert ram("aligner", "verify", other)[0] == 0
    code, output, _ = ram("aligner", "verify", other, "--proposal", str(root / "proposal"))
    assert code == 1
    assert "cannot follow the proposal" in output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inspect", "/nowhere"], "no such directory"),
        (["pack", "/nowhere"], "no such directory"),
        (["verify", "{polite}", "--proposal", "/nowhere"], "no such directory"),
        (["pack", "{polite}", "--name", "../up"], "`name`"),
        (["pack", "{polite}", "--resampling", "lottery"], "lottery"),
        (["pack", "{polite}", "--term", "self=much"], "--term self=much"),
        (["pack", "{polite}", "--term", "./../up=1"], "--term ./../up=1"),
        (["pack", "{polite}", "--provenance", "alone"], "KEY=VALUE"),
        (["inspect", "{root}"], "no config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(root, words, reason):
    polite = str(root / "polite")
    words = [word.format(polite=polite, root=root) for word in words]
    assert_one_line(ram("aligner", *words), reason)
    assert not (root / "polite" / MANIFEST_FILE).exists()


def test_looking_needs_no_torch(root):
    code = (
        "import sys; from server.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "aligner", "inspect", str(root / "polite")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
