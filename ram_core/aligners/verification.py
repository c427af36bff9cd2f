"""Whether an aligner's directory can be served, from its files to its vocabulary, before it is loaded.

Nothing that it brings is run, and no weights are read but to be hashed. Between this and loading anything may
happen to the files: `VerificationReport.snapshot` is to be compared once more when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ram_core.aligners.files import (
    BLAKE3,
    SHA256,
    OnProgress,
    Snapshot,
    content_version,
    digest_files,
    list_files,
    resolve_below,
    take_snapshot,
)
from ram_core.aligners.manifest import Manifest, default_manifest, read_manifest
from ram_core.aligners.names import MANIFEST_FILE
from ram_core.aligners.report import CheckLog, VerificationReport
from ram_core.errors import CheckpointError, VocabularyMismatch
from ram_core.models.loading import build_skeleton, check_weights, load_config, unsupported_reason
from ram_core.models.lora import WEIGHTS_FILE, LoraConfig, check_lora, is_adapter, read_lora_config
from ram_core.models.lora_stack import linear_shapes
from ram_core.models.vocabulary import (
    check_same_vocabulary,
    fingerprint,
    is_same_tokenizer,
    load_tokenizer,
    shared_vocabulary_size,
    vocabulary_size,
)
from ram_core.models.weight_files import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


_HASH_NAMES = {SHA256: "SHA-256", BLAKE3: "BLAKE3"}


def verify(
    directory: Path,
    *,
    root: Path | None = None,
    default: Manifest | None = None,
    proposal: PreTrainedTokenizerBase | None = None,
    proposal_fingerprint: str = "",
    num_proposal_rows: int = 0,
    on_progress: OnProgress | None = None,
    with_hashes: bool = True,
) -> VerificationReport:
    """Look at everything that is known without loading the weights; what fails becomes part of the report.

    Args:
        directory: an aligner's.
        root: where it must be itself, where links may lead to and a LoRA adapter's base may be; by default
            links stay inside, and the base may be anywhere.
        default: what holds if it has no manifest; None takes its name and a hash of all its files.
        proposal: the tokenizer that it must follow; None leaves that open.
        proposal_fingerprint: of that tokenizer, for callers who know it.
        num_proposal_rows: how many logits a token has in the proposal; 0 takes its tokenizer's size.
        on_progress: told how far the hashing of the files is.
        with_hashes: False leaves `compare_hashes` to the caller, who may do something else meanwhile.
    """
    own = proposal and _Proposal(proposal, proposal_fingerprint or fingerprint(proposal), num_proposal_rows)
    verifier = _Verifier(directory, root, own, on_progress)
    verifier.look_at_files(default)
    if verifier.snapshot is not None and verifier.manifest is not None:
        verifier.look_at_hashes(verifier.manifest, verifier.snapshot, with_hashes=with_hashes)
        for part in verifier.manifest.parts:
            verifier.look_at_model(part)
        verifier.look_at_vocabulary(verifier.manifest)
    return verifier.report()


@dataclass(frozen=True, slots=True)
class _Proposal:
    """What an aligner must follow; `num_rows` are its logits of a token, 0 if only its tokenizer is known."""

    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    num_rows: int

    def has_files_of(self, source: str) -> bool:
        """Whether its tokenizer was read from the same bytes, so that nothing needs to be compared."""
        place = self.tokenizer.name_or_path
        return bool(place) and Path(place).is_dir() and is_same_tokenizer(place, source)


@dataclass(frozen=True, slots=True)
class _Part:
    """A directory with a model, or with a LoRA adapter; `model` is where its config is, if on this disk."""

    directory: Path
    adapter: LoraConfig | None
    model: Path | None


class _Verifier:
    """The state of one verification."""

    def __init__(
        self,
        directory: Path,
        root: Path | None,
        proposal: _Proposal | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.directory = directory
        self.root = root
        self.proposal = proposal
        self.on_progress = on_progress
        self.log = CheckLog()
        self.snapshot: Snapshot | None = None
        self.manifest: Manifest | None = None
        self.has_manifest = False
        self.fingerprint = ""
        self.configs: dict[str, PreTrainedConfig] = {}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def report(self) -> VerificationReport:
        return VerificationReport(
            self.directory,
            self.has_manifest,
            self.manifest,
            self.snapshot,
            self.fingerprint,
            tuple(self.log.checks),
        )

    def look_at_files(self, default: Manifest | None) -> None:
        """Which files there are, and what the manifest says; nothing else is read if either is bad."""
        with self.log.check("files", "") as words:
            if not self.directory.is_dir():
                raise CheckpointError(f"`{self.directory}`: no such directory")
            if self._is_outside(self.directory):
                raise CheckpointError(f"`{self.directory}` is outside of `{self.root}`")
            self.snapshot = take_snapshot(self.directory, self.root)
            words.append(f"{len(self.snapshot.files)} files, {self.snapshot.num_bytes:,} bytes")
        if self.log.has_failed:
            self.log.skip("manifest", "not read")
            return
        with self.log.check("manifest", "none; defaults hold") as words:
            manifest = read_manifest(self.directory)
            self.has_manifest = manifest is not None
            self.manifest = manifest or default or self._default_manifest()
            if self.has_manifest:
                words.append(f"{self.manifest.name} {self.manifest.version}")

    def _default_manifest(self) -> Manifest:
        version = content_version(list_files(self.directory, self.root), self.on_progress)
        return default_manifest(self.directory.resolve().name, version)

    def look_at_hashes(self, manifest: Manifest, snapshot: Snapshot, *, with_hashes: bool) -> None:
        """Compare every file with what the manifest says of it, or at least its size."""
        if not manifest.files:
            self.log.skip("hashes", "no manifest lists files")
            return
        with self.log.check("hashes", f"{len(manifest.files)} files are what the manifest says") as words:
            present = {path: state.num_bytes for path, state in snapshot.files.items()}
            present.pop(MANIFEST_FILE, None)
            _require_listed(manifest, present)
            if with_hashes:
                compare_hashes(manifest, list_files(self.directory, self.root), self.on_progress)
            else:
                words.append(f"{len(manifest.files)} files have the manifest's sizes")

    def look_at_model(self, name: str) -> None:
        """Config, weights and tokenizer of one directory with a model."""
        suffix = "" if name == "." else f" of {name}"
        part: _Part | None = None
        with self.log.check(f"config{suffix}", "") as words:
            part = self._part(name)
            if part.model is not None:
                words.append(self._read_config(name, part.model))
            elif part.adapter is not None:
                words.append(f"a LoRA adapter of {part.adapter.base}, which is not on this disk")
        if part is None or self.log.has_failed:
            self.log.skip(f"weights{suffix}", "its config is not fit to be compared")
            return
        with self.log.check(f"weights{suffix}", "all have the shapes that the config gives") as words:
            self._check_weights(name, part, words)
        with self.log.check(f"tokenizer{suffix}", "none of its own") as words:
            self._read_tokenizer(name, part, words)

    def _part(self, name: str) -> _Part:
        directory = self.directory if name == "." else resolve_below(self.directory, name)
        if not directory.is_dir():
            raise CheckpointError(f"`{name}`: no such directory below the aligner's")
        if not is_adapter(str(directory)):
            return _Part(directory, None, directory)
        adapter = read_lora_config(str(directory))
        base = Path(adapter.base).expanduser()
        if base.exists() and self._is_outside(base):
            raise CheckpointError(f"its base `{adapter.base}` is outside of `{self.root}`")
        # What the hub has is not downloaded for a look.
        return _Part(directory, adapter, base if base.is_dir() else None)

    def _is_outside(self, path: Path) -> bool:
        """Whether there is a root, and a path leads out of it."""
        return self.root is not None and not path.resolve().is_relative_to(self.root.resolve())

    def _read_config(self, name: str, model: Path) -> str:
        config = load_config(str(model))
        if reason := unsupported_reason(config):
            raise CheckpointError(reason)
        self.configs[name] = config
        return str(next(iter(config.architectures or ()), config.model_type))

    def _check_weights(self, name: str, part: _Part, words: list[str]) -> None:
        if part.adapter is None:
            check_weights(str(part.directory), self.configs[name])
        elif part.model is not None:
            check_lora(part.adapter, linear_shapes(build_skeleton(self.configs[name])))
        elif (part.directory / WEIGHTS_FILE).is_file():
            read_header(part.directory / WEIGHTS_FILE)
            words.append("whole; not compared, as the base is not on this disk")
        else:
            raise CheckpointError(f"it has no {WEIGHTS_FILE}")

    def _read_tokenizer(self, name: str, part: _Part, words: list[str]) -> None:
        source = str(part.directory) if part.adapter is None else part.adapter.tokenizer_source
        if not Path(source).expanduser().is_dir():
            return
        if self.proposal is not None and self.proposal.has_files_of(source):
            tokenizer, own = self.proposal.tokenizer, self.proposal.fingerprint
        else:
            tokenizer = self.tokenizers[name] = load_tokenizer(source)
            own = fingerprint(tokenizer)
        words.append(f"{vocabulary_size(tokenizer):,} tokens, fingerprint {own[:12]}")
        if self.fingerprint and own != self.fingerprint:
            raise VocabularyMismatch(f"`{name}` has another tokenizer than the aligner's other models")
        self.fingerprint = own

    def look_at_vocabulary(self, manifest: Manifest) -> None:
        """The manifest's fingerprint, the aligner's own tokenizers and the proposal's must be one."""
        proposal = self.proposal
        if proposal is None and not (manifest.tokenizer and self.fingerprint):
            self.log.skip("vocabulary", "nothing to compare it with")
            return
        with self.log.check("vocabulary", "the same everywhere"):
            if self.fingerprint and manifest.tokenizer not in ("", self.fingerprint):
                raise VocabularyMismatch("its tokenizer is not the one whose fingerprint the manifest gives")
            if proposal is None:
                return
            if manifest.tokenizer not in ("", proposal.fingerprint):
                raise VocabularyMismatch("the manifest is for a proposal with another tokenizer")
            for tokenizer in self.tokenizers.values():
                check_same_vocabulary(proposal.tokenizer, tokenizer, aligner_name=manifest.name)
            rows = {
                f"{manifest.name} {part}".removesuffix(" ."): config.get_text_config().vocab_size
                for part, config in self.configs.items()
            }
            num_rows = proposal.num_rows or vocabulary_size(proposal.tokenizer)
            shared_vocabulary_size(proposal.tokenizer, num_rows, rows)


