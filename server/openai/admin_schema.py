"""The wire of the admin API: what may be asked about aligners, and how they are told of."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ram_core.params import Resampling

MAX_WAIT_S = 3600.0
"""An answer waits no longer than this for what was asked to be done."""


class AdminBody(BaseModel):
    """A body of the admin API: strict, and a field that nobody knows is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NewAligner(AdminBody):
    """POST /v1/aligners: `path` is relative to the aligners' root; `hub_id` is a repository of the hub."""

    name: str
    path: str | None = None
    hub_id: str | None = None
    load: bool = False
    pin: bool = False

    @model_validator(mode="after")
    def _require_one_source(self) -> NewAligner:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either `path` or `hub_id`")
        return self


class Load(AdminBody):
    """POST …/load: without a version, those that answer new requests."""

    version: str | None = None
    pin: bool = False


class Unload(AdminBody):
    """POST …/unload: without a version, all of them."""

    version: str | None = None


class Promotion(AdminBody):
    """POST …/promote: one version, or several by weight."""

    version: str | None = None
    versions: dict[str, float] | None = None

    @model_validator(mode="after")
    def _require_one_form(self) -> Promotion:
        if (self.version is None) == (self.versions is None):
            raise ValueError("give either `version` or `versions`")
        return self

    @property
    def weights(self) -> str | dict[str, float]:
        """What the registry is to be asked for."""
        return self.version if self.version is not None else (self.versions or {})


class Rollback(AdminBody):
    """POST …/rollback: nothing to say."""


class Patch(AdminBody):
    """PATCH: what holds for requests that say nothing else; what is absent stays.

    `kl_threshold` null is no gate. `pinned` is for the versions that answer new requests.
    """

    strength: float | None = None
    # JSON has no enumerations: a mode is its name.
    resampling: Annotated[Resampling, Field(strict=False)] | None = None
    kl_threshold: float | None = None
    candidates: int | None = None
    pinned: bool | None = None

    @property
    def gate(self) -> float | None:
        """The gate in nats: infinity for none, None if nothing was said of it."""
        is_given = "kl_threshold" in self.model_fields_set
        return math.inf if is_given and self.kl_threshold is None else self.kl_threshold


class LoraLoad(BaseModel):
    """vLLM's POST /v1/load_lora_adapter; what else is in the body has no effect."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class LoraUnload(BaseModel):
    """vLLM's POST /v1/unload_lora_adapter; what else is in the body has no effect."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    lora_name: Annotated[str, Field(min_length=1)]


class Measured(BaseModel):
    """What requests have shown of a version since the server began; means are over aligned tokens, in nats.

    `fallbacks` are tokens at which the gate fell back to the proposal; null is a mean of nothing.
    """

    requests: int
    errors: int
    tokens: int
    aligned_tokens: int
    fallbacks: int
    mean_kl_p_q: float | None
    mean_kl_pi_p: float | None
    mean_ess: float | None


class VersionInfo(BaseModel):
    """One version of an aligner, and what its manifest says.

    `waits_for` is "turn", "memory" or ""; `progress` goes from 0 to 1 within the state; `bytes` is what it
    holds, or will need, on the device; `references` are requests that run on it; `last_used` is in seconds
    since 1970, null before the first use; `kl_threshold` null is no gate, `candidates` null the server's own
    number.
    """

    version: str
    state: Literal["absent", "verifying", "loading", "resident", "draining", "evicted", "failed"]
    reason: str
    waits_for: str
    progress: float
    bytes: int
    device: str
    references: int
    last_used: float | None
    pinned: bool
    preset: bool
    origin: Literal["settings", "directory", "admin"]
    source: str
    terms: dict[str, float]
    strength: float
    resampling: str
    kl_threshold: float | None
    candidates: int | None
    measured: Measured


class AlignerInfo(BaseModel):
    """An aligner: what part of new requests its versions get, will get, and got before, newest last.

    `defaults` has what a PATCH has let hold in place of what the versions' manifests say.
    """

    object: Literal["aligner"] = "aligner"
    name: str
    shares: dict[str, float]
    next_shares: dict[str, float] | None
    earlier_shares: list[dict[str, float]]
    defaults: dict[str, float | str | None]
    versions: list[VersionInfo]


class AlignerAdded(AlignerInfo):
    """An aligner, and which of its versions has just been made known."""

    version: str


class AlignerList(BaseModel):
    """All aligners, and how much of the memory for their weights they hold, or have been promised."""

    object: Literal["list"] = "list"
    memory_bytes: int
    held_bytes: int
    data: list[AlignerInfo]


class AlignerDeleted(BaseModel):
    """What an aligner leaves behind."""

    object: Literal["aligner"] = "aligner"
    name: str
    deleted: Literal[True] = True


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetails
