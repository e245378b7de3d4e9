"""When the database goes away: callers are told to wait, nothing is lost, and everything goes on by itself once it is back."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

import pytest

from crucible import contracts as c
from crucible import metrics
from crucible.evaluation import State
from crucible.events import Event, EventType
from crucible.problems import ProblemError
from crucible.resilience import CallFailedError
from crucible.storage.reading import make_cursor
from tests.support.postgres import SharedServer, shared_server
from tests.support.storage import Bench, new_evaluation, running_storage, storage_over
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = pytest.mark.integration
T = TypeVar("T")


@pytest.fixture
async def server() -> AsyncIterator[SharedServer]:
    server = shared_server()
    yield server
    await server.start_if_stopped()


@pytest.fixture
async def bench(server: SharedServer) -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench
        await server.start_if_stopped()


async def heard_all(heard: list[Event], evaluation_ids: list[str], count: int) -> None:
    def complete() -> bool:
        told = Counter(event.evaluation_id for event in heard if event.type is not EventType.OUTPUT)
        return all(told[evaluation_id] >= count for evaluation_id in evaluation_ids)

    await wait_until_async(complete, timeout=15, describe="every event to be told")


# -- the relay


async def test_the_bus_hears_every_event_in_order_soon_after_its_commit(bench: Bench) -> None:
    records = [await bench.submit() for _ in range(10)]
    for _ in records:
        claim = await bench.claim_one()
        await bench.start(claim.evaluation_id)
        await bench.finish(claim.evaluation_id)
    await heard_all(bench.heard, [record.id for record in records], 5)
    for record in records:
        assert [event for event in bench.heard if event.evaluation_id == record.id] == await bench.events(record.id)
    assert await bench.sql("SELECT 1 FROM outbox") == []


async def test_events_of_many_writers_at_once_are_told_in_order_per_evaluation(bench: Bench) -> None:
    items = [new_evaluation() for _ in range(60)]
    await bench.submit_many(items)

    async def work() -> None:
        for claim in await bench.claim(6):
            await bench.start(claim.evaluation_id)
            await bench.finish(claim.evaluation_id)

    await asyncio.gather(*(work() for _ in range(12)))
    await heard_all(bench.heard, [item.id for item in items], 5)
    for item in items:
        assert [event.seq for event in bench.heard if event.evaluation_id == item.id] == [1, 2, 3, 4, 5]


async def test_what_was_not_told_before_a_stop_is_told_after_the_next_start(bench: Bench) -> None:
    record = await bench.submit()
    await bench.storage.aclose()
    await bench.sql(
        "INSERT INTO outbox (event_id, evaluation_id, seq) SELECT id, evaluation_id, seq FROM events ON CONFLICT DO NOTHING"
    )
    async with storage_over(bench.url, bench.data_dir, instance="2") as other:
        await heard_all(other.heard, [record.id], 2)


async def test_of_two_instances_one_relays_and_the_other_takes_over(bench: Bench) -> None:
    async with storage_over(bench.url, bench.data_dir, instance="2") as other:
        record = await other.submit()
        await heard_all(bench.heard, [record.id], 2)
        assert other.heard == []
        await bench.storage.aclose()
        later = await other.submit()
        await heard_all(other.heard, [later.id], 2)


async def test_the_outbox_lag_is_a_metric(bench: Bench) -> None:
    await bench.submit()

    async def empty() -> bool:
        return await bench.sql("SELECT 1 FROM outbox") == []

    await wait_until_async(empty, timeout=5, describe="the outbox to be empty")
    await wait_until_async(
        lambda: metrics.REGISTRY.get_sample_value("storage_outbox_oldest_seconds") == 0, timeout=5, describe="no lag"
    )
    told = metrics.REGISTRY.get_sample_value("event_published_total", {"type": "submitted"})
    assert told is not None
    assert told >= 1


# -- the database away


async def test_every_call_is_told_to_wait_while_the_database_is_away(bench: Bench, server: SharedServer) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await server.stop()
    storage = bench.storage
    held = [c.Held(evaluation_id=record.id, attempt=1)]
    calls = {
        "create": storage.submissions.create(c.NewEvaluations(items=[new_evaluation()])),
        "create with quota": storage.submissions.create(c.NewEvaluations(items=[new_evaluation()], max_active=5)),
        "get": storage.reading.get(record.id),
        "page": storage.reading.page(),
        "statistics": storage.reading.statistics(owner=None, since=None),
        "event_stream": storage.reading.event_stream(owner=None, cursor=make_cursor(1, 1), limit=5),
        "claim": storage.queue.claim(c.ClaimRequest(worker="w", wanted={"small": 1})),
        "renew": storage.queue.renew(c.LeaseRenewal(worker="w", held=held)),
        "cancel": storage.attempts.cancel(record.id, c.CancelRequest(actor="ada")),
        "append": storage.outputs.append(record.id, attempt=1, frame=0, body=b""),
        "find_key": storage.keys.find("abcdefgh", "x"),
        "usage": storage.upkeep.usage(),
    }
    for name, call in calls.items():
        with pytest.raises(ProblemError) as caught:
            await call
        assert (name, caught.value.kind.slug) == (name, "unavailable")
        assert caught.value.retry_after
    answer = await bench.client._http.get(f"/internal/evaluations/{record.id}")
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    with pytest.raises(ProblemError):
        async with storage_over(bench.url, bench.data_dir, instance="2"):
            pass


async def test_health_tells_of_the_database_from_memory(bench: Bench, server: SharedServer) -> None:
    ready = await bench.client._http.get("/readyz")
    assert (ready.status_code, ready.json()["problems"]) == (200, {})
    await server.stop()

    async def unready() -> bool:
        return (await bench.client._http.get("/readyz")).status_code == 503

    await wait_until_async(unready, timeout=10, describe="readiness to tell that the database is away")
    for path, status in (("/healthz", 200), ("/readyz", 503), ("/health", 200), ("/metrics", 200)):
        # From memory: whoever asked the database would wait for a time-out of many seconds here.
        async with asyncio.timeout(2):
            assert (await bench.client._http.get(path)).status_code == status
    assert "no answer" in (await bench.client._http.get("/health")).json()["checks"]["database"]
    await server.start()

    async def ready_again() -> bool:
        return (await bench.client._http.get("/readyz")).status_code == 200

    await wait_until_async(ready_again, timeout=10, describe="readiness to return by itself")


class Traffic:
    """Submitters and workers that repeat what failed, as the services do."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.accepted: list[str] = []
        self.done: dict[str, State] = {}
        self.submitting = True
        self.submitters = 0

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except CallFailedError as error:
                if error.status not in (503, None):
                    raise
                await pass_time(0.05)

    async def submit(self) -> None:
        self.submitters += 1
        while self.submitting:
            request = c.NewEvaluations(items=[new_evaluation()], max_active=10_000)
            await self.insist(lambda request=request: self.bench.client.create(request))
            self.accepted.append(request.items[0].id)
            await pass_time(0.01)
        self.submitters -= 1

    def unfinished(self) -> bool:
        # A submitter may still be insisting when it is told to stop.
        return self.submitting or self.submitters > 0 or len(self.done) < len(self.accepted)

    async def work(self, name: str) -> None:
        while self.unfinished():
            try:
                claims = await self.bench.claim(2, worker=name, wait=0.5)
            except CallFailedError:
                # Not repeated as it is: what it claimed, if anything, comes back when the lease ends.
                await pass_time(0.05)
                continue
            for claim in claims:
                await self.run(claim.evaluation_id, claim.attempt)

    async def run(self, told: str, attempt: int) -> None:
        await self.insist(lambda: self.bench.start(told, attempt))
        final = await self.insist(lambda: self.bench.finish(told, attempt=attempt))
        assert told not in self.done
        self.done[told] = final.state


