"""A Hugging Face causal LM, unchanged, that reads packed batches and keeps its KV in pages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.errors import CheckpointError
from ram_core.models.attention import AttentionBackend, ShapeProbe, attention_backend
from ram_core.models.backends import choose_backend
from ram_core.models.experts import choose_experts
from ram_core.models.fused_layers import fuse_layers
from ram_core.models.kv import KvGeometry, KvPool
from ram_core.models.packed_linear import pack_linears
from ram_core.models.packing import PackedBatch
from ram_core.models.quantization import weight_bytes
from ram_core.models.stored import take_from_files


class PagedModel:
    """Wraps a model loaded with `attn_implementation=ATTENTION_NAME`, and lays its weights out for inference.

    `attention` is one of `ATTENTION_KINDS`. `weight_bytes` are the bytes of all weights as they are stored in
    this process, tied ones once. A model whose `geometry` is given is neither looked at nor laid out: all its
    weights are to be replaced.

    Raises:
        CheckpointError: a layer of the model does not go through the attention interface.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        attention: str = "auto",
        geometry: KvGeometry | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.attention = attention
        self.device = model.device
        self.weight_bytes = weight_bytes(model)
        choose_experts(model)
        fuse_layers(model)
        if geometry is None:
            pack_linears(model)
            take_from_files(model)
        self.geometry = geometry or self._learn_geometry()

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, pool: KvPool) -> Float[Tensor, "logit padded_vocab"]:
        """Advance every row; return raw logits after each row's last token, for rows that want them."""
        backend = choose_backend(batch, pool, self.attention)
        return self._call(batch.input_ids, batch.positions, batch.logit_tokens, backend)

    def _call(
        self, input_ids: Tensor, positions: Tensor, logit_tokens: Tensor, backend: AttentionBackend
    ) -> Tensor:
        with attention_backend(backend):
            out = self.model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logit_tokens,
            )
        logits: Tensor = out.logits[0]
        return logits

    def run_blank(self, num_tokens: int) -> ShapeProbe:
        """Send tokens through the layers for their shapes alone; what comes out means nothing."""
        probe = ShapeProbe()
        zeros = torch.zeros(num_tokens, dtype=torch.long, device=self.device)
        self._call(zeros, zeros, zeros[:1], probe)
        return probe

    @torch.inference_mode()
    def _learn_geometry(self) -> KvGeometry:
        try:
            probe = self.run_blank(1)
        except CheckpointError:
            raise
        except Exception as error:
            kind = self.model.config.model_type
            raise CheckpointError(
                f"`{self.name}`: a `{kind}` model cannot run on packed batches: {error}"
            ) from error
        layers = sorted(probe.shapes)
        if not layers or layers != list(range(self.model.config.get_text_config().num_hidden_layers)):
            kind = self.model.config.model_type
            raise CheckpointError(
                f"`{self.name}`: not every layer of a `{kind}` model goes through the attention interface"
            )
        return KvGeometry(tuple(probe.shapes[layer] for layer in layers), self.model.dtype)
