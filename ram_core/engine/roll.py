"""The aligners that an engine begins with, and those that drop out before it does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.errors import CheckpointError

logger = logging.getLogger(__name__)


class Roll:
    """Who is loaded at start: an aligner that is not required drops out with all its models if one fails.

    `failed` says why, by the aligners' names.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.failed: dict[str, str] = {}
        self._sources = {source.name: source for source in config.aligners}
        self._required = {source.aligner for source in config.aligners if source.required}

    @property
    def sources(self) -> list[AlignerSource]:
        """The models of those who are still in, in their order."""
        return [source for source in self._sources.values() if source.aligner not in self.failed]

    @property
    def residents(self) -> dict[str, tuple[str, ...]]:
        """The models of each who is still in."""
        found: dict[str, tuple[str, ...]] = {}
        for source in self.sources:
            found[source.aligner] = (*found.get(source.aligner, ()), source.name)
        return found

    def has(self, name: str) -> bool:
        """Whether the aligner of a model is still in."""
        return self._sources[name].aligner not in self.failed

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """If a model cannot be served in this block, its aligner drops out, or the error goes on."""
        aligner = self._sources[name].aligner
        try:
            yield
        except CheckpointError as error:
            if aligner in self._required:
                raise
            self._drop(aligner, str(error))

    def drop_all(self, reason: str) -> bool:
        """Whether anybody dropped out: all do who are not required."""
        gone = {source.aligner for source in self.sources} - self._required
        for aligner in sorted(gone):
            self._drop(aligner, reason)
        return bool(gone)

    def _drop(self, aligner: str, reason: str) -> None:
        logger.warning("The engine begins without %s: %s", aligner, reason)
        self.failed.setdefault(aligner, reason)
