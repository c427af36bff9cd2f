"""The scheduler's promises, in plain Python: no models, no tensors."""

from __future__ import annotations

import random

import pytest

from ram_core.engine.messages import Request
from ram_core.engine.pages import PageBook
from ram_core.engine.scheduler import Plan, Scheduler
from ram_core.engine.sequence import Lane, Sequence
from ram_core.params import SamplingParams

PAGE_SIZE = 4


def make_scheduler(
    *,
    num_pages: int = 20,
    num_slots: int = 4,
    max_step_tokens: int = 16,
    max_chunk_tokens: int = 1000,
    pools: tuple[str, ...] = ("p",),
) -> Scheduler:
    return Scheduler(
        {name: PageBook(num_pages + 1) for name in pools},
        page_size=PAGE_SIZE,
        num_slots=num_slots,
        max_step_tokens=max_step_tokens,
        max_chunk_tokens=max_chunk_tokens,
    )


def make_sequence(
    name: str, prompt: int, *, pools: tuple[str, ...] = ("p",), limit: int = 1000, tenant: str = ""
) -> Sequence:
    request = Request(name, tuple(range(prompt)), SamplingParams(), tenant=tenant)
    return Sequence(
        request=request,
        index=0,
        seed=0,
        lanes=[Lane(pool, pool) for pool in pools],
        stop_ids=frozenset(),
        max_tokens=limit,
        arrived_s=0.0,
        token_ids=list(request.prompt_ids),
    )


def step(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    for row in plan.rows:
        if row.draws:
            scheduler.commit(row, 7)
    return plan


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(r.sequence.request.request_id, r.start, r.num_tokens, r.draws) for r in plan.rows]


def test_a_long_prompt_is_read_in_chunks_and_draws_with_its_last() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence("a", 20))
    assert shape(step(scheduler)) == [("a", 0, 8, False)]
    assert shape(step(scheduler)) == [("a", 8, 8, False)]
    assert shape(step(scheduler)) == [("a", 16, 4, True)]
    assert shape(step(scheduler)) == [("a", 20, 1, True)]


def test_writing_goes_on_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence("short", 2))
    step(scheduler)
    scheduler.add(make_sequence("long", 20))
    assert shape(step(scheduler)) == [("short", 2, 1, True), ("long", 0, 7, False)]
    assert shape(step(scheduler)) == [("short", 3, 1, True), ("long", 7, 7, False)]


def test_a_chunk_is_short_beside_writing_and_fills_the_step_alone() -> None:
    scheduler = make_scheduler(max_step_tokens=12, max_chunk_tokens=5)
    scheduler.add(make_sequence("long", 30))
    assert shape(step(scheduler)) == [("long", 0, 12, False)]
    scheduler.add(make_sequence("short", 2))
    assert shape(step(scheduler)) == [("long", 12, 12, False)]
    assert shape(step(scheduler)) == [("long", 24, 6, True), ("short", 0, 2, True)]
    scheduler.add(make_sequence("next", 12))
    assert shape(step(scheduler))[2:] == [("next", 0, 5, False)]
    assert shape(step(scheduler))[2:] == [("next", 5, 5, False)]


def test_a_chunk_is_longer_where_many_could_read_beside_few_that_write() -> None:
    scheduler = make_scheduler(num_slots=7, max_step_tokens=40, max_chunk_tokens=5)
    for name in "ab":
        scheduler.add(make_sequence(name, 2))
    step(scheduler)
    for name in "cdefgh":
        scheduler.add(make_sequence(name, 30))
    # Five slots are free for them, so there are no more than five chunks; the sixth counts for nothing.
    assert [row.num_tokens for row in step(scheduler).rows] == [1, 1, 25]


@pytest.mark.parametrize(("num_writing", "num_tokens"), [(4, 10), (7, 5), (12, 5)])
def test_a_reader_counts_as_four_that_write(num_writing: int, num_tokens: int) -> None:
    """Two of them beside four are no more than two chunks, and one chunk is the least."""
    scheduler = make_scheduler(num_slots=num_writing + 2, max_step_tokens=40, max_chunk_tokens=5)
    for number in range(num_writing):
        scheduler.add(make_sequence(f"writes {number}", 2))
    step(scheduler)
    for name in "ab":
        scheduler.add(make_sequence(name, 30))
    assert [row.num_tokens for row in step(scheduler).rows if row.num_tokens > 1] == [num_tokens]


