"""Every knob of a deployment, once: a flag wins over `RAM_*` in the environment, that over `ram.toml`."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ram_core.engine.client import HEARTBEAT_S
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.errors import RamError

DEFAULT_CONFIG_FILE = "ram.toml"
DEMO_MODEL_NAME = "ram-demo"
IDENTITY = "identity"
"""The aligner that does nothing; never the name of a real one."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", re.IGNORECASE)


class SettingsError(RamError):
    """The deployment is configured in a way that cannot work; the message is one line."""


def parse_size(value: object) -> object:
    """Bytes of "512MiB", "2GiB", "1.5gb" or a plain number; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"not a size such as 512MiB or 2GiB: {value!r}")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))


def parse_aligners(value: object) -> object:
    """A table of names and paths, from `{name: path}`, `["NAME=PATH"]` or `"NAME=PATH,NAME=PATH"`."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    return aligner_table(value) if isinstance(value, list) else value


def aligner_table(items: list[str]) -> dict[str, str]:
    """Names and paths of `NAME=PATH` items; raises ValueError for what is not one, or for a second one."""
    table: dict[str, str] = {}
    for item in items:
        name, _, path = str(item).partition("=")
        if not name or not path:
            raise ValueError(f"an aligner is given as NAME=PATH, not {item!r}")
        if name in table:
            raise ValueError(f"two aligners are named {name!r}")
        table[name] = path
    return table


