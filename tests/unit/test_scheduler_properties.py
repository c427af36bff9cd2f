"""Any traffic at all: memory holds what a sequence believes it to hold, everything ends, and it is fair.

The machine keeps a model of KV memory. A cell holds what a transformer would put there: something that
depends on the model and on all tokens up to the cell's own. What a sequence reads when it draws is compared
with that, cell by cell, so a page that two write to, that is freed too early, or that is shared with somebody
of another tenant, model or text, is found, however it came about.
"""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from msgspec.structs import replace

from ram_core.engine.fair_queue import FairQueue
from ram_core.engine.messages import Request
from ram_core.engine.pages import PageBook, chain_root, pages_for
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.scheduler import Plan, Scheduler
from ram_core.engine.sequence import Lane, Sequence
from ram_core.params import SamplingParams
from tests.unit.test_scheduler import PAGE_SIZE, make_scheduler

NUM_PAGES = 12
NUM_SLOTS = 3
MAX_STEP_TOKENS = 7
MAX_CHUNK_TOKENS = 5
CONTEXT = NUM_PAGES * PAGE_SIZE
LANES = {"p": (("proposal", "p"),)}
LANES["p a"] = (*LANES["p"], ("polite", "a"))
LANES["p b"] = (*LANES["p"], ("terse", "a"))
LANES["p a b"] = (*LANES["p a"], ("terse", "a"))


def drawn_token(sequence: Sequence, position: int) -> int:
    """What a sequence draws at a position: the same after preemption."""
    return (sequence.seed * 31 + position * 7) % 3


def make_choices(
    request: Request, lanes: tuple[tuple[str, str], ...], limit: int, *, shares: bool = True
) -> list[Sequence]:
    return [
        Sequence(
            request=request,
            index=index,
            seed=index,
            lanes=[Lane(model, pool) for model, pool in lanes],
            stop_ids=frozenset(),
            max_tokens=limit,
            arrived_s=0.0,
            token_ids=list(request.prompt_ids),
            prefix_root=chain_root(request.tenant) if shares else None,
        )
        for index in range(request.num_choices)
    ]


