"""Resampling: from a proposal's and its aligners' logits to one drawn token a row. Pure torch functions."""

from ram_core.resampling.logits import AlignerLogits
from ram_core.resampling.params import Mode, StepFeatures, StepParams
from ram_core.resampling.step import Draws, draw_tokens
from ram_core.resampling.telemetry import Telemetry

__all__ = ["AlignerLogits", "Draws", "Mode", "StepFeatures", "StepParams", "Telemetry", "draw_tokens"]
