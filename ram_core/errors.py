"""The errors that a caller can meet. One table in the server maps them to HTTP."""

from __future__ import annotations


class RamError(Exception):
    """Base of every error that we raise on purpose; its message is fit for the person who caused it."""


class InvalidRequest(RamError):
    """The request asks for something impossible; `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Conflict(InvalidRequest):
    """What is asked for could be done, but not as things are now."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room for an answer within the model's context."""


class UnknownModel(RamError):
    """No proposal and no aligner has the name that was asked for."""


class QueueFull(RamError):
    """The engine holds as many requests as it may; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(RamError):
    """The step loop has not started, has stopped, or has died."""


class NonFiniteLogits(RamError):
    """A model computed NaN or an infinity for this request; its neighbours go on."""


class EngineOutOfMemory(RamError):
    """The request did not fit into memory, and gave way for good; its neighbours go on."""


class AlignerUnavailable(RamError):
    """An aligner that is known could not be brought into memory: it failed, or no room was made in time."""


class CheckpointError(RamError):
    """A model directory cannot be served: missing, broken, or of an unsupported kind."""


class VocabularyMismatch(CheckpointError):
    """The aligner's tokenizer is not the proposal's."""