def test_a_tenant_that_writes_nothing_has_a_short_prompt_read_at_once() -> None:
    scheduler = make_scheduler(num_slots=6, max_step_tokens=40, max_chunk_tokens=5)
    for name in "abc":
        scheduler.add(make_sequence(name, 2, tenant="loud"))
    step(scheduler)
    scheduler.add(make_sequence("quiet", 10, tenant="quiet"))
    scheduler.add(make_sequence("other", 10, tenant="other"))
    # Two chunks for one of them, then one chunk as ever, then the next.
    assert shape(step(scheduler))[3:] == [("quiet", 0, 10, True)]
    assert shape(step(scheduler))[4:] == [("other", 0, 5, False)]
    assert shape(step(scheduler))[4:] == [("other", 5, 5, True)]


def test_a_stranger_with_a_long_prompt_shares_until_little_is_left() -> None:
    scheduler = make_scheduler(num_slots=4, max_step_tokens=40, max_chunk_tokens=5)
    for name in "ab":
        scheduler.add(make_sequence(name, 2, tenant="loud"))
    step(scheduler)
    scheduler.add(make_sequence("quiet", 17, tenant="quiet"))
    assert [shape(step(scheduler))[2][1:3] for _ in range(3)] == [(0, 5), (5, 5), (10, 7)]


def test_rows_of_one_token_come_first() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_sequence("long", 9))
    scheduler.add(make_sequence("one", 1))
    step(scheduler)
    plan = step(scheduler)
    assert [row.num_tokens for row in plan.rows] == sorted(row.num_tokens for row in plan.rows)


def test_a_full_batch_of_writers_leaves_a_prompt_at_least_one_token() -> None:
    scheduler = make_scheduler(num_slots=4, max_step_tokens=1)
    for name in "abc":
        scheduler.add(make_sequence(name, 1))
    scheduler.add(make_sequence("long", 20))
    step(scheduler)
    assert shape(step(scheduler))[-1] == ("long", 2, 2, False)


def test_nobody_is_admitted_to_a_step_that_has_no_token_left() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence("long", 8))
    scheduler.add(make_sequence("next", 2))
    plan = step(scheduler)
    assert shape(plan) == [("long", 0, 8, True)]
    assert [s.request.request_id for s in plan.started] == ["long"]
    assert shape(step(scheduler)) == [("long", 8, 1, True), ("next", 0, 2, True)]


def test_nobody_is_admitted_while_running_prompts_want_all_that_writers_leave() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    for name in "ab":
        scheduler.add(make_sequence(name, 1))
    step(scheduler)
    scheduler.add(make_sequence("long", 13))
    step(scheduler)
    scheduler.add(make_sequence("next", 2))
    assert not step(scheduler).started
    assert [s.request.request_id for s in step(scheduler).started] == ["next"]


def test_the_waiting_are_found_too_and_each_choice_by_its_index() -> None:
    scheduler = make_scheduler(num_slots=1)
    choices = [make_sequence("a", 2) for _ in range(3)]
    for index, sequence in enumerate(choices):
        sequence.index = index
        scheduler.add(sequence)
    scheduler.add(make_sequence("b", 2))
    step(scheduler)
    assert scheduler.find("a", None) == choices
    assert scheduler.find("a", 1) == [choices[1]]
    scheduler.remove(choices[1])
    assert [s.request.request_id for s in scheduler.waiting] == ["a", "b"]


def test_more_sequences_than_slots_wait_in_order() -> None:
    scheduler = make_scheduler(num_slots=2)
    for name in "abc":
        scheduler.add(make_sequence(name, 2))
    plan = step(scheduler)
    assert [s.request.request_id for s in plan.started] == ["a", "b"]
    scheduler.remove(scheduler.find("a", None)[0])
    assert [s.request.request_id for s in step(scheduler).started] == ["c"]


def test_a_prompt_waits_until_its_pages_are_free() -> None:
    scheduler = make_scheduler(num_pages=5)
    scheduler.add(make_sequence("a", 12))
    scheduler.add(make_sequence("b", 8))
    assert [s.request.request_id for s in step(scheduler).started] == ["a"]
    scheduler.remove(scheduler.find("a", None)[0])
    assert [s.request.request_id for s in step(scheduler).started] == ["b"]


