"""Whether a version can be served, and how much memory it needs: files are read, so it is for a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ram_core.aligners.files import Snapshot
from ram_core.aligners.sizes import WeightCount, count_weights
from ram_core.aligners.states import VersionKey
from ram_core.errors import CheckpointError
from server.aligners.known import KnownVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnFraction = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Sound:
    """A version that can be served: what its files were then, and which weights it has."""

    snapshot: Snapshot
    weights: WeightCount


class Checker:
    """Verifies versions against one proposal. What has not changed since is not read again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_proposal_rows: int) -> None:
        """`num_proposal_rows` is how many logits a token has in the proposal."""
        self._tokenizer = tokenizer
        self._num_rows = num_proposal_rows
        self._sound: dict[VersionKey, tuple[KnownVersion, Sound]] = {}
        self._closing = threading.Event()

    def close(self) -> None:
        """End what is being verified: it fails soon."""
        self._closing.set()

    def check(self, known: KnownVersion, on_fraction: OnFraction = lambda _: None) -> Sound:
        """Verify a version; told how far the reading is, in hundredths.

        Raises:
            CheckpointError: it cannot be served.
        """
        # With torch: only here, so that a server answers before it is read.
        from ram_core.aligners.verification import verify

        if (before := self._found_sound(known)) is not None:
            return before
        told = -1

        def on_progress(num_done: int, num_total: int) -> None:
            nonlocal told
            if self._closing.is_set():
                raise CheckpointError("the server is ending")
            hundredths = num_done * 100 // max(num_total, 1)
            if hundredths > told:
                told = hundredths
                on_fraction(hundredths / 100)

        report = verify(
            known.directory,
            root=known.root,
            default=known.manifest,
            proposal=self._tokenizer,
            num_proposal_rows=self._num_rows,
            on_progress=on_progress,
        )
        report.require_sound()
        if report.manifest != known.manifest or report.snapshot is None:
            raise CheckpointError(f"`{known.directory}`: its manifest has changed since it was found")
        sound = Sound(report.snapshot, count_weights(known.directory, known.manifest))
        self._sound[known.key] = known, sound
        return sound

    def require_unchanged(self, known: KnownVersion) -> None:
        """Raise `CheckpointError` unless the files are those that were verified."""
        before, sound = self._sound[known.key]
        if before is not known:
            raise CheckpointError(f"`{known.directory}`: its files changed after it was verified")
        sound.snapshot.require_unchanged()

    def sound_of(self, key: VersionKey) -> Sound | None:
        """What was found when the version was verified last; None if it never was."""
        return self._sound[key][1] if key in self._sound else None

    def forget(self, key: VersionKey) -> None:
        """A version is not known any more."""
        self._sound.pop(key, None)

    def _found_sound(self, known: KnownVersion) -> Sound | None:
        """What was found before, if nothing has changed since."""
        try:
            if known.key in self._sound:
                self.require_unchanged(known)
                return self._sound[known.key][1]
        except CheckpointError:
            self.forget(known.key)
        return None