async def test_work_goes_on_through_restarts_of_the_database_with_nothing_lost(server: SharedServer) -> None:
    async with running_storage(lease_seconds=3) as bench:
        traffic = Traffic(bench)

        async def restart() -> None:
            for _ in range(2):
                await pass_time(0.7)
                await server.stop()
                await pass_time(0.3)
                await server.start()
            await pass_time(0.7)
            traffic.submitting = False

        async with asyncio.timeout(60):
            await asyncio.gather(traffic.submit(), traffic.submit(), traffic.work("w1"), traffic.work("w2"), restart())
        assert len(traffic.accepted) > 20
        assert traffic.done == dict.fromkeys(traffic.accepted, State.COMPLETED)
        await heard_all(bench.heard, traffic.accepted, 5)
        for evaluation_id in traffic.accepted:
            events = await bench.events(evaluation_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert [event.state for event in events].count(State.COMPLETED) == 1
            told = [event.seq for event in bench.heard if event.evaluation_id == evaluation_id]
            # At least once, and never an event before its predecessor.
            assert list(dict.fromkeys(told)) == [event.seq for event in events]


async def test_workers_get_time_to_renew_after_an_outage(server: SharedServer) -> None:
    async with running_storage(lease_seconds=1.5) as bench:
        record = await bench.submit()
        await bench.claim_one()
        await server.stop()
        await pass_time(2)
        await server.start()
        held = [c.Held(evaluation_id=record.id, attempt=1)]

        async def renewed() -> bool:
            return await bench.client.renew(c.LeaseRenewal(worker="worker-1", held=held)) == c.LeaseAnswer()

        await wait_until_async(renewed, timeout=5, describe="a renewal", tolerate=(CallFailedError,))
        await pass_time(0.5)
        assert (await bench.client.get(record.id)).attempt == 1
        assert (await bench.client.get(record.id)).state is State.PROVISIONING
