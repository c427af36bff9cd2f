"""Models as training begins with them, and as it leaves them: with LoRA or without, whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from ram_core.aligners.files import hash_files, list_files
from ram_core.models.loading import load_config, load_model
from ram_core.models.lora import MAX_RANK
from ram_core.models.source import resolve_source
from ram_core.models.vocabulary import describes_tokens
from ram_core.training.config import LoraConfig
from ram_core.training.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Starting:
    """The model that a run begins with: a directory or a hub id, with a LoRA adapter of rank above 0."""

    source: str
    lora: LoraConfig
    trust_remote_code: bool
    seed: int

    def build(self) -> PreTrainedModel:
        """The model in float32, its weights trainable; with LoRA, the adapter's alone.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: the adapter fits no layer of it, or could not be served.
        """
        model = load_model(
            self.source,
            device=torch.device("cpu"),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(True)
        return model if self.lora.rank == 0 else self._with_adapter(model)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in; float32 if the config does not say."""
        config = load_config(self.source, trust_remote_code=self.trust_remote_code)
        own = getattr(config, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32

    def _with_adapter(self, model: PreTrainedModel) -> Any:
        from peft import LoraConfig as PeftLoraConfig

        lora = self.lora
        if lora.rank > MAX_RANK and not lora.is_merged:
            raise ConfigError(
                f"`fit.lora.rank` {lora.rank} is above {MAX_RANK}, what is served; "
                "lower it, or set `fit.lora.is_merged`"
            )
        set_seed(self.seed)
        try:
            adapted = _get_peft_model(
                model,
                PeftLoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=list(lora.targets) or "all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        except ValueError as error:
            raise ConfigError(f"`fit.lora`: {' '.join(str(error).split())}") from None
        directory = Path(self.source).expanduser()
        base = str(directory.resolve()) if directory.is_dir() else self.source
        adapted.peft_config["default"].base_model_name_or_path = base
        return adapted


def write_checkpoint(
    model: Any, state: Mapping[str, Tensor] | None, starting: Starting, directory: Path
) -> None:
    """Write a trained model as a directory that is served: weights, config, tokenizer.

    `state` holds its weights where they were gathered from several processes. Weights are in the dtype that
    the model came in; an adapter's are float32. What is at `directory` is replaced when all is written.
    """
    if state is not None:
        model = starting.build()
        model.load_state_dict(dict(state))
    lora = starting.lora
    if lora.rank and lora.is_merged:
        model = model.merge_and_unload()
    if not lora.rank or lora.is_merged:
        model = model.to(starting.dtype)
    aside = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    # PEFT writes a model card with nothing in it.
    (aside / "README.md").unlink(missing_ok=True)
    _copy_tokenizer(resolve_source(starting.source, with_weights=False), aside)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def _get_peft_model(model: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks transformers for things by their old names.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def content_hash(source: str) -> str:
    """What a model's files are, by their SHA-256; one line for each."""
    directory = resolve_source(source, with_weights=True)
    return "\n".join(f"{digest} {name}" for name, digest in hash_files(list_files(directory)).items())


def require_packages(*, with_peft: bool) -> None:
    """Raise `TrainingError` if what only training needs is not installed."""
    for name in ("accelerate", *(["peft"] if with_peft else [])):
        if find_spec(name) is None:
            raise TrainingError(f"training needs `{name}`: pip install 'ram-server[train]'")


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own, for each file that it reads or writes."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files as they are, so that both are seen to be the same."""
    for path in source.iterdir():
        if path.is_file() and (describes_tokens(path.name) or path.suffix == ".jinja"):
            shutil.copyfile(path, target / path.name)