def compare_hashes(
    manifest: Manifest,
    files: Mapping[str, Path],
    on_progress: OnProgress | None = None,
    *,
    one_is_enough: bool = False,
) -> None:
    """Read all files, as `list_files` has them, and compare their hashes with the manifest's.

    With `one_is_enough`, of each file only the hash that is computed soonest; otherwise all that there are.

    Raises:
        CheckpointError: a file cannot be read, or is not what a hash in the manifest says.
    """
    wanted = {path: dict(record.digests) for path, record in manifest.files.items()}
    if one_is_enough:
        wanted = {path: dict([next(iter(digests.items()))]) for path, digests in wanted.items()}
    found = digest_files(files, on_progress, lambda path: wanted.get(path, ()))
    for kind, name in _HASH_NAMES.items():
        wrong = [
            path
            for path, digests in wanted.items()
            if kind in digests and found.get(path, {}).get(kind) != digests[kind]
        ]
        if wrong:
            raise CheckpointError(f"`{wrong[0]}` is not what the manifest's {name} says{_more(wrong)}")


def _require_listed(manifest: Manifest, present: Mapping[str, int]) -> None:
    missing = sorted(manifest.files.keys() - present.keys())
    if missing:
        raise CheckpointError(f"`{missing[0]}` of the manifest is missing{_more(missing)}")
    unlisted = sorted(present.keys() - manifest.files.keys())
    if unlisted:
        raise CheckpointError(f"`{unlisted[0]}` is not in the manifest{_more(unlisted)}")
    for path, record in manifest.files.items():
        if present[path] != record.bytes:
            raise CheckpointError(f"`{path}` has {present[path]} bytes, the manifest says {record.bytes}")


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
