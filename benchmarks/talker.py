"""An engine's process that draws nothing: the same token for everybody, one a step, at a steady pace."""

from __future__ import annotations

import time

from ram_core.engine.limits import EngineLimits
from ram_core.engine.messages import (
    Cancel,
    Command,
    EngineBegan,
    EngineStats,
    Event,
    Request,
    StartedEvent,
    StepTelemetry,
    TokenEvent,
)
from ram_core.engine.parent import die_with
from ram_core.engine.wire import Load, Ready
from ram_core.engine.worker import Line, run

VOCAB_SIZE = 512
STEP_S = 0.01
_TOKEN_ID = 100
_MAX_MODEL_LEN = 8192
_TELEMETRY = StepTelemetry(kl_p_q=0.5, kl_pi_p=0.25, ess=0.75, aligner_mass=0.9, is_fallback=False)


class Talker:
    """What `ram_core.engine.worker.run` needs of an engine."""

    def __init__(self) -> None:
        self._num_left: dict[str, int] = {}
        self._events: list[Event] = []
        self._next_s = 0.0
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._num_left)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._num_left), num_steps=self.num_steps, last_progress_s=time.monotonic()
        )

    def handle(self, command: Command) -> None:
        """Begin or forget a request."""
        if isinstance(command, Request):
            self._num_left[command.request_id] = command.sampling.max_tokens
            self._events.append(StartedEvent(command.request_id, 0.0))
        elif isinstance(command, Cancel):
            self._num_left.pop(command.request_id, None)

    def tend(self) -> tuple[()]:
        """Nothing is loaded or freed."""
        return ()

    def step(self) -> list[Event]:
        """A token for everybody, at the next tick."""
        now_s = time.monotonic()
        time.sleep(max(0.0, self._next_s - now_s))
        self._next_s = max(self._next_s, now_s) + STEP_S
        self.num_steps += 1
        events, self._events = self._events, []
        for request_id in list(self._num_left):
            self._num_left[request_id] -= 1
            is_last = not self._num_left[request_id]
            if is_last:
                del self._num_left[request_id]
            reason = "length" if is_last else None
            events.append(
                TokenEvent(request_id, 0, _TOKEN_ID, -0.5, telemetry=_TELEMETRY, finish_reason=reason)
            )
        return events


def main(orders_at: str, news_at: str, parent_pid: str) -> None:
    """As `ram_core.engine.worker.main`, but there is nothing to load."""
    die_with(int(parent_pid))
    line = Line(orders_at, news_at)
    load = line.wait()
    assert isinstance(load, Load), "the first order is what to load"
    limits = EngineLimits(VOCAB_SIZE, _MAX_MODEL_LEN, page_size=16, num_pages=2**20, pools={})
    line.tell(Ready(limits, EngineBegan((), (), memory_bytes=0, bytes_per_weight=4, device="cpu")))
    run(Talker(), line)  # type: ignore[arg-type]
