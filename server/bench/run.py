"""Runs a load: first the warm-up, then the measured requests, in an open or a closed loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from ram_core.errors import RamError
from server.bench.client import Client, Target
from server.bench.load import Load, PlannedRequest, RequestSource, arrival_times
from server.bench.record import Record

OnRecord = Callable[[Record], None]


@dataclass(frozen=True)
class Run:
    """What was seen: the measured requests in the order of their numbers, and what the client itself used."""

    records: tuple[Record, ...]
    began_at: float
    """Unix time of the first measured request."""
    wall_s: float
    """From there to the end of the last one."""
    cpu_s: float
    """CPU time of this process meanwhile, in all its threads."""


async def run_load(target: Target, load: Load, on_record: OnRecord = lambda _record: None) -> Run:
    """Send the load; raises `RamError` where the load is impossible or no request of the warm-up succeeds."""
    source = RequestSource(load)
    # With a duration alone a closed loop cannot know how many it will send, and makes them as it goes.
    times = arrival_times(load) if load.rate_per_s is not None else []
    num_known = len(times) if load.rate_per_s is not None else load.num_requests or 0
    known = [source.request(index) for index in range(num_known)]
    async with target.open_session(load.concurrency or 0) as session:
        await _warm_up(Client(target, session, time.perf_counter()), source, load)
        # A collection amid the run would delay the time stamps of all streams.
        gc.collect()
        gc.freeze()
        began_at, began_cpu_s = time.time(), time.process_time()
        client = Client(target, session, time.perf_counter())
        if load.rate_per_s is not None:
            records = await _open_loop(client, known, times, load.concurrency, on_record)
        else:
            requests = iter(known) if load.num_requests else map(source.request, itertools.count())
            records = await _closed_loop(client, requests, load, on_record)
        cpu_s = time.process_time() - began_cpu_s
        gc.unfreeze()
    records.sort(key=lambda record: record.index)
    wall_s = max((record.ended_s for record in records), default=0.0)
    return Run(tuple(records), began_at, wall_s, cpu_s)


async def _warm_up(client: Client, source: RequestSource, load: Load) -> None:
    """Send other requests than the measured ones, as many at once as will be later; nobody counts them."""
    requests = iter([source.request(index, "warmup") for index in range(load.num_warmup)])
    num_streams = min(load.concurrency or load.num_warmup, load.num_warmup)
    records = await _stream_through(client, requests, num_streams, lambda _record: None)
    if records and not any(record.is_ok for record in records):
        failure = records[0].failure
        assert failure is not None
        raise RamError(f"No request of the warm-up succeeded: {failure.label}: {failure.message}")


async def _closed_loop(
    client: Client, requests: Iterator[PlannedRequest], load: Load, on_record: OnRecord
) -> list[Record]:
    """So many streams, each of which sends its next request when the last one has ended."""
    assert load.concurrency is not None
    duration_s = load.duration_s
    in_time = (
        requests
        if duration_s is None
        else itertools.takewhile(lambda _request: client.now_s() < duration_s, requests)
    )
    return await _stream_through(client, in_time, load.concurrency, on_record)


async def _stream_through(
    client: Client, requests: Iterator[PlannedRequest], num_streams: int, on_record: OnRecord
) -> list[Record]:
    records: list[Record] = []

    async def stream() -> None:
        for request in requests:
            records.append(await client.send(request))
            on_record(records[-1])

    await asyncio.gather(*(stream() for _ in range(num_streams)))
    return records


async def _open_loop(
    client: Client,
    requests: list[PlannedRequest],
    times: list[float],
    max_concurrency: int | None,
    on_record: OnRecord,
) -> list[Record]:
    """Requests leave when it is time, each in its own task; a cap makes them wait, which is their lag."""
    records: list[Record] = []
    room = asyncio.Semaphore(max_concurrency or len(requests) or 1)

    async def send(sending: Awaitable[Record]) -> None:
        try:
            records.append(await sending)
            on_record(records[-1])
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for request, planned_s in zip(requests, times, strict=True):
            await asyncio.sleep(planned_s - client.now_s())
            await room.acquire()
            group.create_task(send(client.send(request, planned_s)))
    return records
