"""Random-weight checkpoints of real shapes, made once in a temporary directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's size; `vocab_size` is shared by a pair."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab_size: int
    is_tied: bool
    context: int = 2048

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=self.context,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )


PAIRS = {
    # About 100 M and 10 M parameters.
    "small": (
        Shape(768, 12, 12, 4, 2048, VOCAB_SIZE, is_tied=True),
        Shape(256, 3, 4, 2, 688, VOCAB_SIZE, is_tied=True),
    ),
    # Llama-3.1-8B and Llama-3.2-1B.
    "llama": (
        Shape(4096, 32, 32, 8, 14336, 128_256, is_tied=False, context=8192),
        Shape(2048, 16, 32, 8, 8192, 128_256, is_tied=True, context=8192),
    ),
}


def save_pair(name: str, directory: Path, dtype: torch.dtype, device: str) -> tuple[str, str, list[int]]:
    """Save both models of a pair, with a tokenizer that has a name for every id.

    Returns both directories and their parameter counts. Weights are drawn on `device`.
    """
    paths, counts = [], []
    for part, shape in zip(("proposal", "aligner"), PAIRS[name], strict=True):
        torch.manual_seed(len(part))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
        counts.append(sum(p.numel() for p in model.parameters()))
        paths.append(directory / part)
        model.save_pretrained(paths[-1])
        save_tokenizer(paths[-1], shape.vocab_size)
        del model
    return str(paths[0]), str(paths[1]), counts


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    words = special + [f"w{index}" for index in range(len(special), vocab_size)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(directory)
