"""What crosses the engine's boundary: frozen commands in, frozen events out. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ram_core.errors import RamError
from ram_core.params import AlignmentParams, SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, `num_choices` times. `prompt_ids` are token ids of the proposal's tokenizer."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    alignment: AlignmentParams = field(default_factory=AlignmentParams)
    num_choices: int = 1


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request, or only its choice `index`; unknown ids are ignored (it may just have ended)."""

    request_id: str
    index: int | None = None


Command = Request | Cancel


@dataclass(frozen=True, slots=True)
class StepTelemetry:
    """What the aligner did to one token. Divergences in nats; `ess` and `aligner_mass` are fractions.

    `kl_p_q` is KL(p‖q) over the shared vocabulary, `kl_pi_p` is KL(π‖p), `ess` the effective sample size
    fraction, `aligner_mass` the aligner's probability inside the nucleus.
    """

    kl_p_q: float
    kl_pi_p: float
    ess: float
    aligner_mass: float
    is_fallback: bool


@dataclass(frozen=True, slots=True)
class StartedEvent:
    """The request left the queue after `queue_s` seconds; its prompt is being read."""

    request_id: str
    queue_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of choice `index`.

    `log_prob` and `top_log_probs` (most probable first) are of the distribution that was really sampled,
    or NaN and empty where the mode has no closed form. `telemetry` is None for the identity aligner.
    `finish_reason` is set on a choice's last token: "stop" says that this very token is a stop token (its
    text is not part of the answer), "length" that the limit of tokens is reached.
    """

    request_id: str
    index: int
    token_id: int
    log_prob: float
    top_log_probs: tuple[tuple[int, float], ...] = ()
    telemetry: StepTelemetry | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """Choice `index` ended by an error; nothing more will come of it."""

    request_id: str
    index: int
    error: RamError


Event = StartedEvent | TokenEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent look at the engine after a step. `last_progress_s` is on `time.monotonic`'s clock."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages_used: int = 0
    num_pages: int = 0
    num_steps: int = 0
    last_progress_s: float = 0.0
