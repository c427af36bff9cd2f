"""What a packed aligner's manifest says of how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ram_core import __version__
from ram_core.aligners.pack import Wishes
from ram_core.training.config import FREE_FIELDS, TrainConfig
from ram_core.training.fingerprints import model_fingerprint, model_name
from ram_core.training.inputs import Inputs

# Said elsewhere, or of the machine and not of what came of it.
_LEFT_OUT = FREE_FIELDS | {"model", "objective", "lora"}
# Fields that one objective alone reads.
_READ_BY = {
    "ascent_weight": "ram",
    "dpo_beta": "ram-dpo",
    "top_k_log_probs": "ram-token",
    "strength": "ram-token",
}


def wishes_of(config: TrainConfig, name: str, inputs: Inputs, fitted: Mapping[str, Any]) -> Wishes:
    """The manifest's fields for a run's aligner; `fitted` is the summary of its fit."""
    package = config.package
    trained_at = config.fit.strength if config.fit.objective == "ram-token" else 1.0
    return Wishes(
        name=name,
        version=package.version or None,
        strength=trained_at if package.strength is None else package.strength,
        resampling=package.resampling,
        candidates=package.candidates,
        kl_threshold=math.inf if package.kl_threshold is None else package.kl_threshold,
        license=package.license or None,
        provenance=_provenance(config, inputs, fitted),
    )


def _provenance(config: TrainConfig, inputs: Inputs, fitted: Mapping[str, Any]) -> dict[str, str]:
    if config.warmup.model:
        proposal = f"{model_name(config.warmup.model)}, warmed up"
    else:
        proposal = model_name(config.proposal)
    source = config.data.train
    told: dict[str, Any] = {
        "trained_by": f"ram-server {__version__}",
        "proposal": proposal,
        "proposal_fingerprint": model_fingerprint(config.proposal),
        "model": model_name(config.fit.model),
        "model_fingerprint": model_fingerprint(config.fit.model),
        "objective": config.fit.objective,
        "seed": config.seed,
        "data": source if source.startswith("hf:") else Path(source).name,
        "data_fingerprint": inputs.fingerprint,
        "data_records": len(inputs.encoded.pairs),
        **_flat("fit", _hyper_parameters(config)),
    }
    if config.needs_synthesis:
        synthesis = config.synthesize
        names = ("temperature", "top_p", "top_k", "max_answer_tokens", "from_rejected")
        told |= _flat("synthesize", {name: getattr(synthesis, name) for name in names})
    told |= _flat("metrics", {**fitted["metrics"], "steps": fitted["steps"], "flops": fitted["flops"]})
    return {key: _text(value) for key, value in told.items()}


def _hyper_parameters(config: TrainConfig) -> dict[str, Any]:
    fields = msgspec.structs.asdict(config.fit)
    kept = {
        name: value
        for name, value in fields.items()
        if name not in _LEFT_OUT and _READ_BY.get(name, config.fit.objective) == config.fit.objective
    }
    if config.fit.lora.rank:
        kept |= {f"lora.{name}": value for name, value in msgspec.structs.asdict(config.fit.lora).items()}
    return kept


def _flat(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in fields.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
