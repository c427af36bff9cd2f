"""How a device runs a mixture of experts: few tokens without a look at their routing from the host.

transformers calls this through its public `ExpertsInterface`, and has both ways itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

EXPERTS_NAME = "ram_experts"
"""The `experts_implementation` under which our function is registered."""

_WAYS = ExpertsInterface()


def _run_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Gather weights token by token where these are no more than all experts' together, else group tokens.

    Grouping may read on the host which experts were chosen (for other dtypes than bfloat16, for one), which
    no recorded step can. Many tokens, each with weights of its own, would take many times the memory of all.
    """
    num_experts: int = module.num_experts  # type: ignore[assignment]  # every experts module has it
    way = "batched_mm" if top_k_index.numel() <= num_experts else "grouped_mm"
    out: Tensor = _WAYS[way](module, hidden_states, top_k_index, top_k_weights)
    return out


ExpertsInterface.register(EXPERTS_NAME, _run_experts)


def choose_experts(model: PreTrainedModel) -> None:
    """Let a model on CUDA run its experts our way, if it has any in plain weights."""
    config: Any = model.config
    is_plain = getattr(config, "quantization_config", None) is None
    if model.device.type == "cuda" and is_plain and _groups(config):
        model.set_experts_implementation(EXPERTS_NAME)


def _groups(config: Any) -> bool:
    """Whether experts are run as transformers does it unless told otherwise; models without any do not."""
    return getattr(config, "_experts_implementation", None) == "grouped_mm"
