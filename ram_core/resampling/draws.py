"""What a step yields."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ram_core.resampling.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Draws:
    """What a step yields, one entry a row.

    `log_prob` and the `top_*` (most probable first) are of the law that was really sampled; for a greedy
    row, of the law at temperature 1. They are NaN where the law has no closed form (`candidates`).
    A row with `is_bad` had non-finite logits, or a bias that left it no token: its token means nothing.
    """

    token: Int64[Tensor, " batch"]
    log_prob: Float[Tensor, " batch"]
    top_token: Int64[Tensor, "batch top"]
    top_log_prob: Float[Tensor, "batch top"]
    telemetry: Telemetry
    is_bad: Bool[Tensor, " batch"]

    def put(self, rows: Int64[Tensor, " rows"], draws: Draws) -> None:
        """Write `draws` into `rows`."""
        for field in fields(Draws):
            if field.name != "telemetry":
                getattr(self, field.name)[rows] = getattr(draws, field.name)
        for field in fields(Telemetry):
            getattr(self.telemetry, field.name)[rows] = getattr(draws.telemetry, field.name)
