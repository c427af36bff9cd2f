"""The step loop's body: commands in, events out. Knows no threads, no queues, no clocks but one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence as Rows

from ram_core.engine.bank import ModelBank, Progress, load_bank
from ram_core.engine.config import EngineConfig
from ram_core.engine.memory import keep_freed_memory
from ram_core.engine.messages import (
    Cancel,
    Command,
    EngineStats,
    Event,
    FailedEvent,
    Request,
    StartedEvent,
    TokenEvent,
)
from ram_core.engine.pages import PageBook
from ram_core.engine.runner import Draw, Runner
from ram_core.engine.scheduler import ScheduledRow, Scheduler
from ram_core.engine.sequence import Lane, Sequence
from ram_core.errors import NonFiniteLogits

# An odd constant spreads the choices of one seeded request over the noise's key space.
_CHOICE_STRIDE = 0x9E3779B97F4A7C15


class Engine:
    """Continuous batching of a proposal and its aligners. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, bank: ModelBank) -> None:
        self.config = config
        self.bank = bank
        self.limits = bank.limits
        self._scheduler = Scheduler(
            {name: PageBook(pool.num_pages) for name, pool in bank.pools.items()},
            page_size=bank.page_size,
            num_slots=config.max_batch,
            max_step_tokens=config.max_step_tokens,
        )
        self._runner = Runner(bank, num_slots=config.max_batch)
        self._num_steps = 0

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress = lambda _: None) -> Engine:
        """Load what `config` names. Raises `CheckpointError` if any of it cannot be served."""
        keep_freed_memory()
        return cls(config, load_bank(config, progress))

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """The books' numbers; pages are those of the fullest pool."""
        fullest = max(self._scheduler.books.values(), key=lambda book: book.num_used)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_pages_used=fullest.num_used,
            num_pages=fullest.num_pages,
            num_steps=self._num_steps,
            last_progress_s=time.monotonic(),
        )

    def handle(self, command: Command) -> None:
        """Take a command. Requests must have passed `limits.check`."""
        if isinstance(command, Cancel):
            for sequence in self._scheduler.find(command.request_id, command.index):
                self._scheduler.remove(sequence)
        else:
            for index in range(command.num_choices):
                self._scheduler.add(self._make_sequence(command, index))

    def step(self) -> list[Event]:
        """Advance every scheduled sequence; return what there is to tell."""
        plan = self._scheduler.plan()
        for sequence in plan.started:
            self._runner.start(sequence)
        events = self._tell_started(plan.started)
        if plan.rows:
            events += self._commit(plan.rows, self._runner.run(plan))
        self._num_steps += 1
        return events

    def _make_sequence(self, request: Request, index: int) -> Sequence:
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        alignment = request.alignment
        lanes = [Lane("proposal", self.bank.proposal_pool)]
        if not alignment.is_identity:
            lanes += [
                Lane(term.aligner, self.bank.pool_of[term.aligner], term.strength) for term in alignment.terms
            ]
        eos = frozenset() if request.sampling.ignore_eos else self.bank.eos_ids
        return Sequence(
            request=request,
            index=index,
            seed=_wrap_int64(seed + index * _CHOICE_STRIDE),
            lanes=lanes,
            stop_ids=eos | frozenset(request.sampling.stop_token_ids),
            max_tokens=self.limits.max_tokens(request),
            arrived_s=time.monotonic(),
            token_ids=list(request.prompt_ids),
        )

    def _tell_started(self, started: Rows[Sequence]) -> list[Event]:
        """One event a request, when its first choice leaves the queue for the first time."""
        events: list[Event] = []
        for sequence in started:
            if sequence.index == 0 and not sequence.has_started:
                queue_s = time.monotonic() - sequence.arrived_s
                events.append(StartedEvent(sequence.request.request_id, queue_s))
            sequence.has_started = True
        return events

    def _commit(self, rows: Rows[ScheduledRow], draws: Rows[Draw]) -> list[Event]:
        events: list[Event] = []
        pending = iter(draws)
        for row in rows:
            draw = next(pending) if row.draws else None
            self._scheduler.commit(row, draw.token_id if draw and not draw.is_bad else None)
            if draw is not None:
                events.append(self._conclude(row.sequence, draw))
        return events

    def _conclude(self, sequence: Sequence, draw: Draw) -> Event:
        """Tell what a sequence drew; one that ended leaves its slot and pages."""
        request_id, index = sequence.request.request_id, sequence.index
        if draw.is_bad:
            self._scheduler.remove(sequence)
            error = NonFiniteLogits("A model returned non-finite logits for this request.")
            return FailedEvent(request_id, index, error)
        reason = sequence.finish_reason_after(draw.token_id)
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(
            request_id=request_id,
            index=index,
            token_id=draw.token_id,
            log_prob=draw.log_prob,
            top_log_probs=draw.top_log_probs,
            telemetry=draw.telemetry,
            finish_reason=reason,
        )


def _wrap_int64(value: int) -> int:
    """The int64 that `value` overflows to."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
