"""The step loop's body: commands in, events out. Knows no threads, no queues, no clocks but one."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager, nullcontext

from msgspec.structs import replace

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.aligner_loads import AlignerLoads
from ram_core.engine.bank import PROPOSAL, ModelBank
from ram_core.engine.config import EngineConfig
from ram_core.engine.graphs import CudaRecorder, EagerRecorder, Recorder, graph_shapes
from ram_core.engine.layout import Shapes, buckets
from ram_core.engine.limits import EngineLimits
from ram_core.engine.load_bank import Progress, load_bank
from ram_core.engine.memory import keep_freed_memory
from ram_core.engine.messages import (
    AlignerOutcome,
    Cancel,
    Command,
    EngineBegan,
    EngineStats,
    Event,
    FailedEvent,
    FreeAligner,
    LoadAligner,
    Prefill,
    Request,
    StartedEvent,
    TokenEvent,
)
from ram_core.engine.newcomers import Newcomers
from ram_core.engine.pages import PageBook, chain_root, pages_for
from ram_core.engine.plan import tell_plan
from ram_core.engine.room import free_text, is_out_of_memory, memory_for_aligners
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.runner import Draw, LaunchedStep, Runner, step_kinds
from ram_core.engine.scheduler import Scheduler
from ram_core.engine.sequence import Lane, Sequence
from ram_core.engine.turnover import Turnover
from ram_core.errors import AlignerUnavailable, EngineOutOfMemory, NonFiniteLogits
from ram_core.models.backends import can_be_recorded
from ram_core.models.compilation import compile_layers
from ram_core.models.cores import one_thread
from ram_core.models.filling import WeightsMissing
from ram_core.params import AlignmentParams, SamplingParams
from ram_core.resampling import warm_up

logger = logging.getLogger(__name__)

# An odd constant spreads the choices of one seeded request over the noise's key space.
_CHOICE_STRIDE = 0x9E3779B97F4A7C15


# Tokens of a step, and of prompts beside writing, where the configuration names none.
_STEP_TOKENS = {"cpu": (512, 64)}
_DEFAULT_STEP_TOKENS = (8192, 2048)


class Engine:
    """Continuous batching of a proposal and its aligners. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, bank: ModelBank) -> None:
        self.config = config
        self.bank = bank
        self.wake: Callable[[], None] = lambda: None
        device = bank.proposal.device.type
        step_tokens, chunk_tokens = _STEP_TOKENS.get(device, _DEFAULT_STEP_TOKENS)
        self._scheduler = Scheduler(
            {name: self._new_book(pool.num_pages) for name, pool in bank.pools.items()},
            page_size=bank.page_size,
            num_slots=config.max_batch,
            max_step_tokens=config.max_step_tokens or step_tokens,
            max_chunk_tokens=config.max_chunk_tokens or chunk_tokens,
        )
        has_graphs = device == "cuda" if config.cuda_graphs is None else config.cuda_graphs
        self._has_graphs = has_graphs and can_be_recorded(bank.proposal.attention)
        self._runner = Runner(bank, num_slots=config.max_batch, shapes=self._shapes())
        is_overlapping = device == "cuda" if config.is_overlapping is None else config.is_overlapping
        self._max_in_flight = int(is_overlapping)
        self._in_flight: deque[list[LaunchedStep]] = deque()
        self._counts: Counter[str] = Counter()
        newcomers = Newcomers(
            bank.terms,
            lambda: list(bank.group_by_name.values()),
            lambda: list(bank.pools.values()),
            # Elsewhere the steps' work is on other cores.
            lambda: device == "cpu" and self._scheduler.is_busy,
        )

        def forget(group: AlignerGroup) -> None:
            self._runner.forget(group)
            newcomers.keep(group)

        self._turnover = Turnover(
            bank,
            self._scheduler,
            AlignerLoads(newcomers.load, lambda: self.wake()),
            self._new_book,
            forget,
        )
        # What was found out between steps, to be told with the next one.
        self._failed: list[Event] = []

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress = lambda _: None) -> Engine:
        """Load what `config` names. Raises `CheckpointError` if any of it cannot be served."""
        keep_freed_memory()
        bank = load_bank(config, progress)
        warm_up(bank.proposal.device)
        engine = cls(config, bank)
        plan = bank.plan
        if config.compile:
            plan = plan.with_row("compiled layers", *engine.compile(progress))
        if engine._has_graphs:
            plan = plan.with_row("captured steps", *engine.capture(progress))
        tell_plan(plan.with_row("left free", free_text(bank.proposal.device)), progress)
        return engine

    def _shapes(self) -> Shapes | None:
        """What steps that only draw are padded to, if anything."""
        max_batch, max_pages = self.config.max_batch, pages_for(self.bank.max_model_len, self.bank.page_size)
        if self._has_graphs:
            return graph_shapes(max_batch, max_pages, num_kinds=len(step_kinds(self.bank)))
        return Shapes(buckets(max_batch), buckets(max_pages)) if self.config.has_static_shapes else None

    def compile(self, progress: Progress = lambda _: None) -> tuple[str, str]:
        """Compile layers, before any request is served; returns how many models', and why not others'."""
        models = [self.bank.proposal]
        models += [group.model for group in self.bank.groups if not group.is_stacked]
        reasons = []
        for model in models:
            progress(f"compiling the layers of {model.name}")
            if self.bank.ranks.size > 1 and model is self.bank.proposal:
                reason: str | None = "several processes share it"
            else:
                reason = compile_layers(model, self.bank.vocab_size)
            if reason:
                reasons.append(f"`{model.name}` runs as it is: {reason}")
                logger.warning("%s", reasons[-1])
        count = f"{len(models) - len(reasons)} of {len(models)} models"
        return count, "; ".join(reasons) or "those in a shared module run as they are"

    def capture(
        self, progress: Progress = lambda _: None, recorder: Recorder | None = None
    ) -> tuple[str, str]:
        """Record common steps, before any request is served; returns how many, and why not more."""
        device = self.bank.proposal.device
        if recorder is None:
            recorder = CudaRecorder(device) if device.type == "cuda" else EagerRecorder()
        graphs = self._runner.capture(recorder, progress)
        return str(len(graphs)), graphs.trouble or "that only draw, by layout; all others run as they come"

    def _new_book(self, num_pages: int) -> PageBook:
        return PageBook(num_pages, keeps_idle=self.config.prefix_cache)

    @property
    def limits(self) -> EngineLimits:
        """What requests are checked against; aligners come and go."""
        return self.bank.limits

    @property
    def began(self) -> EngineBegan:
        """What is told of aligners when the engine takes orders."""
        device = self.bank.proposal.device
        held = sum(num_bytes for group in self.bank.groups for num_bytes in group.weight_bytes.values())
        return EngineBegan(
            aligners=tuple(self.bank.bytes_of.items()),
            failed=tuple(self.bank.failed.items()),
            memory_bytes=memory_for_aligners(self.config, device, held),
            bytes_per_weight=self.bank.terms.dtype.itemsize,
            device=str(device),
        )

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._failed) or self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """The books' numbers; pages are those of the fullest pool."""
        fullest = max(self._scheduler.books.values(), key=lambda book: book.num_used)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_pages_used=fullest.num_used,
            num_pages=fullest.num_pages,
            last_progress_s=time.monotonic(),
            num_preemptions=self._scheduler.num_preemptions,
            **self._counts,
        )

    def handle(self, command: Command) -> None:
        """Take a command. Requests must have passed `limits.check`."""
        match command:
            case Cancel(request_id, index):
                for sequence in self._scheduler.find(request_id, index):
                    self._scheduler.remove(sequence)
            case LoadAligner():
                self._turnover.load(command)
            case FreeAligner():
                self._failed += self._turnover.free(command)
            case Request():
                self._add(command)
            case Prefill(request):
                self._scheduler.prefill(self._make_prefill(request))

    def _add(self, request: Request) -> None:
        choices = range(request.num_choices)
        for term in request.alignment.terms:
            if term.aligner not in self.bank.group_of:
                # It went while the request was on its way.
                self.handle(Cancel(request.request_id))
                error = AlignerUnavailable(f"The aligner `{term.aligner}` was taken out of memory.")
                self._failed += [FailedEvent(request.request_id, index, error) for index in choices]
                return
        root = self._prefix_root(request)
        self._scheduler.add(*[self._make_sequence(request, index, root) for index in choices])

    def _make_prefill(self, request: Request) -> Sequence:
        """What it would draw is void, so that nothing is asked of it."""
        plain = replace(request, sampling=SamplingParams(), alignment=AlignmentParams())
        sequence = self._make_sequence(plain, 0, self._prefix_root(request))
        sequence.is_prefill = True
        sequence.awaits = () if request.alignment.is_identity else request.alignment.terms
        sequence.lanes += self._turnover.expected_lanes(sequence)
        return sequence

    def tend(self) -> list[AlignerOutcome]:
        """What has come of orders about aligners; to be called between steps, and after `wake`."""
        return self._turnover.tend()

    def step(self) -> list[Event]:
        """Advance every scheduled sequence; return what there is to tell, of this step or the one before."""
        plan = self._scheduler.plan()
        for sequence in plan.started:
            self._runner.start(sequence)
        events, self._failed = self._failed, []
        events += self._tell_started(plan.started)
        if plan.rows:
            with self._cores_for(plan.rows):
                launched, starved = self._launch(plan.rows)
            if len(launched) != 1:
                self._scheduler.shrink()
            events += [self._tell_starved(sequence) for sequence in starved]
            self._in_flight.append(launched)
            self._scheduler.kv.begin_step()
        while len(self._in_flight) > (self._max_in_flight if plan.rows else 0):
            for part in self._in_flight.popleft():
                events += self._commit(part.rows, part.collect())
            # All that it read and wrote is done, on every stream: its results came after.
            self._scheduler.kv.end_step()
        self._counts["num_steps"] += 1
        return events

    def _cores_for(self, rows: Rows[ScheduledRow]) -> AbstractContextManager[None]:
        """All, but for a step that only reads ahead beside a load, which has the others."""
        is_beside = self.bank.proposal.device.type == "cpu" and self._turnover.is_loading
        return one_thread() if is_beside and all(row.sequence.is_prefill for row in rows) else nullcontext()

    def _launch(self, rows: Rows[ScheduledRow]) -> tuple[list[LaunchedStep], list[Sequence]]:
        """Launch rows, in parts if there is no memory for all at once; also whom nothing is left for."""
        try:
            return [self._runner.launch(rows)], []
        except WeightsMissing:
            for row in rows:
                self._scheduler.take_back(row)
            return [LaunchedStep(())], []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("No memory for a step of %d rows: %s", len(rows), error)
        # Only here, as the error held on to the step's tensors.
        self._runner.free_memory()
        if len(rows) == 1:
            return [], self._starve(rows[0])
        half = len(rows) // 2
        launched, starved = self._launch(rows[:half])
        more_launched, more_starved = self._launch(rows[half:])
        return launched + more_launched, starved + more_starved

    def _starve(self, row: ScheduledRow) -> list[Sequence]:
        """A row that finds no memory even alone: a prompt is tried again, as long as chunks get smaller."""
        sequence = row.sequence
        if row.num_tokens > 1 and self._scheduler.can_shrink:
            self._scheduler.put_back(sequence)
            return []
        self._scheduler.remove(sequence)
        return [] if sequence.is_prefill else [sequence]

    def _tell_starved(self, sequence: Sequence) -> FailedEvent:
        self._counts["num_out_of_memory"] += 1
        error = EngineOutOfMemory("The device has no memory left for this request.")
        return FailedEvent(sequence.request.request_id, sequence.index, error)

    def _prefix_root(self, request: Request) -> bytes | None:
        """What a request's pages are found by: none is shared between tenants, unless both are of one group.

        Nor between different salts, ever.
        """
        if self.config.prefix_cache:
            # A tenant may have the name of a group.
            owner = ("group", request.prefix_group) if request.prefix_group else ("tenant", request.tenant)
            return chain_root(*owner, request.cache_salt)
        # Still read a prompt once for all choices.
        return chain_root(request.request_id) if request.num_choices > 1 else None

    def _make_sequence(self, request: Request, index: int, prefix_root: bytes | None) -> Sequence:
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        alignment = request.alignment
        lanes = [Lane(PROPOSAL, self.bank.proposal_pool)]
        if not alignment.is_identity:
            lanes += [self.bank.lane(self.bank.group_of[term.aligner], term) for term in alignment.terms]
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
            prefix_root=prefix_root,
        )

    def _tell_started(self, started: Rows[Sequence]) -> list[Event]:
        """One event a request, when its first choice leaves the queue for the first time."""
        events: list[Event] = []
        for sequence in started:
            if sequence.has_started or sequence.is_prefill:
                continue
            sequence.has_started = True
            self._counts["num_prompt_tokens"] += len(sequence.request.prompt_ids)
            self._counts["num_cached_tokens"] += sequence.num_cached
            if sequence.index == 0:
                queue_s = time.monotonic() - sequence.arrived_s
                events.append(StartedEvent(sequence.request.request_id, queue_s, sequence.num_cached))
        return events

    def _commit(self, rows: Rows[ScheduledRow], draws: Rows[Draw]) -> list[Event]:
        events: list[Event] = []
        pending = iter(draws)
        for row in rows:
            draw = next(pending) if row.draws else None
            if draw is None or not row.is_current:
                continue
            if not draw.is_bad:
                self._scheduler.commit(row, draw.token_id)
                if not row.keeps_end:
                    events.append(self._conclude(row.sequence, draw))
            elif row.keeps_end:
                # Whoever asks will be told when it reads for itself.
                self._scheduler.remove(row.sequence)
            else:
                events.append(self._fail(row.sequence))
        return events

    def _fail(self, sequence: Sequence) -> FailedEvent:
        self._counts["num_failed"] += 1
        self._scheduler.remove(sequence)
        error = NonFiniteLogits("A model computed numbers that are not finite for this request.")
        return FailedEvent(sequence.request.request_id, sequence.index, error)

    def _conclude(self, sequence: Sequence, draw: Draw) -> TokenEvent:
        """Tell what a sequence drew; one that ended leaves its slot and pages."""
        reason = sequence.finish_reason_after(draw.token_id)
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_id=draw.token_id,
            log_prob=draw.log_prob,
            top_log_probs=draw.top_log_probs,
            telemetry=draw.telemetry,
            finish_reason=reason,
        )


def _wrap_int64(value: int) -> int:
    """The int64 that `value` overflows to."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
