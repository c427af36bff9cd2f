"""Tiny random-weight checkpoints, as transformers saves them: for tests and benchmarks.

Everything is seeded: the same call makes the same files. Weights are drawn wide, so that logits are far
from flat and greedy decoding has no near ties in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Family = Literal["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss"]

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss")
VOCAB_SIZE = 300

BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>"]

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A proposal model writes; a small aligner weighs what it writes.",
    "Please tell me where the library is. Thank you, that is very kind of you.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Ne vous inquiétez pas: le thé est prêt, café aussi 🙂.",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CONFIGS: dict[Family, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "gpt_oss": GptOssConfig,
}
_GEMMAS = ("gemma2", "gemma3")


def make_tokenizer(
    vocab_size: int = VOCAB_SIZE, *, sentences: Iterable[str] = SENTENCES
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template: every text can be encoded, there is no unknown token.

    `vocab_size` counts 256 bytes, 6 special tokens and the merges learnt from `sentences`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    core.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_config(
    family: Family,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    max_position_embeddings: int = 256,
    sliding_window: int = 8,
    is_tied: bool | None = None,
    **overrides: Any,
) -> PreTrainedConfig:
    """A small config. `is_tied` None ties gemmas only; llama and qwens have no `sliding_window`."""
    options: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": family in _GEMMAS if is_tied is None else is_tied,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    if family == "qwen2":
        del options["head_dim"]
    if family in ("mistral", *_GEMMAS, "gpt_oss"):
        options["sliding_window"] = sliding_window
    if family in (*_GEMMAS, "gpt_oss"):
        # Every second layer looks at everything, so that two layers already hold both kinds.
        kinds = ["sliding_attention", "full_attention"]
        options["layer_types"] = [kinds[layer % 2] for layer in range(layers)]
    if family in _GEMMAS:
        options["query_pre_attn_scalar"] = options["head_dim"]
    if family == "gemma2":
        options["attn_logit_softcapping"] = 1.5
    if family == "gpt_oss":
        options |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return _CONFIGS[family](**(options | overrides))


def make_model(
    family: Family, *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.4, **shape: Any
) -> PreTrainedModel:
    """A random model in eval mode; `shape` goes to `make_config`, `std` is that of the weight matrices."""
    model = AutoModelForCausalLM.from_config(make_config(family, **shape))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm gains keep their centre (1, or 0 in gemma), biases stay near 0, and matrices are noise.
            centre = parameter if "norm" in name else torch.zeros_like(parameter)
            width = 0.1 if parameter.ndim == 1 or name.endswith("bias") else std
            # A tied model would only repeat its last token, were it not for a last norm of both signs and,
            # in gemmas, which scale embeddings up and norm what their layers add, for quieter embeddings.
            if name == "model.norm.weight":
                width = 3.0
            elif family in _GEMMAS and "embed" in name:
                width = std / model.config.hidden_size**0.5
            elif name.endswith("sinks"):
                width = 2.0
            parameter.copy_(centre + width * torch.randn(parameter.shape, generator=noise))
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return model.eval().requires_grad_(False).to(dtype)


def save_model(
    directory: Path,
    family: Family,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "1GB",
    **options: Any,
) -> Path:
    """Save a random model and its tokenizer into `directory`; `options` go to `make_model`.

    A small `max_shard_size` ("20KB") makes several shards and an index.
    """
    make_model(family, **options).save_pretrained(directory, max_shard_size=max_shard_size)
    (tokenizer or make_tokenizer()).save_pretrained(directory)
    return directory


def save_pair(
    directory: Path,
    family: Family = "llama",
    *,
    aligners: Iterable[str] = ("polite", "terse"),
    aligner_family: Family | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Path, dict[str, Path]]:
    """Save a proposal and smaller aligners of one vocabulary: (proposal directory, {name: directory}).

    `options` (`vocab_size`, `max_shard_size`, `tokenizer`, …) hold for all; the aligners are half as wide
    and one layer shorter.
    """
    shape = {"hidden": 32, "layers": 2} | options
    small = shape | {"hidden": max(8, shape["hidden"] // 2), "layers": max(1, shape["layers"] - 1)}
    proposal = save_model(directory / "proposal", family, seed=seed, dtype=dtype, **shape)
    saved = {
        name: save_model(directory / name, aligner_family or family, seed=seed + index, dtype=dtype, **small)
        for index, name in enumerate(aligners, start=1)
    }
    return proposal, saved
