"""PEFT's LoRA adapters: reading their checkpoints. Nothing but linear layers, and nothing that is pickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ram_core.errors import CheckpointError
from ram_core.models.source import one_line, resolve_source
from ram_core.models.stored import StoredWeights
from ram_core.models.weight_files import FLOAT_DTYPES, TensorHeader, read_header

MAX_RANK = 64
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Ways of beginning that leave the base model as it is; others write to it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# These say how it was trained, or which layers it has, as the names of its weights do.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to a linear layer: `(x @ a.T) @ b.T`; the scale is in `b`, which is float32."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """An adapter that can be served, by its adapter_config.json; `base` is a model's directory or hub id."""

    source: str
    directory: Path
    base: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilised: bool

    @property
    def tokenizer_source(self) -> str:
        """Where its tokenizer is: beside it, or else its base's."""
        files = ("tokenizer.json", "tokenizer.model")
        return self.source if any((self.directory / name).is_file() for name in files) else self.base

    def rank_of(self, module: str) -> int:
        """The rank of what is added to a layer."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What its product is multiplied with."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return float(alpha / (rank**0.5 if self.is_rank_stabilised else rank))


def is_adapter(source: str) -> bool:
    """Whether a source is an adapter, which needs a base model, and not a model.

    Raises:
        CheckpointError: there is no such source.
    """
    directory = resolve_source(source, with_weights=False)
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def read_lora_config(source: str) -> LoraConfig:
    """The config of an adapter in a local directory, or of a hub id. Its base is found beside it, if there.

    Raises:
        CheckpointError: missing, broken, or of a kind that cannot be served; says what it is.
    """
    directory = resolve_source(source, with_weights=False)
    raw = _read_json(source, directory / CONFIG_FILE)
    for problem in _problems(raw):
        raise CheckpointError(f"LoRA adapter `{source}` cannot be served: {problem}")
    base = str(raw["base_model_name_or_path"])
    beside = directory / Path(base).expanduser()
    return LoraConfig(
        source=source,
        directory=directory,
        base=str(beside.resolve()) if beside.is_dir() else base,
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        is_rank_stabilised=bool(raw.get("use_rslora")),
    )


def check_lora(config: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The layers of the base that an adapter changes, by the headers of its weights alone.

    Raises:
        CheckpointError: missing or broken weights, or some that fit no linear layer of the base.
    """
    path = resolve_source(config.source, with_weights=True) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"LoRA adapter `{config.source}` has no {WEIGHTS_FILE}")
    try:
        return _checked_modules(config, read_header(path), shapes)
    except CheckpointError as error:
        raise CheckpointError(f"LoRA adapter `{config.source}`: {error}") from None


def load_lora(config: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, LoraLayer]:
    """An adapter's layers by the names of the base's linear layers, whose [out, in] shapes are given.

    Raises:
        CheckpointError: missing or broken weights, some that fit no linear layer of the base, or that are
            no finite numbers.
    """
    modules = check_lora(config, shapes)
    try:
        with StoredWeights(resolve_source(config.source, with_weights=True) / WEIGHTS_FILE) as stored:
            weights = {name: each.read(each.dtype) for name, each in stored.tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"LoRA adapter `{config.source}`: {error}") from None
    return {
        module: LoraLayer(
            weights[f"{_PREFIX}{module}.lora_A.weight"],
            weights[f"{_PREFIX}{module}.lora_B.weight"].to(torch.float32) * config.scale_of(module),
        )
        for module in modules
    }


def _read_json(source: str, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{source}`: {path.name} is broken ({one_line(error)})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"`{source}`: {path.name} is broken (not an object)")
    return raw


def _problems(raw: Mapping[str, Any]) -> list[str]:
    """What the config asks for and we do not do; whatever is not known here is refused, unless it is off."""
    if raw.get("peft_type") != "LORA":
        return [f"`peft_type` is {raw.get('peft_type')!r}; only 'LORA' is known"]
    problems = []
    if not isinstance(raw.get("base_model_name_or_path"), str):
        problems.append("`base_model_name_or_path` does not say what it was trained on")
    ranks = [raw.get("r"), *_values(raw, "rank_pattern")]
    if not all(isinstance(rank, int) and 1 <= rank <= MAX_RANK for rank in ranks):
        problems.append(f"ranks (`r`, `rank_pattern`) must be 1 to {MAX_RANK}, got {ranks}")
    alphas = [raw.get("lora_alpha"), *_values(raw, "alpha_pattern")]
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        problems.append(f"`lora_alpha` and `alpha_pattern` must be numbers, got {alphas}")
    if raw.get("bias", "none") != "none":
        problems.append(f"`bias` is {raw['bias']!r}; only 'none' is known")
    if raw.get("init_lora_weights") not in _INITS:
        problems.append(f"`init_lora_weights` {raw['init_lora_weights']!r} changes the base model's weights")
    unknown = [name for name, value in raw.items() if value and name not in _HARMLESS | _READ]
    problems += [f"`{name}` is {raw[name]!r}, which is not supported" for name in sorted(unknown)]
    return problems


def _values(raw: Mapping[str, Any], name: str) -> list[Any]:
    pattern = raw.get(name) or {}
    return list(pattern.values()) if isinstance(pattern, dict) else [pattern]


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that the end of a layer's name matches; keys are regular expressions."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _checked_modules(
    config: LoraConfig, headers: Mapping[str, TensorHeader], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """The layers that an adapter changes, once each of its weights is known to fit."""
    modules: dict[str, set[str]] = {}
    for name, header in headers.items():
        match = _WEIGHT.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        if match is None:
            raise CheckpointError(f"`{name}` is no weight of LoRA on a linear layer")
        module = match["module"]
        if module not in shapes:
            raise CheckpointError(
                f"it changes `{module}`, which is no linear layer of its base `{config.base}`"
            )
        num_out, num_in = shapes[module]
        rank = config.rank_of(module)
        wanted = (rank, num_in) if match["side"] == "A" else (num_out, rank)
        if header.shape != wanted or header.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"`{name}` is {header.dtype} {list(header.shape)}, "
                f"but its config and its base `{config.base}` make it {list(wanted)}"
            )
        modules.setdefault(module, set()).add(match["side"])
    halves = sorted(module for module, sides in modules.items() if len(sides) == 1)
    if halves or not modules:
        raise CheckpointError(
            f"half of what it adds to `{halves[0]}` is missing" if halves else "it is empty"
        )
    return list(modules)
