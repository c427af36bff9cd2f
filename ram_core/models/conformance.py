"""Does a model say the same over pages as it says by itself? Asked of every model at load.

Some families are silently wrong behind a custom attention function (recurrent or hybrid layers, biases that
their own masks carry). So a packed, chunked run over pages is compared with the model's own plain forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.errors import CheckpointError
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.backends import least_page_size
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch, Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.quantization import may_round_activations

_PAGE_SIZE = 4
_LENGTH = 24
_CHUNKS = ((0, 9), (9, 22), (22, 23), (23, 24))

Forward = Callable[[PackedBatch, KvPool], Tensor]
"""As `PagedModel.forward`."""


@torch.inference_mode()
def check_conformance(paged: PagedModel, vocab_size: int) -> None:
    """Refuse a model that computes something else in packed chunks than on its own.

    Raises:
        CheckpointError: the logits differ by more than rounding explains.
    """
    difference = far_off(chunked_logits(paged, vocab_size), plain_logits(paged, vocab_size), paged.model)
    if difference is not None:
        kind = paged.model.config.model_type
        raise CheckpointError(
            f"`{paged.name}`: a `{kind}` model gives other logits over paged KV memory than by itself "
            f"({difference})"
        )


def far_off(
    ours: Float[Tensor, "place row vocab"], plain: Float[Tensor, "place row vocab"], model: PreTrainedModel
) -> str | None:
    """How far logits are from what they should be, in words; None if rounding explains it."""
    scale = plain.std().clamp(min=1e-6)
    of_places = ((ours - plain).square().mean(-1).sqrt() / scale).flatten()
    if model.dtype == torch.float32:
        difference = of_places.max().item()
        limit = 0.03 if may_round_activations(model) else 3e-4
    else:
        # Rounding to 16 bits sends a token to other experts now and then, and is far off there: a quarter of
        # the places is left out. What reads pages wrongly is wrong at most of them.
        difference, limit = of_places.quantile(0.75).item(), 0.1
    if difference <= limit:
        return None
    return f"difference {difference:.2g} standard deviations, limit {limit:g}"


@torch.inference_mode()
def plain_logits(paged: PagedModel, vocab_size: int) -> Float[Tensor, "place row vocab"]:
    """The model's own forward over each whole sequence, without a cache."""
    ids = _probe_ids(vocab_size)
    paged.model.set_attn_implementation("eager")
    try:
        logits = paged.model(input_ids=ids.to(paged.device), use_cache=False).logits
    finally:
        paged.model.set_attn_implementation(ATTENTION_NAME)
    return torch.as_tensor(logits[:, [end - 1 for _, end in _CHUNKS]]).float().transpose(0, 1)


@torch.inference_mode()
def chunked_logits(
    paged: PagedModel, vocab_size: int, forward: Forward | None = None
) -> Float[Tensor, "place row vocab"]:
    """What a model says of two sequences, packed into one batch, chunk by chunk over scattered pages.

    `forward` is the model's own, or that of what its weights were moved to.
    """
    forward = forward or paged.forward
    ids = _probe_ids(vocab_size)
    page_size = max(_PAGE_SIZE, least_page_size(paged.attention))
    pages_each = -(-_LENGTH // page_size)
    pool = KvPool(paged.geometry, 2 * pages_each + 1, page_size, paged.device)
    pages = [list(range(1 + row, 2 * pages_each + 1, 2))[::-1] for row in range(2)]
    logits = []
    for start, end in _CHUNKS:
        rows = [Row(ids[row, start:end].tolist(), start, pages[row]) for row in range(2)]
        logits.append(forward(pack(rows, page_size=page_size, device=paged.device), pool).float())
    return torch.stack(logits)


def _probe_ids(vocab_size: int) -> Int64[Tensor, "row token"]:
    return torch.arange(2 * _LENGTH).mul(7919).remainder(vocab_size).view(2, _LENGTH)
