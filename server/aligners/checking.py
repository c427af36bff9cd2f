"""Whether a version can be served, and how much memory it needs: files are read, so it is for a thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ram_core.aligners.files import Snapshot, list_files, read_ahead, take_snapshot
from ram_core.aligners.sizes import WeightCount, count_weights
from ram_core.aligners.states import VersionKey
from ram_core.errors import CheckpointError
from ram_core.niceness import CHECKING, give_way
from server.aligners.known import KnownVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sound:
    """A version that can be served: what its files were then, and which weights it has."""

    snapshot: Snapshot
    weights: WeightCount


@dataclass(frozen=True, slots=True)
class _Checked:
    """A version that was looked at, and what comes of its hashes."""

    known: KnownVersion
    sound: Sound
    hashes: Future[None]


class Checker:
    """Verifies versions against one proposal. What has not changed since is not read again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_proposal_rows: int) -> None:
        """`num_proposal_rows` is how many logits a token has in the proposal."""
        self._tokenizer = tokenizer
        self._num_rows = num_proposal_rows
        self._known_fingerprint = ""
        self._checked: dict[VersionKey, _Checked] = {}
        self._doubtful: set[VersionKey] = set()
        self._closing = threading.Event()

    def close(self) -> None:
        """End what is being verified: it fails soon."""
        self._closing.set()

    def check(self, known: KnownVersion) -> Sound:
        """Verify all of a version but its hashes, which go on being compared when this is done.

        So it may be loaded meanwhile; it must not be served before `require_unchanged` has said yes.

        Raises:
            CheckpointError: it cannot be served.
        """
        # With torch: only here, so that a server answers before it is read.
        from ram_core.aligners.verification import verify

        if (before := self._found_sound(known)) is not None:
            return before
        self._doubtful.add(known.key)
        # Before anything is read, so that what changes from now on is found in the end.
        snapshot = take_snapshot(known.directory, known.root)
        self._begin_reading(snapshot)
        hashes = self._begin_hashing(known)
        report = verify(
            known.directory,
            root=known.root,
            default=known.manifest,
            proposal=self._tokenizer,
            proposal_fingerprint=self._fingerprint(),
            num_proposal_rows=self._num_rows,
            with_hashes=False,
        )
        report.require_sound()
        if report.manifest != known.manifest:
            raise CheckpointError(f"`{known.directory}`: its manifest has changed since it was found")
        sound = Sound(snapshot, count_weights(known.directory, known.manifest))
        self._checked[known.key] = _Checked(known, sound, hashes)
        return sound

    def require_unchanged(self, known: KnownVersion) -> None:
        """Return when all hashes are right and the files are still those that were verified.

        Raises:
            CheckpointError: they are not.
        """
        checked = self._checked[known.key]
        if checked.known is not known:
            raise CheckpointError(f"`{known.directory}`: its files changed after it was verified")
        checked.hashes.result()
        checked.sound.snapshot.require_unchanged()
        self._doubtful.discard(known.key)

    def is_doubtful(self, known: KnownVersion) -> bool:
        """Whether a version failed, is still being verified, or has changed since; waits for nothing."""
        if known.key in self._doubtful:
            return True
        try:
            if known.key in self._checked:
                self.require_unchanged(known)
        except CheckpointError:
            return True
        return False

    def sound_of(self, key: VersionKey) -> Sound | None:
        """What was found when the version was verified last; None if it never was."""
        return self._checked[key].sound if key in self._checked else None

    def forget(self, key: VersionKey) -> None:
        """A version is not known any more."""
        self._checked.pop(key, None)
        self._doubtful.discard(key)

    def _fingerprint(self) -> str:
        """The proposal's, made once."""
        from ram_core.models.vocabulary import fingerprint

        if not self._known_fingerprint:
            self._known_fingerprint = fingerprint(self._tokenizer)
        return self._known_fingerprint

    def _found_sound(self, known: KnownVersion) -> Sound | None:
        """What was found before, if nothing has changed since."""
        try:
            if known.key in self._checked:
                self.require_unchanged(known)
                return self._checked[known.key].sound
        except CheckpointError:
            self.forget(known.key)
        return None

    def _begin_reading(self, snapshot: Snapshot) -> None:
        """Have the disk busy from now on: the engine and the hashes read the same soon.

        Small files come first: else whoever reads them now waits for what was asked for of large ones.
        """
        sizes = {snapshot.directory / name: state.num_bytes for name, state in snapshot.files.items()}
        paths = sorted(sizes, key=lambda path: sizes[path])

        def work() -> None:
            # It hardly takes a core, and has the disk idle whenever it waits for one: it gives no way.
            read_ahead(paths, lambda: not self._closing.is_set())

        threading.Thread(target=work, name="ram-read-ahead", daemon=True).start()

    def _begin_hashing(self, known: KnownVersion) -> Future[None]:
        """Compare all hashes in a thread of its own, which takes little from the steps."""
        hashes: Future[None] = Future()
        if not known.manifest.files:
            hashes.set_result(None)
            return hashes

        def work() -> None:
            give_way(CHECKING)
            try:
                self._compare_hashes(known)
            except Exception as error:
                hashes.set_exception(error)
            else:
                hashes.set_result(None)

        threading.Thread(target=work, name="ram-hashes", daemon=True).start()
        return hashes

    def _compare_hashes(self, known: KnownVersion) -> None:
        from ram_core.aligners.verification import compare_hashes

        def on_progress(num_done: int, num_total: int) -> None:
            if self._closing.is_set():
                raise CheckpointError("the server is ending")

        files = list_files(known.directory, known.root)
        compare_hashes(known.manifest, files, on_progress, one_is_enough=True)
