"""What a request cost: told to its tenant's ledger, to the metrics and to the usage log when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.generation import Generation
from server.metrics import Metrics
from server.openai.errors import HUNG_UP, to_api_error
from server.tenants.limits import Reservation
from server.tenants.tenants import Caller
from server.tenants.usage import UsageLog, UsageRecord, timestamp


@dataclass(frozen=True, slots=True)
class Account:
    """Where one request's cost goes.

    `aligner` is a bounded label, `versions` are those that answer; `arrived_s` is `time.perf_counter`'s.
    """

    caller: Caller
    reservation: Reservation
    metrics: Metrics
    usage_log: UsageLog | None
    request_id: str
    model: str
    aligner: str
    versions: tuple[str, ...]
    arrived_s: float
    prompt_texts: Callable[[], tuple[str, ...]] = field(repr=False)

    @property
    def keeps_text(self) -> bool:
        """Whether the log wants to know what was said."""
        return self.usage_log is not None and self.caller.tenant.log == "full"

    def close(self, generation: Generation) -> None:
        """The generation has ended, however it did."""
        self.reservation.settle(generation.num_started_prompt_tokens + generation.num_completion_tokens)
        if not self.caller.is_anybody:
            self._count(generation)
        if self.usage_log is not None and self.caller.tenant.log != "none":
            self.usage_log.write(self._record(generation))

    def _count(self, generation: Generation) -> None:
        labels = self.caller.tenant.name, self.aligner
        self.metrics.tenant_requests.labels(*labels).inc()
        self.metrics.tenant_prompt_tokens.labels(*labels).inc(generation.num_started_prompt_tokens)
        self.metrics.tenant_cached_tokens.labels(*labels).inc(generation.num_cached_tokens)
        self.metrics.tenant_completion_tokens.labels(*labels).inc(generation.num_completion_tokens)

    def _record(self, generation: Generation) -> UsageRecord:
        return UsageRecord(
            time=timestamp(time.time()),
            tenant=self.caller.tenant.name,
            key=self.caller.key_id,
            request=self.request_id,
            model=self.model,
            aligner=self.aligner,
            prompt_tokens=generation.num_started_prompt_tokens,
            cached_tokens=generation.num_cached_tokens,
            completion_tokens=generation.num_completion_tokens,
            finish_reason=generation.outcome,
            status=_status(generation),
            seconds=round(time.perf_counter() - self.arrived_s, 4),
            versions=self.versions,
            prompts=self.prompt_texts() if self.keeps_text else (),
            answers=generation.texts,
        )


def _status(generation: Generation) -> int:
    """What the client heard, or would have, in a stream that had begun, or if it had not hung up."""
    if generation.failure is not None:
        return to_api_error(generation.failure).status
    return HUNG_UP if generation.outcome == "abort" else 200
