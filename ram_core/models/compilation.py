"""A decoder's layers as one compiled graph, for a device or a CPU with a compiler at hand.

What lies between matrix products (norms, rotary embedding, gates, sums) then runs as a few fused kernels.
Attention over pages and packed products stay opaque, as they are made for their purpose. The head stays as it
is, so that the graph depends on the number of tokens alone: it is compiled for one token, and for many.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ram_core.models.conformance import chunked_logits, far_off
from ram_core.models.fused_layers import fuse_layers, restore_layers
from ram_core.models.paged import PagedModel

logger = logging.getLogger(__name__)


@torch.inference_mode()
def compile_layers(paged: PagedModel, vocab_size: int) -> str | None:
    """Compile all that lies between a model's head and its token ids; takes some seconds to a minute.

    Nothing is compiled afterwards, while requests are served. Returns None if the compiled layers give the
    logits that the plain ones gave, else the reason why the model runs as it did before.
    """
    model = paged.model
    name, plain = model.base_model_prefix, model.base_model
    if plain is model:
        return f"a `{model.config.model_type}` model has no decoder beside its head"
    expected = chunked_logits(paged, vocab_size)
    # A compiler joins operations by itself, and cannot read what joined them before.
    restore_layers(plain)
    compiled: nn.Module = torch.compile(plain, fullgraph=True, dynamic=True)  # type: ignore[assignment]
    setattr(model, name, compiled)
    try:
        difference = far_off(chunked_logits(paged, vocab_size), expected, model)
        # PyTorch never lets one token stand for many.
        paged.run_blank(1)
    except Exception as error:
        # Of many kinds: a missing compiler, code that cannot be traced, a bug in either.
        logger.debug("compiling `%s` failed", paged.name, exc_info=True)
        reason = _root_of(error)
    else:
        if difference is None:
            return None
        reason = f"compiled, it gives other logits ({difference})"
    setattr(model, name, plain)
    fuse_layers(model)
    return reason


def _root_of(error: BaseException) -> str:
    """The first line of the error that others were raised from."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]
