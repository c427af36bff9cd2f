"""Random-weight checkpoints of real shapes, and what one step of them costs on paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 32_000
# Messages one after the other, so that a chat's prompt has as many tokens as its words.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


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
    context: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def num_matrix_numbers(self) -> int:
        """Numbers in all matrices that a token is multiplied with, the output's among them."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocab_size

    @property
    def num_read(self) -> int:
        """Numbers that a step reads of the weights: matrices and norms, but no table of embeddings."""
        return self.num_matrix_numbers + (2 * self.layers + 1) * self.hidden

    @property
    def num_parameters(self) -> int:
        return self.num_read + (0 if self.is_tied else self.hidden * self.vocab_size)

    @property
    def num_kept(self) -> int:
        """Numbers that the KV memory keeps of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def token_flops(self, context: int) -> int:
        """Floating-point operations to read one token behind `context` others."""
        return 2 * self.num_matrix_numbers + 4 * self.layers * self.hidden * context


PAIRS = {
    # For tests of the commands.
    "tiny": (
        Shape(64, 2, 4, 2, 96, 512, is_tied=True),
        Shape(32, 2, 2, 1, 48, 512, is_tied=True),
    ),
    # About 100 M and 10 M parameters.
    "small": (
        Shape(768, 12, 12, 4, 2048, VOCAB_SIZE, is_tied=True),
        Shape(256, 3, 4, 2, 688, VOCAB_SIZE, is_tied=True),
    ),
    # Llama-3.1-8B and Llama-3.2-1B.
    "llama": (
        Shape(4096, 32, 32, 8, 14336, 128_256, is_tied=False),
        Shape(2048, 16, 32, 8, 8192, 128_256, is_tied=True),
    ),
}


def llama_config(shape: Shape) -> LlamaConfig:
    """The shape as transformers knows it."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=shape.context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def save_checkpoint(shape: Shape, directory: Path, dtype: str, device: str, seed: int) -> None:
    """A model of random weights, drawn on `device`, and a tokenizer that has a name for every id."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    _save_tokenizer(directory, shape.vocab_size)


def _save_tokenizer(directory: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` made-up words, which become bytes as those of most checkpoints do."""
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    # As byte-level tokenizers write a word behind a space.
    words = special + [
        f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}w{n}" for n in range(len(special), vocab_size)
    ]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