class Traffic(RuleBasedStateMachine):
    """Requests come, are cancelled, and are served, with up to one step under way.

    Of some, the proposal reads the prompt before they come, and so do aligners that join it: what they say at
    the end is kept. A step that waits for an aligner's weights may be given up.
    """

    living = Bundle("living")
    coming = Bundle("coming")

    def __init__(self) -> None:
        super().__init__()
        self.books = {pool: PageBook(NUM_PAGES + 1) for pool in "pa"}
        self.scheduler = Scheduler(
            self.books,
            page_size=PAGE_SIZE,
            num_slots=NUM_SLOTS,
            max_step_tokens=MAX_STEP_TOKENS,
            max_chunk_tokens=MAX_CHUNK_TOKENS,
        )
        self.memory: dict[tuple[str, int, int], object] = {}
        self.alive: dict[str, list[Sequence]] = {}
        self.announced: dict[str, Sequence] = {}
        self.under_way: deque[Plan] = deque()
        self.num_requests = 0

    @rule(
        target=living,
        tenant=st.sampled_from(["", "x"]),
        priority=st.sampled_from([0, 0, 1]),
        lanes=st.sampled_from(sorted(LANES)),
        # Few texts, so that prefixes are often those of another request.
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        limit=st.integers(1, 10),
        num_choices=st.integers(1, 3),
    )
    def come(
        self, tenant: str, priority: int, lanes: str, prompt: list[int], limit: int, num_choices: int
    ) -> str:
        return self.add(self.make_request(tenant, priority, prompt, num_choices), lanes, limit)

    def make_request(self, tenant: str, priority: int, prompt: list[int], num_choices: int) -> Request:
        name = str(self.num_requests)
        self.num_requests += 1
        return Request(
            name, tuple(prompt), SamplingParams(), num_choices=num_choices, tenant=tenant, priority=priority
        )

    def add(self, request: Request, lanes: str, limit: int) -> str:
        name, prompt = request.request_id, request.prompt_ids
        sequences = make_choices(request, LANES[lanes], limit)
        # What `EngineLimits` checks before a request is let in.
        per_pool = max(Counter(pool for _, pool in LANES[lanes]).values())
        assert pages_for(len(prompt) + limit, PAGE_SIZE) * per_pool <= 2 * NUM_PAGES
        if pages_for(len(prompt) + limit, PAGE_SIZE) * per_pool > NUM_PAGES:
            for sequence in self.scheduler.find(name, None):
                self.scheduler.remove(sequence)
            return multiple()
        self.scheduler.add(*sequences)
        self.alive[name] = sequences
        return name

    @rule(
        target=coming,
        tenant=st.sampled_from(["", "x"]),
        priority=st.sampled_from([0, 0, 1]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        num_choices=st.sampled_from([1, 1, 2]),
        times=st.integers(0, 3),
    )
    def announce(
        self, tenant: str, priority: int, prompt: list[int], num_choices: int, times: int
    ) -> Request:
        request = self.make_request(tenant, priority, prompt, num_choices)
        sequence = make_choices(request, LANES["p"], 1)[0]
        sequence.is_prefill = True
        self.scheduler.prefill(sequence)
        self.announced[request.request_id] = sequence
        for _ in range(times):
            self.step(depth=1)
        return request

    @rule(
        target=living,
        request=consumes(coming),
        lanes=st.sampled_from(sorted(LANES)),
        is_same=st.sampled_from([True, True, True, False]),
        limit=st.integers(1, 10),
        times=st.integers(0, 2),
    )
    def arrive(self, request: Request, lanes: str, is_same: bool, limit: int, times: int) -> str:
        del self.announced[request.request_id]
        if not is_same:
            request = replace(request, prompt_ids=(*request.prompt_ids[:-1], 1 - request.prompt_ids[-1]))
        name = self.add(request, lanes, limit)
        for _ in range(times):
            self.step(depth=1)
        return name

    @rule(request=coming, model=st.sampled_from(["polite", "terse"]), times=st.integers(0, 2))
    def join(self, request: Request, model: str, times: int) -> None:
        prefill = self.announced[request.request_id]
        if prefill in self.scheduler.prefills and all(lane.model != model for lane in prefill.lanes):
            self.scheduler.widen(prefill, Lane(model, "a", is_expected=True))
        for _ in range(times):
            self.step(depth=1)

    @rule()
    def weights_come(self) -> None:
        for prefill in self.scheduler.prefills:
            for lane in prefill.lanes:
                lane.is_expected = False

    @rule(model=st.sampled_from(["polite", "terse"]))
    def renounce(self, model: str) -> None:
        self.scheduler.narrow({model})
        for pool in self.books.values():
            pool.drop({model})

    @rule(request=consumes(coming))
    def take_back(self, request: Request) -> None:
        announced = self.announced.pop(request.request_id)
        for sequence in self.scheduler.find(request.request_id, None):
            assert sequence is announced
            self.scheduler.remove(sequence)

    @rule(name=consumes(living), index=st.sampled_from([None, 0, 1]))
    def cancel(self, name: str, index: int | None) -> None:
        for sequence in self.scheduler.find(name, index):
            # What was read for its first choice goes with that.
            if not sequence.is_prefill:
                self.end(sequence)

    @rule(depth=st.integers(0, 1), times=st.integers(1, 5), is_patient=st.sampled_from([True, True, False]))
    def serve(self, depth: int, times: int, is_patient: bool) -> None:
        for _ in range(times):
            self.step(depth, is_patient=is_patient)

    @rule()
    def shrink(self) -> None:
        self.scheduler.shrink()

    def step(self, depth: int, *, is_patient: bool = True) -> bool:
        """Whether anything was planned, or came back."""
        had_work = bool(self.under_way)
        plan = self.scheduler.plan()
        self.check_plan(plan)
        if not is_patient and any(row.sequence.is_expecting for row in plan.rows):
            for row in plan.rows:
                self.scheduler.take_back(row)
            return True
        for row in plan.rows:
            self.compute(row)
            if row.draws and not row.keeps_end:
                row.sequence.end_logits.clear()
        if plan.rows:
            self.under_way.append(plan)
        while len(self.under_way) > (depth if plan.rows else 0):
            self.finish(self.under_way.popleft())
        return had_work or bool(plan.rows)

    def check_plan(self, plan: Plan) -> None:
        assert sum(row.num_tokens for row in plan.rows) <= MAX_STEP_TOKENS
        assert len({row.sequence for row in plan.rows}) == len(plan.rows) <= NUM_SLOTS
        lengths = [row.num_tokens > 1 for row in plan.rows]
        assert lengths == sorted(lengths)
        assert all(row.num_tokens > 0 or row.knows_end for row in plan.rows)
        if any(row.sequence.is_expecting for row in plan.rows):
            assert all(row.sequence.is_prefill for row in plan.rows), "nobody waits for weights of others"
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < NUM_SLOTS for slot in slots)

    def compute(self, row: ScheduledRow) -> None:
        """Write what a forward would, and read what its attention would."""
        sequence = row.sequence
        text = self.text_of(sequence, row.end)
        for lane, start in zip(row.lanes, row.lane_starts, strict=True):
            if row.draws and start == row.end:
                assert sequence.end_logits[lane.model] == text
            elif row.keeps_end:
                sequence.end_logits[lane.model] = text
            for position in range(start, row.end):
                page = lane.pages[position // PAGE_SIZE]
                assert self.books[lane.pool].num_holders(page) == 1, "two may write to one page"
                self.memory[self.cell(lane, position)] = self.content(sequence, lane, text, position)
            for position in range(row.end if start < row.end else 0):
                found = self.memory[self.cell(lane, position)]
                assert found == self.content(sequence, lane, text, position)

    def text_of(self, sequence: Sequence, length: int) -> tuple[int, ...]:
        """The sequence's first tokens, the one under way included."""
        text = list(sequence.token_ids)
        while len(text) < length:
            text.append(drawn_token(sequence, len(text)))
        return tuple(text[:length])

    def cell(self, lane: Lane, position: int) -> tuple[str, int, int]:
        return lane.pool, lane.pages[position // PAGE_SIZE], position % PAGE_SIZE

    def content(self, sequence: Sequence, lane: Lane, text: tuple[int, ...], position: int) -> object:
        return sequence.request.tenant, lane.model, text[: position + 1]

    def finish(self, plan: Plan) -> None:
        for row in plan.rows:
            if row.draws and row.is_current:
                sequence = row.sequence
                assert len(sequence.token_ids) == row.end
                self.scheduler.commit(row, drawn_token(sequence, row.end))
                if row.keeps_end:
                    continue
                # Some end at a stop token, of which nobody knew when the next step was planned.
                is_stopped = drawn_token(sequence, row.end) == 2 and sequence.num_drawn > 3
                if is_stopped or sequence.finish_reason_after(-1) is not None:
                    self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        choices = self.alive[sequence.request.request_id]
        choices.remove(sequence)
        if not choices:
            del self.alive[sequence.request.request_id]

    @invariant()
    def pages_are_conserved(self) -> None:
        for pool, book in self.books.items():
            held = Counter(
                page
                for sequence in self.scheduler.running
                for lane in sequence.lanes
                if lane.pool == pool
                for page in lane.pages
            )
            assert 0 not in held
            assert book.num_used == len(held)
            assert book.num_free + book.num_used == NUM_PAGES
            assert all(book.num_holders(page) == count for page, count in held.items())

    @invariant()
    def nobody_is_lost(self) -> None:
        known = {*self.scheduler.running, *self.scheduler.waiting}
        ahead = {sequence for sequence in known if sequence.is_prefill}
        waiting = {each.request.request_id for each in self.scheduler.waiting if not each.index}
        assert {each.request.request_id for each in ahead} <= {*self.announced, *waiting}
        known -= ahead
        assert known == {sequence for choices in self.alive.values() for sequence in choices}
        assert all(not lane.pages for s in self.scheduler.waiting for lane in s.lanes)

    def teardown(self) -> None:
        """Whatever happened, all that is left ends."""
        for name in self.announced:
            for sequence in self.scheduler.find(name, None):
                self.scheduler.remove(sequence)
        budget = 200 + 2000 * len(self.alive)
        while self.alive or self.under_way:
            assert self.step(depth=1) or not self.scheduler.has_work
            budget -= 1
            assert budget, "somebody waits for ever"
        assert not self.scheduler.has_work
        assert all(book.num_used == 0 for book in self.books.values())


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("seed", range(6))
def test_tenants_that_always_wait_get_the_same_within_the_stated_bound(seed: int) -> None:
    """One sends short prompts, one long ones, one many choices: tokens served differ by a constant."""
    random_ = random.Random(seed)
    num_slots, quantum, longest, limit = 4, 32, 60, 25
    scheduler = make_scheduler(num_pages=200, num_slots=num_slots, max_step_tokens=quantum)
    served: Counter[str] = Counter()
    sizes = {"short": (1, 4), "long": (40, longest), "many": (5, 9)}
    bound = 2 * quantum + longest + num_slots * limit
    number = 0
    for _ in range(1500):
        waiting = Counter(sequence.request.tenant for sequence in scheduler.waiting)
        for tenant, (least, most) in sizes.items():
            while waiting[tenant] <= num_slots:
                prompt = tuple(range(random_.randint(least, most)))
                choices = 3 if tenant == "many" else 1
                request = Request(str(number), prompt, SamplingParams(), num_choices=choices, tenant=tenant)
                scheduler.add(*make_choices(request, LANES["p"], random_.randint(1, limit), shares=False))
                number += 1
                waiting[tenant] += choices
        plan = scheduler.plan()
        for sequence in plan.started:
            if not sequence.has_started:
                served[sequence.request.tenant] += len(sequence.request.prompt_ids)
            sequence.has_started = True
        for row in plan.rows:
            if row.draws:
                served[row.sequence.request.tenant] += 1
                scheduler.commit(row, 7)
                if row.sequence.finish_reason_after(7):
                    scheduler.remove(row.sequence)
        assert max(served.values()) - min(served[tenant] for tenant in sizes) <= bound
    assert min(served.values()) > 10 * bound


def test_a_flood_does_not_delay_a_newcomer_by_more_than_a_turn() -> None:
    scheduler = make_scheduler(num_pages=2000, num_slots=1, max_step_tokens=32)

    def add(name: str, tenant: str) -> None:
        request = Request(name, tuple(range(20)), SamplingParams(), tenant=tenant)
        scheduler.add(*make_choices(request, LANES["p"], 4, shares=False))

    for number in range(200):
        add(f"flood-{number}", "flood")
    ended: list[str] = []
    has_come = False
    while "quiet" not in ended:
        plan = scheduler.plan()
        for row in plan.rows:
            if row.draws:
                scheduler.commit(row, 7)
                if row.sequence.finish_reason_after(7):
                    scheduler.remove(row.sequence)
                    ended.append(row.sequence.request.request_id)
        if len(ended) == 3 and not has_come:
            has_come = True
            add("quiet", "quiet")
    # Three had ended, one runs, and what is left of a quantum lasts for two more.
    assert len(ended) <= 3 + 1 + 2 + 1


def flooded_scheduler(num_slots: int, steps: int) -> Scheduler:
    """All slots are a flood's, and more of it waits."""
    scheduler = make_scheduler(num_pages=2000, num_slots=num_slots, max_step_tokens=32)
    for number in range(50):
        come(scheduler, f"flood-{number}", "flood", limit=100)
    for _ in range(steps):
        take_step(scheduler)
    return scheduler


def come(scheduler: Scheduler, name: str, tenant: str, limit: int) -> None:
    request = Request(name, tuple(range(8)), SamplingParams(), tenant=tenant)
    scheduler.add(*make_choices(request, LANES["p"], limit))


def take_step(scheduler: Scheduler) -> set[str]:
    """Who drew a token."""
    plan = scheduler.plan()
    for sequence in plan.started:
        sequence.has_started = True
    drawing = [row for row in plan.rows if row.draws]
    for row in drawing:
        scheduler.commit(row, 7)
        if row.sequence.finish_reason_after(7):
            scheduler.remove(row.sequence)
    return {row.sequence.request.request_id for row in drawing}


def test_a_quiet_tenant_draws_in_the_next_step_beside_a_flood() -> None:
    """However deep in credit the flood is; whoever gives way is the flood's youngest, and goes on later."""
    scheduler = flooded_scheduler(num_slots=4, steps=6)
    running = [sequence.request.request_id for sequence in scheduler.running]
    for number in range(1, 4):
        come(scheduler, "a", "a", limit=1)
        assert "a" in take_step(scheduler)
        assert [sequence.request.request_id for sequence in scheduler.running] == running[:3]
        assert scheduler.num_preemptions == number
        take_step(scheduler)
        assert [sequence.request.request_id for sequence in scheduler.running] == running


def test_a_tenant_with_something_running_takes_nobodys_place() -> None:
    scheduler = flooded_scheduler(num_slots=4, steps=6)
    for number in range(3):
        come(scheduler, f"a-{number}", "a", limit=30)
    for _ in range(6):
        take_step(scheduler)
    assert scheduler.num_preemptions == 1
    assert sum(sequence.request.tenant == "a" for sequence in scheduler.running) == 1


def test_a_debt_lasts_while_its_tenant_has_something_running() -> None:
    """Also where nothing of it waits for a while."""
    queue = FairQueue(quantum=8)
    for tenant in "ab":
        request = Request(tenant, (1,), num_choices=2, tenant=tenant)
        first, second = make_choices(request, LANES["p"], 9)
        queue.add(first)
        queue.add(second)
        queue.take(first)
        queue.charge(first, 100 if tenant == "a" else 0)
        queue.take(second)
    for tenant in "ba":
        queue.add(*make_choices(Request(tenant, (1,), tenant=tenant), LANES["p"], 9))
    head = queue.head()
    assert head is not None
    assert head.request.tenant == "b"


def test_nobody_gives_way_who_has_one_place_alone() -> None:
    scheduler = make_scheduler(num_pages=200, num_slots=2, max_step_tokens=32)
    for tenant in "abc":
        come(scheduler, tenant, tenant, limit=20)
    for _ in range(10):
        take_step(scheduler)
    assert scheduler.num_preemptions == 0
    assert len({sequence.request.tenant for sequence in scheduler.running}) == 2


def test_quiet_tenants_do_not_starve_a_flood() -> None:
    """As many as there are slots ask again as soon as they are answered: the flood still gets its part."""
    scheduler = flooded_scheduler(num_slots=3, steps=3)
    drawn: Counter[str] = Counter()
    number = 0
    for _ in range(900):
        living = Counter(sequence.request.tenant for sequence in (*scheduler.running, *scheduler.waiting))
        for tenant in "abcd":
            if not living[tenant]:
                number += 1
                come(scheduler, f"{tenant}{number}", tenant, limit=4)
        if living["flood"] < 10:
            number += 1
            come(scheduler, f"flood{number}", "flood", limit=100)
        for name in take_step(scheduler):
            drawn[name[:5] if name.startswith("flood") else name[0]] += 1
    equal_share = 900 * 3 / 5
    assert min(drawn.values()) > 0.8 * equal_share


def test_a_long_prompt_shares_the_step_with_another_tenants_short_one() -> None:
    scheduler = make_scheduler(num_pages=100, num_slots=4, max_step_tokens=40)
    for name, tenant, length in (("long", "a", 200), ("short", "b", 15)):
        request = Request(name, tuple(range(length)), SamplingParams(), tenant=tenant)
        scheduler.add(*make_choices(request, LANES["p"], 4))
    rows = {row.sequence.request.request_id: row for row in scheduler.plan().rows}
    assert rows["short"].draws
    assert (rows["long"].num_tokens, rows["short"].num_tokens) == (25, 15)


def test_a_better_priority_takes_the_place_of_a_worse_one() -> None:
    scheduler = make_scheduler(num_pages=100, num_slots=1, max_step_tokens=8)
    first = make_choices(Request("low", (1, 2), SamplingParams(), priority=1), LANES["p"], 9)
    scheduler.add(*first)
    scheduler.plan()
    scheduler.add(*make_choices(Request("same", (1, 2), SamplingParams(), priority=1), LANES["p"], 9))
    scheduler.add(*make_choices(Request("high", (1, 2), SamplingParams()), LANES["p"], 9))
    plan = scheduler.plan()
    assert [row.sequence.request.request_id for row in plan.rows] == ["high"]
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["low", "same"]
    assert scheduler.num_preemptions == 1