def test_two_lanes_of_one_pool_need_twice_the_pages() -> None:
    scheduler = make_scheduler(num_pages=5)
    scheduler.add(make_sequence("a", 8, pools=("p", "p")))
    assert not step(scheduler).rows


def test_the_youngest_gives_way_and_is_recomputed() -> None:
    scheduler = make_scheduler(num_pages=4)
    old, young = make_sequence("old", 6), make_sequence("young", 6)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    scheduler.add(make_sequence("younger still", 6))
    while young.slot >= 0 or not young.num_computed:
        step(scheduler)
        if young.num_drawn and young.slot < 0:
            break
    assert old.slot >= 0
    assert not young.lanes[0].pages
    assert scheduler.waiting[0] is young
    drawn = young.num_drawn
    scheduler.remove(old)
    plan = step(scheduler)
    assert shape(plan) == [("young", 0, 6 + drawn, True)]


@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_ends_and_conserves_pages_and_slots(seed: int) -> None:
    """Random arrivals, cancellations and lengths: no page has two owners, and every sequence ends."""
    random_ = random.Random(seed)
    pools = ("p", "a")
    scheduler = make_scheduler(num_pages=12, num_slots=3, max_step_tokens=7, pools=pools)
    live: dict[str, Sequence] = {}
    for number in range(60):
        lanes = random_.choice([("p",), ("p", "a"), ("p", "a", "a")])
        most = 12 * PAGE_SIZE // max(1, len(lanes) - 1)
        prompt = random_.randint(1, most - 2)
        sequence = make_sequence(
            str(number), prompt, pools=lanes, limit=random_.randint(1, most - prompt - 1)
        )
        scheduler.add(sequence)
        live[str(number)] = sequence
        for _ in range(random_.randint(0, 12)):
            advance(scheduler, live)
        if live and random_.random() < 0.2:
            name = random_.choice(sorted(live))
            scheduler.remove(live.pop(name))
    steps = 0
    while live:
        advance(scheduler, live)
        steps += 1
        assert steps < 20_000
    assert all(book.num_used == 0 for book in scheduler.books.values())
    assert not scheduler.has_work


def advance(scheduler: Scheduler, live: dict[str, Sequence]) -> None:
    plan = step(scheduler)
    assert bool(plan.rows) == bool(live)
    assert sum(row.num_tokens for row in plan.rows) <= 7
    assert all(row.num_tokens > 0 for row in plan.rows)
    owners: set[tuple[str, int]] = set()
    for sequence in live.values():
        for lane in sequence.lanes:
            pages = {(lane.pool, page) for page in lane.pages}
            assert len(pages) == len(lane.pages)
            assert not pages & owners
            owners |= pages
    for row in plan.rows:
        sequence = row.sequence
        for lane in sequence.lanes:
            assert len(lane.pages) * PAGE_SIZE >= row.start + row.num_tokens
        if row.draws and sequence.finish_reason_after(7) is not None:
            scheduler.remove(sequence)
            del live[sequence.request.request_id]


def early(name: str, prompt: int) -> Sequence:
    sequence = make_sequence(name, prompt)
    sequence.is_prefill = True
    return sequence


def test_a_prompt_whose_request_is_to_come_gets_what_others_leave_and_a_chunk_at_most() -> None:
    scheduler = make_scheduler(max_step_tokens=16, max_chunk_tokens=6)
    scheduler.prefill(early("early", 20))
    assert shape(step(scheduler)) == [("early", 0, 6, False)]
    scheduler.add(make_sequence("a", 11))
    assert shape(step(scheduler)) == [("early", 6, 5, False), ("a", 0, 11, True)]
    assert shape(step(scheduler)) == [("a", 11, 1, True), ("early", 11, 6, False)]
    assert shape(step(scheduler)) == [("a", 12, 1, True), ("early", 17, 3, True)]
    assert shape(step(scheduler)) == [("a", 13, 1, True)]


def test_nobody_waits_for_a_prompt_whose_request_is_to_come() -> None:
    scheduler = make_scheduler(num_pages=60, max_step_tokens=16, max_chunk_tokens=6)
    scheduler.prefill(early("early", 100))
    step(scheduler)
    scheduler.add(make_sequence("a", 5))
    assert ("a", 0, 5, True) in shape(step(scheduler))
