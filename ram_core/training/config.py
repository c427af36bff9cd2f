"""What `ram train` is told: every knob of every stage, each default once. Never imports torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ram_core.aligners.names import require_name, require_version
from ram_core.models.source import one_line
from ram_core.params import MAX_CANDIDATES, MAX_STRENGTH, Resampling
from ram_core.training.errors import ConfigError

Objective = Literal["sft", "ram", "ram-dpo", "ram-token"]
Stage = Literal["warmup", "synthesize", "fit", "package"]
STAGES: tuple[Stage, ...] = ("warmup", "synthesize", "fit", "package")


FREE_FIELDS = frozenset(
    {
        "micro_batch_size",
        "dtype",
        "activation_checkpointing",
        "log_steps",
        "save_steps",
        "keep_saves",
        "max_ascent_nats",
    }
)
"""Of `LoopConfig` and `FitConfig`, what does not change a run's outcome, up to rounding."""


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where records come from: JSONL files or `datasets` sources ("hf:NAME[:CONFIG]", of `split`).

    A prompt may have `max_prompt_tokens`, prompt and answer together `max_tokens`. What is longer is cut
    ("truncate": prompts lose their beginning, answers their end) or left out ("drop"), and counted.
    `max_records` 0 reads all.
    """

    train: str = ""
    split: str = "train"
    max_records: int = 0
    max_prompt_tokens: int = 1024
    max_tokens: int = 2048
    too_long: Literal["truncate", "drop"] = "truncate"

    def __post_init__(self) -> None:
        _require_at_least("max_records", self.max_records, 0)
        _require_at_least("max_prompt_tokens", self.max_prompt_tokens, 1)
        _require_at_least("max_tokens", self.max_tokens, 2)
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(f"`max_prompt_tokens` must be below `max_tokens` {self.max_tokens}")


class LoopConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a model is trained, whatever the loss.

    `batch_size` examples make an update, on all processes together; `micro_batch_size` of them are in memory
    at once on each (0: as many as there are). `max_steps` 0 means `epochs`. The learning rate rises over
    `warmup_fraction` of all steps and then stays ("constant") or falls along a cosine to
    `final_rate_fraction` of itself. `optimizer` "muon" is for matrices and has AdamW beside it for the rest.
    `dtype` is what is computed in: "auto" is bfloat16 on CUDA and float32 elsewhere; weights stay float32.
    A save comes every `save_steps` (0: at the end of an epoch), and the last `keep_saves` are kept.
    """

    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 64
    micro_batch_size: int = 0
    learning_rate: float = 1e-5
    optimizer: Literal["rmsprop", "adamw", "muon"] = "rmsprop"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = 0.1
    final_rate_fraction: float = 0.0
    weight_decay: float = 0.0
    max_gradient_norm: float = 10.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    activation_checkpointing: bool = False
    log_steps: int = 10
    save_steps: int = 0
    keep_saves: int = 1

    def __post_init__(self) -> None:
        _require_above("epochs", self.epochs, 0)
        _require_at_least("max_steps", self.max_steps, 0)
        _require_at_least("batch_size", self.batch_size, 1)
        _require_at_least("micro_batch_size", self.micro_batch_size, 0)
        _require_above("learning_rate", self.learning_rate, 0)
        _require_within("warmup_fraction", self.warmup_fraction, 0, 1)
        _require_within("final_rate_fraction", self.final_rate_fraction, 0, 1)
        _require_at_least("weight_decay", self.weight_decay, 0)
        _require_above("max_gradient_norm", self.max_gradient_norm, 0)
        _require_at_least("log_steps", self.log_steps, 1)
        _require_at_least("save_steps", self.save_steps, 0)
        _require_at_least("keep_saves", self.keep_saves, 1)


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA adapter instead of all weights: its `rank`, 0 for none.

    `targets` are module names, or none for PEFT's "all-linear". `is_merged` writes the base with the adapter
    merged into it; else the adapter alone, which is served over its base.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    is_merged: bool = False

    def __post_init__(self) -> None:
        _require_at_least("rank", self.rank, 0)
        _require_above("alpha", self.alpha, 0)
        _require_within("dropout", self.dropout, 0, 1)


class WarmupConfig(LoopConfig, frozen=True, kw_only=True):
    """Supervised training of the proposal on the wanted answers; it happens if `model` is named.

    The result then is the proposal of all later stages.
    """

    model: str = ""


class SynthesizeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the proposal's own answers are drawn: one to a prompt, all through the engine.

    `from_rejected` takes a preference record's rejected answer instead. `dtype`, `device` and
    `quantization` are the engine's. The defaults are those of arXiv 2505.19700's code, without its
    repetition penalty.
    """

    temperature: float = 0.5
    top_p: float = 0.95
    top_k: int = 10
    max_answer_tokens: int = 1024
    max_batch: int = 128
    from_rejected: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self) -> None:
        _require_within("temperature", self.temperature, 0, 2)
        _require_above("top_p", self.top_p, 0)
        _require_within("top_p", self.top_p, 0, 1)
        _require_at_least("top_k", self.top_k, 0)
        _require_at_least("max_answer_tokens", self.max_answer_tokens, 1)
        _require_at_least("max_batch", self.max_batch, 1)


class FitConfig(LoopConfig, frozen=True, kw_only=True):
    """Training of the aligner, which begins as `model`.

    `ascent_weight` is Eq. 8's alpha, for "ram" alone. "ram-dpo" has the inverse temperature `dpo_beta`.
    "ram-token" reads the proposal's `top_k_log_probs` log-probabilities a position, cached once, and trains
    the product at `strength`. Training stops if the mean `-log Q` of the proposal's own answers exceeds
    `max_ascent_nats` a token.
    """

    model: str = ""
    objective: Objective = "ram"
    ascent_weight: float = 1e-4
    max_ascent_nats: float = 20.0
    dpo_beta: float = 1.0
    top_k_log_probs: int = 64
    strength: float = 1.0
    lora: LoraConfig = msgspec.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least("ascent_weight", self.ascent_weight, 0)
        _require_above("max_ascent_nats", self.max_ascent_nats, 0)
        _require_above("dpo_beta", self.dpo_beta, 0)
        _require_at_least("top_k_log_probs", self.top_k_log_probs, 1)
        _require_within("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)


class PackageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the packed aligner says of itself.

    An empty `name` is that of the run's directory, an empty `version` a hash of the files. `strength` None is
    the one that it was trained at. `candidates` None is the server's number of draws in that mode. A
    `kl_threshold` (nats) is a gate, None is none.
    """

    name: str = ""
    version: str = ""
    strength: float | None = None
    resampling: Resampling = Resampling.PRODUCT
    candidates: int | None = None
    kl_threshold: float | None = None
    license: str = ""

    def __post_init__(self) -> None:
        if self.name:
            require_name(self.name)
        if self.version:
            require_version(self.version)
        if self.strength is not None:
            _require_within("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)
        if self.candidates is not None:
            _require_within("candidates", self.candidates, 1, MAX_CANDIDATES)
        if self.kl_threshold is not None:
            _require_at_least("kl_threshold", self.kl_threshold, 0)
            if self.kl_threshold == math.inf:
                raise ValueError("`kl_threshold` must be finite; leave it out for no gate")


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training run: everything that it makes lies below `output`."""

    output: str
    proposal: str = ""
    seed: int = 0
    trust_remote_code: bool = False
    data: DataConfig = msgspec.field(default_factory=DataConfig)
    warmup: WarmupConfig = msgspec.field(default_factory=WarmupConfig)
    synthesize: SynthesizeConfig = msgspec.field(default_factory=SynthesizeConfig)
    fit: FitConfig = msgspec.field(default_factory=FitConfig)
    package: PackageConfig = msgspec.field(default_factory=PackageConfig)

    @property
    def needs_synthesis(self) -> bool:
        """Whether the objective reads the proposal's own answers."""
        return self.fit.objective in ("ram", "ram-dpo")


def read_config(path: Path | None, settings: Sequence[tuple[str, Any]] = ()) -> TrainConfig:
    """A TOML file's config, with single values put over it: ("fit.learning_rate", 1e-5).

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be; the field is named.
    """
    raw: dict[str, Any] = {} if path is None else _read_toml(path)
    for name, value in settings:
        _put(raw, name, value)
    try:
        return msgspec.convert(raw, TrainConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{f'`{path}`: ' if path else ''}{one_line(error)}") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """A "section.name=value" as name and value, which is TOML, or else a plain text.

    Raises:
        ConfigError: it has no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"`{text}` must be NAME=VALUE, such as fit.learning_rate=1e-5")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"`{path}`: {one_line(error)}") from None


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for section in sections:
        below = raw.setdefault(section, {})
        if not isinstance(below, Mapping):
            raise ConfigError(f"`{name}`: `{section}` is a value and has no fields")
        raw = below  # type: ignore[assignment] # tables of TOML are dicts
    raw[field] = value


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")


def _require_at_least(name: str, value: float, low: float) -> None:
    _require_within(name, value, low, math.inf)


def _require_above(name: str, value: float, low: float) -> None:
    if not (value > low and math.isfinite(value)):
        raise ValueError(f"`{name}` must be above {low:g}, got {value!r}")
