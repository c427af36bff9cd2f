"""Hugging Face checkpoints into frozen models, or one clear line about why not.

What can be known without the weights is checked first: the config, the architecture, the files' headers,
the names and shapes of the weights. transformers' progress bar is left as the caller set it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.quantization import PLAIN, check_quantization, is_quantized, quantization_options
from ram_core.models.source import one_line, resolve_source
from ram_core.models.tensor_parallel import parallel_options
from ram_core.models.weight_files import FLOAT_DTYPES, TensorHeader, checkpoint_bytes, read_checkpoint_headers

# What a config says that changes no logits.
_WORDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_ALIBI_FAMILIES = {"bloom", "mpt"}
# These keep a state instead of keys and values, in configs of before `layer_types` too.
_RECURRENT = re.compile(r"mamba|rwkv|xlstm|recurrent|jamba|bamba|zamba|falcon_h1|nemotron_h|^lfm|kimi_linear")
_WHOLE_BATCH_ROPES = {"dynamic", "longrope", "su"}


def load_model(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    attn_implementation: str,
    trust_remote_code: bool = False,
    quantization: str = PLAIN,
    num_ranks: int = 1,
) -> PreTrainedModel:
    """The causal LM in a local directory, or of a hub id: in eval mode, without gradients, on `device`.

    Safetensors only. `dtype` None keeps the checkpoint's own. `quantization` is one of `QUANTIZATIONS`. With
    `num_ranks` above 1, only the share of this one of so many processes is loaded.

    Raises:
        CheckpointError: missing, broken, incomplete, unsupported or too big; the reason is one line.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    reason = unsupported_reason(config) if attn_implementation == ATTENTION_NAME else None
    if reason:
        raise CheckpointError(f"`{source}`: {reason}")
    directory = check_weights(source, config, trust_remote_code=trust_remote_code)
    try:
        check_quantization(quantization, device=device, dtype=dtype, config=config)
        options = _options(quantization, device, config, num_ranks)
        model = _load_checked(directory, dtype, attn_implementation, trust_remote_code, options)
        return model if options else model.to(device)
    except torch.OutOfMemoryError:
        gib = checkpoint_bytes(directory) / 2**30
        raise CheckpointError(
            f"`{source}`: its weights take {gib:.1f} GiB, which `{device}` has not free"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"`{source}`: {error}") from None


def load_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a causal LM.

    Raises:
        CheckpointError: missing or broken, or of an architecture that is unknown or no causal LM.
    """
    directory = resolve_source(source, with_weights=False)
    raw = _read_config(source, directory)
    kind = raw.get("model_type")
    has_own_code = "auto_map" in raw
    if kind not in CONFIG_MAPPING and not (has_own_code and trust_remote_code):
        hint = "; it brings its own code, which runs only with `trust_remote_code`" if has_own_code else ""
        raise CheckpointError(f"`{source}`: unknown architecture `{kind}`{hint}")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:  # Whatever a senseless value makes of the config's class.
        raise CheckpointError(f"`{source}`: config.json is refused: {one_line(error)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise CheckpointError(f"`{source}`: a `{kind}` model is no causal language model")
    return config


def check_weights(source: str, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Path:
    """Refuse by headers alone what loading would find after minutes, or not at all; return the directory.

    transformers casts integers to floats without a word, and fills missing weights with noise.

    Raises:
        CheckpointError: weights that are missing, cut off, of another shape, or no floats.
    """
    directory = resolve_source(source, with_weights=True)
    try:
        headers = read_checkpoint_headers(directory)
        # Code of a checkpoint's own may differ where its config says the same.
        skeleton = (
            build_skeleton(config, trust_remote_code=True)
            if trust_remote_code
            else _known_skeleton(_Architecture(architecture(config), config))
        )
        if not is_quantized(config):
            _check_dtypes(skeleton, headers)
            _check_names(skeleton, headers)
    except CheckpointError as error:
        raise CheckpointError(f"`{source}`: {error}") from None
    return directory


def build_skeleton(
    config: PreTrainedConfig, *, attn_implementation: str = "eager", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without memory for its weights, on the meta device.

    Raises:
        CheckpointError: the architecture cannot be built with these numbers.
    """
    try:
        with torch.device("meta"), _quiet():
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attn_implementation,
                # The one way of running experts that needs no look at the routing.
                experts_implementation="batched_mm",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # Whatever senseless numbers make of the model's class.
        raise CheckpointError(f"no model can be built from config.json: {one_line(error)}") from None
    return model.eval()


def architecture(config: PreTrainedConfig) -> str:
    """The same for two configs if their models differ in weights alone."""
    said = {name: value for name, value in config.to_dict().items() if name not in _WORDS}
    return json.dumps([type(config).__qualname__, said], sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """A config, and all that is looked at to tell it from another."""

    said: str
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=8)
def _known_skeleton(kind: _Architecture) -> PreTrainedModel:
    """For names and shapes alone; aligners that are verified one after the other are of few architectures."""
    return build_skeleton(kind.config)


def unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why a model of this config cannot run over paged KV memory; None if nothing speaks against it.

    The check of a loaded model against itself has the last word: what is not known here fails there.
    """
    text = config.get_text_config(decoder=True)
    kind = config.model_type
    if config.is_encoder_decoder:
        return f"a `{kind}` model has an encoder; only decoders can be served"
    is_encoder = hasattr(text, "add_cross_attention") and getattr(text, "is_decoder", True) is False
    if is_encoder or getattr(text, "use_bidirectional_attention", False) is True:
        return f"a `{kind}` model of this config attends to later tokens too; it is no causal decoder"
    odd_layers = sorted(set(getattr(text, "layer_types", None) or ()) - _PLAIN_LAYERS)
    if odd_layers or _RECURRENT.search(text.model_type):
        which = f" ({', '.join(odd_layers)})" if odd_layers else ""
        return f"a `{kind}` model has layers other than softmax attention over all or the last tokens{which}"
    if kind in _ALIBI_FAMILIES or getattr(text, "alibi", False):
        return f"a `{kind}` model biases attention by distance (ALiBi), which paged attention does not know"
    ropes = sorted(_rope_types(text) & _WHOLE_BATCH_ROPES)
    if ropes:
        return f"its `{ropes[0]}` RoPE depends on the longest row of a batch: rows would disturb each other"
    if not _takes_our_attention(config):
        return f"a `{kind}` model does not take its attention from transformers' attention interface"
    return None


def context_limit(config: PreTrainedConfig) -> int:
    """How many tokens, prompt and answer together, the model was made for.

    Raises:
        CheckpointError: the config does not say.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise CheckpointError(f"the config does not limit the context: `max_position_embeddings` is {limit}")
    return limit


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" means here; "auto" is CUDA if there is any.

    Raises:
        CheckpointError: no device has the name, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise CheckpointError(f"`device` must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    device = torch.device(name)
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise CheckpointError(f"`device` is {name!r}, but PyTorch sees {num_cuda} CUDA devices here")
    return device


def resolve_dtype(name: str, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """The dtype to compute in; "auto" is the checkpoint's own on CUDA (if it names one), and float32 on CPU.

    Raises:
        CheckpointError: no dtype has the name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise CheckpointError(f"`dtype` must be auto, {', '.join(DTYPES)}, got {name!r}")
    own: Any = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if device.type == "cuda" and isinstance(own, torch.dtype) and own in DTYPES.values():
        return own
    return torch.float32


def _read_config(source: str, directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(f"`{source}` is a LoRA adapter, which only an aligner can be")
        raise CheckpointError(f"`{source}` has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{source}`: config.json is broken ({one_line(error)})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"`{source}`: config.json is broken (not an object)")
    return raw


def _rope_types(text: PreTrainedConfig) -> set[str]:
    """All kinds of RoPE in use; some models have one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each.get("rope_type") or each.get("type", "default")) for each in [parameters, *nested]}


def _takes_our_attention(config: PreTrainedConfig) -> bool:
    """Whether the model's module knows the attention interface; code of a checkpoint's own may."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def _check_dtypes(skeleton: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
    weights = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, header in headers.items():
        # Buffers may be masks of any dtype.
        if header.dtype not in FLOAT_DTYPES and (name in weights or name.endswith(".weight")):
            raise CheckpointError(
                f"`{name}` is {header.dtype}, but the config names no quantization; "
                f"weights must be {', '.join(FLOAT_DTYPES)}"
            )


def _check_names(skeleton: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
    """Compare names and sizes, where the checkpoint's names are the model's.

    If any name is unknown, transformers may rename, split or merge weights while loading; then its own
    report, after loading, decides.
    """
    expected = dict(skeleton.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in skeleton.named_buffers()}
    if headers.keys() - expected.keys() - buffers:
        return
    optional = getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()
    needed = expected.keys() - headers.keys() - _tied_names(skeleton)
    _refuse_missing(name for name in needed if not any(re.search(each, name) for each in optional))
    for name, header in headers.items():
        if name in expected and expected[name].numel() != torch.Size(header.shape).numel():
            _refuse_shape(name, header.shape, tuple(expected[name].shape))


def _tied_names(skeleton: nn.Module) -> set[str]:
    """Names of parameters that share a tensor with another one: only one of them is in the checkpoint."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _options(
    quantization: str, device: torch.device, config: PreTrainedConfig, num_ranks: int
) -> dict[str, Any]:
    """What transformers has to be told of models that are not just read and then moved."""
    options: dict[str, Any] = {}
    if quantization != PLAIN or is_quantized(config):
        options = quantization_options(quantization, device)
    if num_ranks > 1:
        # Each process' share has its place by the plan.
        options = {name: value for name, value in options.items() if name != "device_map"}
    return options | parallel_options(num_ranks)


def _load_checked(
    directory: Path,
    dtype: torch.dtype | None,
    attn_implementation: str,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> PreTrainedModel:
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=dtype or "auto",
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                # Reported as a line of our own instead of an exception that points to a table.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Whatever a broken checkpoint makes of the libraries below.
        raise CheckpointError(f"cannot be loaded: {one_line(error)}") from None
    _refuse_missing(report["missing_keys"])
    for name, found, wanted in sorted(report["mismatched_keys"]):
        _refuse_shape(name, found, wanted)
    return model.eval().requires_grad_(False)


def _refuse_missing(names: Iterable[str]) -> None:
    missing = sorted(names)
    if missing:
        count = "1 weight is" if len(missing) == 1 else f"{len(missing)} weights are"
        raise CheckpointError(f"{count} missing from the checkpoint, the first is `{missing[0]}`")


def _refuse_shape(name: str, found: Iterable[int], wanted: Iterable[int]) -> None:
    raise CheckpointError(
        f"`{name}` has the shape {list(found)} in the checkpoint, but {list(wanted)} by config.json"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from logging what we report, or refuse, ourselves."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