def parse_names(value: object) -> object:
    """Names, from `["a", "b"]` or `"a,b"`; anything else is left for pydantic to refuse."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        return value
    return tuple(name.strip() for item in items for name in item.split(",") if name.strip())


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
EngineMode = Literal["process", "thread"]
MetricsAccess = Literal["loopback", "admin", "open"]
Aligners = Annotated[dict[str, str], NoDecode, BeforeValidator(parse_aligners)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_names)]


class Settings(BaseSettings):
    """What an operator may choose. Fields that are None take the engine's own default."""

    model_config = SettingsConfigDict(env_prefix="RAM_", extra="forbid", toml_file=DEFAULT_CONFIG_FILE)

    proposal: str = ""
    aligners: Aligners = Field(default_factory=dict)
    aligners_dir: Path | None = None
    preload: Names = ()
    aligner_memory: Size | None = None
    aligner_wait_s: float = Field(default=30.0, ge=0)
    max_aligner_loads: int = Field(default=1, ge=1)
    demo: bool = False
    served_model_name: str = ""
    default_aligner: str = ""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    vllm_lora_api: bool = False
    max_body_bytes: Size = 4 * 2**20
    receive_timeout_s: float = Field(default=60.0, gt=0)
    keep_alive_s: int = Field(default=75, ge=1)
    ping_s: float = Field(default=15.0, gt=0)
    send_timeout_s: float = Field(default=60.0, gt=0)
    stall_s: float = Field(default=60.0, ge=4 * HEARTBEAT_S)
    drain_s: float = Field(default=0.0, ge=0)
    shutdown_grace_s: float = Field(default=30.0, ge=0)

    tenants_file: Path | None = None
    api_key: SecretStr | None = None
    admin_key: SecretStr | None = None
    allow_anonymous: bool = False
    metrics_access: MetricsAccess = "loopback"
    usage_log: Path | None = None

    engine: EngineMode = "process"
    device: str | None = None
    dtype: str | None = None
    max_model_len: int | None = Field(default=None, ge=0)
    kv_memory: Size | None = None
    page_size: int | None = Field(default=None, ge=1)
    max_batch: int | None = Field(default=None, ge=1)
    max_step_tokens: int | None = Field(default=None, ge=0)
    max_chunk_tokens: int | None = Field(default=None, ge=0)
    max_queue: int | None = Field(default=None, ge=0)
    prefix_cache: bool | None = None
    is_overlapping: bool | None = None
    has_static_shapes: bool | None = None
    cuda_graphs: bool | None = None
    attention: str | None = None
    compile: bool | None = None
    aligner_bank: bool | None = None
    aligner_slots: int | None = Field(default=None, ge=0)
    quantization: str | None = None
    tensor_parallel: int | None = Field(default=None, ge=1)
    trust_remote_code: bool | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get("RAM_CONFIG") or DEFAULT_CONFIG_FILE
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file))

    @model_validator(mode="after")
    def _check_names(self) -> Settings:
        if self.demo and self.proposal:
            raise ValueError("`demo` serves the embedded proposal: give either it or a proposal")
        if self.engine == "thread" and (self.tensor_parallel or 1) > 1:
            raise ValueError("`tensor_parallel` needs the engine in processes of its own: `engine` process")
        if IDENTITY in self.aligners:
            raise ValueError(f"`{IDENTITY}` names the absence of an aligner; choose another name")
        return self

    @property
    def is_demo(self) -> bool:
        """Whether the embedded bundle is served: asked for, or nothing else given."""
        return self.demo or not self.proposal

    @property
    def model_name(self) -> str:
        """The proposal's name in the API: what the operator chose, a directory's own name, or the hub id."""
        if self.served_model_name:
            return self.served_model_name
        if self.is_demo:
            return DEMO_MODEL_NAME
        path = Path(self.proposal)
        return path.resolve().name if path.is_dir() else self.proposal

    @property
    def needs_no_key(self) -> bool:
        """Whether anybody who reaches the server may use it."""
        return self.tenants_file is None and not (self.api_key and self.api_key.get_secret_value())

    @property
    def num_places(self) -> int:
        """Sequences that the engine holds at once, running and waiting."""
        default = EngineConfig(proposal="")
        max_batch = default.max_batch if self.max_batch is None else self.max_batch
        return max_batch + (default.max_queue if self.max_queue is None else self.max_queue)

    def engine_config(self, aligners: tuple[AlignerSource, ...] = ()) -> EngineConfig:
        """The engine's part of the settings, with paths checked; it begins with these aligners."""
        given = {
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "kv_memory_bytes": self.kv_memory,
            "page_size": self.page_size,
            "max_batch": self.max_batch,
            "max_step_tokens": self.max_step_tokens,
            "max_chunk_tokens": self.max_chunk_tokens,
            "max_queue": self.max_queue,
            "prefix_cache": self.prefix_cache,
            "is_overlapping": self.is_overlapping,
            "has_static_shapes": self.has_static_shapes,
            "cuda_graphs": self.cuda_graphs,
            "attention": self.attention,
            "compile": self.compile,
            "aligner_bank": self.aligner_bank,
            "aligner_slots": self.aligner_slots,
            "aligner_memory_bytes": self.aligner_memory,
            "quantization": self.quantization,
            "tensor_parallel": self.tensor_parallel,
            "trust_remote_code": self.trust_remote_code,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.aligners_dir is not None and not self.aligners_dir.is_dir():
            raise SettingsError(f"`aligners_dir` is not a directory: {self.aligners_dir}")
        if self.aligners_dir is not None:
            # What comes later is read into a slot that is free, and shares a forward with what is there.
            options.setdefault("aligner_slots", len(aligners) + 1)
        return EngineConfig(proposal=self._proposal_source(), aligners=aligners, **options)

    def _proposal_source(self) -> str:
        if not self.is_demo:
            return self.proposal
        from ram_core.demo import bundle_path

        proposal = bundle_path() / "proposal"
        if not proposal.is_dir():
            raise SettingsError(
                f"The embedded demo is not built: {proposal} is missing. Run `ram demo build`."
            )
        return str(proposal)

    def aligner_sources(self) -> dict[str, str]:
        """Aligners that the server cannot do without: the demo's, and those that are named, which win."""
        if not self.is_demo:
            return self.aligners
        from ram_core.demo import bundle_path

        inside = sorted((bundle_path() / "aligners").glob("*/config.json"))
        return {path.parent.name: str(path.parent) for path in inside} | self.aligners

    def check_aligner_names(self, names: tuple[str, ...]) -> None:
        """Raise `SettingsError` unless these can be the names of all aligners at the start."""
        if self.model_name in names:
            raise SettingsError(f"An aligner has the proposal's name, `{self.model_name}`.")
        if self.default_aligner and self.default_aligner not in [*names, IDENTITY]:
            known = ", ".join(names) or "none"
            raise SettingsError(
                f"`default_aligner` is `{self.default_aligner}`, but the aligners are: {known}."
            )


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Settings of this process; flags that are None, or empty, were not given.

    `config`, or else `RAM_CONFIG`, names a file that must exist; `ram.toml` need not.

    Raises:
        SettingsError: one line naming the field at fault.
    """
    if config is not None:
        os.environ["RAM_CONFIG"] = str(config)
    named = os.environ.get("RAM_CONFIG")
    if named and not Path(named).is_file():
        raise SettingsError(f"The configuration file does not exist: {named}")
    given = {name: value for name, value in flags.items() if value not in (None, "", [], ())}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"`{field}`: {reason}" if field else reason) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"The configuration file is not valid TOML: {error}") from None
