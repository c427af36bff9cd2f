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
    cached prefixes only with those of the same `cache_salt` and the same tenant, or where it is not empty of
    the same `prefix_group`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    alignment: AlignmentParams = field(default_factory=AlignmentParams)
    num_choices: int = 1
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    prefix_group: str = ""


class Prefill(Struct, frozen=True, tag=True, array_like=True):
    """Have the prompt of a request read that still waits for its aligners, if there is room.

    The proposal reads it, and aligners that it names as their weights come. The `Request` of the same id goes
    on from there; `Cancel` ends it, and so does whoever needs its place. No event tells of it.
    """

    request: Request


class Cancel(Struct, frozen=True, tag=True, array_like=True):
    """Forget a request, or only its choice `index`; unknown ids are ignored (it may just have ended)."""

    request_id: str
    index: int | None = None


class LoadAligner(Struct, frozen=True, tag=True, array_like=True):
    """Bring an aligner's models into memory, all or none: each part has the engine's name and a directory.

    `aligner` is "NAME@VERSION", which the part "." has as its model's name too; others add "/PART". All parts
    together may take `max_bytes`.
    """

    aligner: str
    parts: tuple[tuple[str, str], ...]
    max_bytes: int


class FreeAligner(Struct, frozen=True, tag=True, array_like=True):
    """Give the memory of an aligner's models back; a request that still names one of them fails."""

    aligner: str


Command = Request | Prefill | Cancel | LoadAligner | FreeAligner


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


class AlignerProgress(Struct, frozen=True, tag=True, array_like=True):
    """A load has come so far, from 0 to 1."""

    aligner: str
    fraction: float


class AlignerLoaded(Struct, frozen=True, tag=True, array_like=True):
    """An aligner's models can be asked for; they hold `num_bytes` of the device."""

    aligner: str
    num_bytes: int
    device: str


class AlignerFailed(Struct, frozen=True, tag=True, array_like=True):
    """An aligner was not loaded, for a reason fit for the operator; nothing of it is left in memory."""

    aligner: str
    reason: str


class AlignerFreed(Struct, frozen=True, tag=True, array_like=True):
    """An aligner's models are gone, and their memory is another's to take."""

    aligner: str


class EngineBegan(Struct, frozen=True, tag=True, array_like=True):
    """An engine takes orders, the first one or the next after a death.

    `aligners` are there, each with its bytes; those in `failed` should be, but could not be loaded, for the
    reasons given. All aligners together may have `memory_bytes`; a weight takes `bytes_per_weight`.
    """

    aligners: tuple[tuple[str, int], ...]
    failed: tuple[tuple[str, str], ...]
    memory_bytes: int
    bytes_per_weight: int
    device: str


class EngineLost(Struct, frozen=True, tag=True, array_like=True):
    """The engine died: nothing is in memory any more, and what was under way is void."""


AlignerOutcome = AlignerProgress | AlignerLoaded | AlignerFailed | AlignerFreed
AlignerNews = AlignerOutcome | EngineBegan | EngineLost


class EngineStats(Struct, frozen=True, array_like=True):
    """A consistent look at the engine after a step.

    `last_progress_s` is on `time.monotonic`'s clock, which all processes of a machine share. Since the start:
    of `num_prompt_tokens` of admitted prompts `num_cached_tokens` were found in the prefix cache; so many
    sequences gave way to others (`num_preemptions`), failed for want of memory, or for non-finite numbers
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
