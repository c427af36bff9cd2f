"""What can go wrong in training, each with a message for the person who started it."""

from __future__ import annotations

from ram_core.errors import RamError


class TrainingError(RamError):
    """Base of what stops a training command; nothing that was saved before is lost."""


class ConfigError(TrainingError):
    """The training file or a flag asks for something impossible; the message names the field."""


class DataError(TrainingError):
    """Training data is missing, empty or unreadable; the message names the file and the line."""


class DivergedError(TrainingError):
    """A loss or a gradient is no longer a finite number; the last save is good."""


class RunawayAscentError(DivergedError):
    """The ascent term of the residual-alignment loss has left its range: the aligner is being torn apart."""
