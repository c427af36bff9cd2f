"""A trained model as an aligner that a server can take: written aside, verified, only then put in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ram_core.aligners.manifest import Manifest, read_manifest
from ram_core.aligners.names import is_passed_over
from ram_core.aligners.pack import Wishes
from ram_core.aligners.pack import pack as write_packed
from ram_core.aligners.verification import verify
from ram_core.models.loading import load_config
from ram_core.models.lora import CONFIG_FILE, is_adapter, read_lora_config
from ram_core.models.vocabulary import load_tokenizer
from ram_core.training.errors import TrainingError

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")


class Judge:
    """What a packed aligner is verified against: the proposal's tokenizer and its number of logits."""

    def __init__(self, proposal: str, *, trust_remote_code: bool = False) -> None:
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            proposal, trust_remote_code=trust_remote_code
        )
        config = load_config(proposal, trust_remote_code=trust_remote_code)
        self._num_rows: int = config.get_text_config(decoder=True).vocab_size

    def require_sound(self, directory: Path) -> None:
        """Raise `CheckpointError` or `VocabularyMismatch` for the first thing that is wrong."""
        verify(directory, proposal=self._tokenizer, num_proposal_rows=self._num_rows).require_sound()


def package(model: Path, target: Path, wishes: Wishes, judge: Judge) -> Manifest:
    """Make the aligner `target` of a model's directory; what was at `target` is replaced.

    Nothing is ever seen at `target` but a whole aligner that `judge` found sound, the old one or the new.

    Raises:
        CheckpointError, VocabularyMismatch: the model, or a wish, makes no sound aligner.
        OSError: it cannot be written. Then, too, `target` is what it was.
    """
    with _written_aside(target) as aside:
        _copy_files(model, aside)
        manifest = write_packed(aside, wishes)
        judge.require_sound(aside)
    return manifest


def install(packed: Path, aligners: Path, judge: Judge) -> Path:
    """Copy a packed aligner to NAME/VERSION in a directory of aligners that a server may be watching.

    Returns where it is. If the same one is there already, nothing is done.

    Raises:
        TrainingError: it is not packed, has a name of two parts, or another one has its name and version.
        CheckpointError, VocabularyMismatch: the copy is not sound.
        OSError: it cannot be written; then there is nothing new.
    """
    manifest = read_manifest(packed)
    if manifest is None:
        raise TrainingError(f"`{packed}` has no manifest; pack it first")
    if "/" in manifest.name:
        raise TrainingError(f"`{manifest.name}` cannot be installed: its name must have no `/` there")
    target = aligners / manifest.name / manifest.version
    if target.exists():
        if read_manifest(target) != manifest:
            raise TrainingError(
                f"`{target}` holds another aligner of this version; choose another `package.version`"
            )
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _written_aside(target) as aside:
        _copy_files(packed, aside)
        judge.require_sound(aside)
    return target


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which takes its place when the block ends well.

    Its name is one that servers pass over; what a killed run left there is removed.
    """
    aside, old = (target.with_name(f"{target.name}.{word}partial") for word in ("", "old."))
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists() and not target.exists():
        old.rename(target)
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync(aside)
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _copy_files(source: Path, target: Path) -> None:
    """Copy what describes and holds a model, and nothing that a trainer may have left beside it."""
    for path in sorted(source.iterdir()):
        if path.suffix in _SUFFIXES and path.is_file() and not is_passed_over(path.name):
            shutil.copyfile(path, target / path.name)
    if is_adapter(str(source)):
        _name_base_absolutely(source, target / CONFIG_FILE)


def _name_base_absolutely(adapter: Path, copied_config: Path) -> None:
    """A base on this disk is named from the adapter's directory, or from ours: elsewhere, neither holds."""
    base = Path(read_lora_config(str(adapter)).base).expanduser()
    if base.is_dir():
        raw = json.loads(copied_config.read_text("utf-8"))
        raw["base_model_name_or_path"] = str(base.resolve())
        copied_config.write_text(json.dumps(raw, indent=2) + "\n", "utf-8")


def _sync(directory: Path) -> None:
    """Wait until a directory's files are on the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
