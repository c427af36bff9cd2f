"""What crosses the engine's boundary: frozen commands in, frozen events out. Never imports torch.

All of it can travel to another process (see `wire`), where a message is an array that begins with its name.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from ram_core.errors import RamError
from ram_core.params import AlignmentParams, SamplingParams

FinishReason = Literal["stop", "length"]


class Request(Struct, frozen=True, tag=True, array_like=True):
    """One prompt to continue, `num_choices` times. `prompt_ids` are token ids of the proposal's tokenizer.

    It waits in the queue of `tenant`; of those that wait there, a lower `priority` goes first. Requests share
    cached prefixes only with those of the same `cache_salt`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    alignment: AlignmentParams = field(default_factory=AlignmentParams)
    num_choices: int = 1
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""


class Cancel(Struct, frozen=True, tag=True, array_like=True):
    """Forget a request, or only its choice `index`; unknown ids are ignored (it may just have ended)."""

    request_id: str
    index: int | None = None


Command = Request | Cancel


class StepTelemetry(Struct, frozen=True, array_like=True, gc=False):
    """What the aligner did to one token. Divergences in nats; `ess` and `aligner_mass` are fractions.

    `kl_p_q` is KL(p‖q) over the shared vocabulary, `kl_pi_p` is KL(π‖p), `ess` the effective sample size
    fraction, `aligner_mass` the aligner's probability inside the nucleus.
    """

    kl_p_q: float
    kl_pi_p: float
    ess: float
    aligner_mass: float
    is_fallback: bool


class StartedEvent(Struct, frozen=True, tag=True, array_like=True):
    """The request left the queue after `queue_s` seconds; its prompt is being read.

    The proposal's keys and values of its first `num_cached_tokens` tokens were found in the cache.
    """

    request_id: str
    queue_s: float
    num_cached_tokens: int = 0


class TokenEvent(Struct, frozen=True, tag=True, array_like=True, gc=False):
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


class FailedEvent(Struct, frozen=True, tag=True, array_like=True):
    """Choice `index` ended by an error; nothing more will come of it."""

    request_id: str
    index: int
    error: RamError


Event = StartedEvent | TokenEvent | FailedEvent


class EngineStats(Struct, frozen=True, array_like=True):
    """A consistent look at the engine after a step.

    `last_progress_s` is on `time.monotonic`'s clock, which all processes of a machine share. Since the start:
    of `num_prompt_tokens` of admitted prompts `num_cached_tokens` were found in the prefix cache; so many
    sequences gave way to others (`num_preemptions`), failed for want of memory, or for non-finite logits
    (`num_failed`).
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages_used: int = 0
    num_pages: int = 0
    num_steps: int = 0
    last_progress_s: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    num_out_of_memory: int = 0
    num_failed: int = 0
