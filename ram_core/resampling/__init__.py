"""Resampling: from a proposal's and its aligners' logits to one drawn token a row."""

from ram_core.resampling.draw import draw_tokens
from ram_core.resampling.draws import Draws
from ram_core.resampling.fused import warm_up
from ram_core.resampling.logits import AlignerLogits
from ram_core.resampling.params import Mode, StepFeatures, StepParams
from ram_core.resampling.telemetry import Telemetry

__all__ = [
    "AlignerLogits",
    "Draws",
    "Mode",
    "StepFeatures",
    "StepParams",
    "Telemetry",
    "draw_tokens",
    "warm_up",
]
