"""Hints on a real RabbitMQ: what waits is told in strict order, told again when it must be, and found again when the broker loses it."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from crucible import contracts as c
from crucible import metrics
from crucible.broker.publisher import Publisher
from crucible.broker.topology import DEAD_EXCHANGE
from crucible.broker.urls import BrokerUrl
from crucible.evaluation import Reason, State
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings
from crucible.storage.hints import Brokers
from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.hint_worker import HintWorker, hint_worker
from tests.support.storage import Bench, new_evaluation, storage_over
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster

pytestmark = [pytest.mark.integration, needs("rabbitmq")]

SMALL, MEDIUM, LARGE = SizeClass
PERIOD = 0.25
SETTINGS = BrokerSettings(reconcile_seconds=PERIOD)


@pytest.fixture
def url(rabbitmq: RabbitCluster, rabbit_vhost: str) -> BrokerUrl:
    return BrokerUrl.parse(rabbitmq.url(vhost=rabbit_vhost))


@pytest.fixture
def queues(url: BrokerUrl) -> BrokerUrl:
    return declare(url, SETTINGS)


def repaired(why: str) -> float:
    return metrics.REGISTRY.get_sample_value("hints_repaired_total", {"why": why}) or 0.0


@pytest.fixture
async def bench(queues: BrokerUrl, database: str, folder: Path) -> AsyncIterator[Bench]:
    async with storage_over(database, folder, brokers=Brokers(queues, None, SETTINGS)) as bench:
        yield bench


@pytest.fixture
async def worker(bench: Bench, queues: BrokerUrl) -> AsyncIterator[HintWorker]:
    async with hint_worker(queues, SETTINGS, bench.client) as worker:
        yield worker


async def untold(bench: Bench) -> int:
    return (await bench.client.broker()).untold


async def all_told(bench: Bench) -> None:
    async def none_left() -> bool:
        return await untold(bench) == 0

    await wait_until_async(none_left, timeout=20, describe="every waiting evaluation to be told of")


async def next_message(worker: HintWorker, size: SizeClass = SMALL) -> str:
    taken = await wait_until_async(lambda: worker.take(size), timeout=10, describe="a message")
    assert taken is not None
    await worker.ack(taken)
    return taken.evaluation_id


async def messages(worker: HintWorker, size: SizeClass = SMALL) -> list[str]:
    """Claim what all messages of a queue name, in their order."""
    found = []
    while (taken := await worker.take(size)) is not None:
        found.append(taken.evaluation_id)
        await worker.claim(taken)
        await worker.ack(taken)
    return found


# -- publishing


async def test_what_waits_is_told_in_strict_order_to_the_queue_of_its_class(bench: Bench, worker: HintWorker) -> None:
    order = [priority for priority in range(11) for _ in range(20)]
    random.Random(4).shuffle(order)
    items = [new_evaluation(f"print({n})", priority=priority) for n, priority in enumerate(order)]
    large = new_evaluation(memory_limit="2Gi", priority=3)
    await bench.submit_many([*items, large])
    await all_told(bench)
    expected = [item.id for _, item in sorted(enumerate(items), key=lambda pair: (-pair[1].spec.priority, pair[0]))]
    assert await messages(worker) == expected
    assert await messages(worker, MEDIUM) == []
    assert await messages(worker, LARGE) == [large.id]


async def test_a_message_names_the_evaluation_and_its_priority_and_carries_the_trace(
    bench: Bench, worker: HintWorker
) -> None:
    item = new_evaluation(priority=7)
    item = item.model_copy(update={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    await bench.submit_many([item])
    taken = await wait_until_async(worker.take, timeout=10, describe="a message")
    assert taken is not None
    assert (taken.evaluation_id, taken.priority, taken.traceparent) == (item.id, 7, item.traceparent)
    answer = await worker.claim(taken)
    assert answer.claim is not None
    assert (answer.claim.evaluation_id, answer.claim.attempt) == (item.id, 1)


async def test_what_comes_back_to_the_queue_is_told_again(bench: Bench, worker: HintWorker) -> None:
    record = await bench.submit()
    for attempt in (1, 2, 3):
        taken = await wait_until_async(worker.take, timeout=10, describe=f"message {attempt}")
        assert taken is not None
        assert (await worker.claim(taken)).claim is not None
        await worker.ack(taken)
        if attempt == 1:
            release = c.Release(worker=worker.name, attempt=1, detail="drain")
            await bench.client.release(record.id, release)
        else:
            await bench.finish(record.id, Reason.NODE_LOST, attempt=attempt)
    assert await next_message(worker) == record.id


async def test_a_lost_attempt_is_not_told_before_its_rest_is_over(
    queues: BrokerUrl, database: str, folder: Path
) -> None:
    brokers = Brokers(queues, None, SETTINGS)
    async with (
        storage_over(database, folder, brokers=brokers, retry_seconds=1.0) as bench,
        hint_worker(queues, SETTINGS, bench.client) as worker,
    ):
        record = await bench.submit()
        assert await next_message(worker) == record.id
        await bench.client.claim_one(record.id, c.ClaimOne(worker="w", key="k"))
        lost = await bench.finish(record.id, Reason.NODE_LOST)
        assert lost.retry_at is not None
        await next_message(worker)
        (row,) = await bench.sql("SELECT hinted_at >= retry_at AS rested FROM evaluations")
        assert row["rested"]


async def test_what_ended_while_it_waited_leaves_a_void_message(bench: Bench, worker: HintWorker) -> None:
    record = await bench.submit()
    taken = await wait_until_async(worker.take, timeout=10, describe="a message")
    assert taken is not None
    await bench.client.cancel(record.id, c.CancelRequest(actor="ada"))
    assert await worker.claim(taken) == c.ClaimAnswer(state=State.CANCELLED)


async def test_one_instance_publishes_at_a_time_and_another_takes_over(
    queues: BrokerUrl, database: str, folder: Path
) -> None:
    brokers = Brokers(queues, None, SETTINGS)
    async with storage_over(database, folder, brokers=brokers, instance="b") as second:
        async with storage_over(database, folder, brokers=brokers, instance="a") as first:
            await first.submit_many([new_evaluation() for _ in range(50)])
            await second.submit_many([new_evaluation() for _ in range(50)])
            await all_told(first)
            async with hint_worker(queues, SETTINGS, first.client) as worker:
                assert len(await messages(worker)) == 100
        record = await second.submit()
        async with hint_worker(queues, SETTINGS, second.client) as worker:
            assert await next_message(worker) == record.id


async def test_a_full_queue_keeps_what_it_cannot_take_in_the_table_and_no_other_class_waits_for_it(
    url: BrokerUrl, database: str, folder: Path
) -> None:
    declare(url, BrokerSettings(queue_length_max=20))
    async with storage_over(database, folder, brokers=Brokers(url, None, SETTINGS)) as bench:
        many = [new_evaluation(priority=n % 10) for n in range(700)]
        await bench.submit_many(many)
        large = await bench.submit(memory_limit="2Gi", priority=0)
        async with hint_worker(url, SETTINGS, bench.client) as worker:
            assert await next_message(worker, LARGE) == large.id
            urgent = await bench.submit(priority=10)
            # Room comes free: the highest priority takes it, ahead of hundreds that have waited longer to be told of.
            while urgent.id not in worker.ran:
                assert await wait_until_async(worker.work_one, timeout=20, describe="the next message")
            assert await untold(bench) > 200


# -- aging


async def test_a_raised_priority_is_a_second_message_and_the_first_finds_nothing(
    bench: Bench, worker: HintWorker
) -> None:
    aged = await bench.submit(priority=2)
    await all_told(bench)
    others = [(await bench.submit(priority=5)).id for _ in range(3)]
    await all_told(bench)
    await bench.sql("UPDATE evaluations SET queued_at = queued_at - interval '5 hours' WHERE id = $1", aged.id)
    await bench.storage.upkeep.age()
    await all_told(bench)
    first = await wait_until_async(worker.take, timeout=10, describe="a message")
    assert first is not None
    assert (first.evaluation_id, first.priority) == (aged.id, 10)
    assert (await worker.claim(first)).claim is not None
    await worker.ack(first)
    rest = [taken for _ in range(4) if (taken := await worker.take()) is not None]
    assert [taken.evaluation_id for taken in rest] == [*others, aged.id]
    assert (await worker.claim(rest[-1])).claim is None


async def test_nobody_waits_behind_a_stream_of_the_highest_priority_for_longer_than_the_bound(
    queues: BrokerUrl, database: str, folder: Path
) -> None:
    """(10 - p) * aging_seconds and one look of the aging pass; the stream never ends and takes every slot."""
    aging = 0.3
    async with (
        storage_over(database, folder, brokers=Brokers(queues, None, SETTINGS), aging_seconds=aging) as bench,
        hint_worker(queues, SETTINGS, bench.client) as worker,
    ):
        await bench.submit_many([new_evaluation(priority=10) for _ in range(30)])
        await all_told(bench)
        low = await bench.submit(priority=4)
        began = asyncio.get_running_loop().time()
        highest: float | None = None
        while low.id not in worker.ran:
            await bench.submit_many([new_evaluation(priority=10) for _ in range(2)])
            await worker.work_one()
            waited = asyncio.get_running_loop().time() - began
            if highest is None and (await bench.client.get(low.id)).effective_priority == 10:
                highest = waited
            assert waited < 20, "priority 4 starves"
        assert highest is not None
        # The pass looks every tenth of the aging time, with jitter; the rest is room for a busy machine.
        assert 6 * aging * 0.9 <= highest <= 6 * aging + 0.11 * aging + 1.0


# -- what the broker loses


async def drained(bench: Bench, worker: HintWorker, count: int) -> None:
    """Work until all have ended, each once."""

    async def step() -> bool:
        while await worker.work_one():
            pass
        return len(worker.ran) >= count

    await wait_until_async(step, timeout=30, describe=f"{count} evaluations to be worked off", poll=0.05)
    assert len(set(worker.ran)) == len(worker.ran) == count
    states = await bench.sql("SELECT DISTINCT state FROM evaluations")
    assert [row["state"] for row in states] == [State.COMPLETED]


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_the_broker_loses_is_found_again_without_a_flood(
    bench: Bench, worker: HintWorker, queues: BrokerUrl, seed: int
) -> None:
    chance = random.Random(seed)
    count = chance.randint(40, 120)
    before = sum(repaired(why) for why in ("missing", "overtaken"))
    await bench.submit_many([new_evaluation(priority=chance.randint(0, 10)) for _ in range(count)])
    await all_told(bench)
    lost = 0
    for _ in range(3):
        # A worker that dies between acknowledging and claiming; or somebody who empties the queue.
        for _ in range(chance.randint(0, 10)):
            await worker.work_one()
        if chance.random() < 0.4:
            with Publisher(queues, SETTINGS) as publisher:
                lost += await asyncio.to_thread(publisher.purge)
        else:
            lost += await worker.drop(chance.randint(1, 15))
        await pass_time(chance.uniform(0, 4 * PERIOD))
    await drained(bench, worker, count)
    again = sum(repaired(why) for why in ("missing", "overtaken")) - before
    assert again >= min(lost, 1)
    # Twice what was lost and a margin for each look at which something was missing; and each row at most every other look.
    assert again <= 2 * lost + 10 * 12, f"{again} were told again for {lost} that were lost"


async def test_a_broker_that_loses_nothing_is_told_nothing_twice(bench: Bench, worker: HintWorker) -> None:
    before = sum(repaired(why) for why in ("missing", "overtaken"))
    await bench.submit_many([new_evaluation(priority=n % 11) for n in range(60)])
    await all_told(bench)
    for _ in range(60):
        await worker.work_one()
        await pass_time(PERIOD / 10)
    assert await worker.take() is None
    assert sum(repaired(why) for why in ("missing", "overtaken")) == before
    assert (len(worker.ran), worker.void) == (60, 0)


async def test_one_lost_message_is_found_by_what_overtook_it(bench: Bench, worker: HintWorker) -> None:
    """Doubled messages hide from counting that one is missing; that a lower priority was claimed shows it."""
    lost = await bench.submit(priority=9)
    assert await next_message(worker) == lost.id
    doubled = [await bench.submit(priority=0) for _ in range(5)]
    await all_told(bench)
    await bench.sql("UPDATE evaluations SET effective_priority = 1 WHERE priority = 0")
    await all_told(bench)
    await bench.sql(
        "UPDATE evaluations SET hinted_at = hinted_at - interval '2 s', queued_at = queued_at - interval '2 s'"
    )
    before = repaired("overtaken")
    taken = await worker.take()
    assert taken is not None
    assert taken.evaluation_id == doubled[0].id
    await worker.claim(taken)
    assert await next_message(worker) == doubled[1].id

    async def found() -> bool:
        return repaired("overtaken") == before + 1

    await wait_until_async(found, timeout=10, describe="the lost message to be missed")
    await all_told(bench)
    assert await next_message(worker) == lost.id


async def test_what_the_broker_gives_up_is_told_again_while_it_waits(bench: Bench, worker: HintWorker) -> None:
    waits, ended = await bench.submit(priority=9), await bench.submit(priority=1)
    await all_told(bench)
    both = [await worker.take(), await worker.take()]
    await bench.client.cancel(ended.id, c.CancelRequest(actor="ada"))
    before = repaired("returned")
    for taken in both:
        assert taken is not None
        await worker.reject(taken)
    assert await next_message(worker) == waits.id
    await pass_time(4 * PERIOD)
    assert await messages(worker) == []
    assert repaired("returned") == before + 1
    lane = bench.storage.hints and next(iter(bench.storage.hints.lanes.values()))
    assert lane is not None
    labels = {"broker": lane.name, "reason": "rejected"}
    assert metrics.REGISTRY.get_sample_value("broker_returned_total", labels) == 2


async def test_what_came_back_and_is_not_ours_is_dropped(bench: Bench, worker: HintWorker, queues: BrokerUrl) -> None:
    def foreign() -> None:
        from crucible.broker.connection import close, connect

        connection = connect(queues, SETTINGS)
        channel = connection.channel()
        message = channel.prepare_message("{}", content_type="application/json", content_encoding="utf-8")
        channel.basic_publish(message, exchange=DEAD_EXCHANGE, routing_key="evaluation.small")
        close(connection)

    await asyncio.to_thread(foreign)
    lane = bench.storage.hints and next(iter(bench.storage.hints.lanes.values()))
    assert lane is not None

    async def counted() -> bool:
        labels = {"broker": lane.name, "reason": "unknown"}
        return metrics.REGISTRY.get_sample_value("broker_returned_total", labels) == 1

    await wait_until_async(counted, timeout=10, describe="the foreign message to be taken out")
    record = await bench.submit()
    assert await next_message(worker) == record.id


# -- what is not in order


@asynccontextmanager
async def started(url: BrokerUrl, database: str, folder: Path) -> AsyncIterator[Bench]:
    async with storage_over(database, folder, brokers=Brokers(url, None, SETTINGS)) as bench:
        yield bench


async def test_queues_that_are_not_there_yet_are_named_and_used_once_they_are(
    url: BrokerUrl, database: str, folder: Path
) -> None:
    async with started(url, database, folder) as bench:
        record = await bench.submit()

        async def told_why() -> bool:
            (side,) = (await bench.client.broker()).brokers
            return side.problem is not None and "crucible broker apply" in side.problem and not side.up

        await wait_until_async(told_why, timeout=10, describe="the missing queues to be named")
        assert bench.health.problems() == {}
        declare(url, SETTINGS)
        async with hint_worker(url, SETTINGS, bench.client) as worker:
            assert await wait_until_async(worker.take, timeout=40, describe="the message", poll=0.1)
        assert (await bench.client.get(record.id)).state is State.QUEUED

        async def in_order() -> bool:
            (side,) = (await bench.client.broker()).brokers
            return (side.up, side.waiting, side.kind) == (True, 1, "rabbitmq")

        await wait_until_async(in_order, timeout=20, describe="the broker to be seen as up")


async def test_hints_of_a_broker_that_is_no_longer_named_are_forgotten(bench: Bench, worker: HintWorker) -> None:
    record = await bench.submit()
    assert await next_message(worker) == record.id
    await bench.sql(
        "UPDATE evaluations SET hint_broker = 'amqp://gone:5672/crucible', hinted_at = now() - $1::interval",
        timedelta(0),
    )
    assert await next_message(worker) == record.id


async def test_what_may_not_be_looked_after_does_not_hold_up_what_may_be_published(
    queues: BrokerUrl, rabbitmq: RabbitCluster, rabbit_vhost: str, database: str, folder: Path
) -> None:
    rabbitmq.manage("PUT", "users/writer", {"password": "writer", "tags": ""})
    rabbitmq.manage("PUT", f"permissions/{rabbit_vhost}/writer", {"configure": "^$", "write": ".*", "read": "^$"})
    writer = BrokerUrl.parse(rabbitmq.url(vhost=rabbit_vhost, user="writer", password="writer"))
    async with started(writer, database, folder) as bench, hint_worker(queues, SETTINGS, bench.client) as worker:
        # Long enough for several looks to have been refused.
        for _ in range(5):
            await pass_time(2 * PERIOD)
            record = await bench.submit()
            began = asyncio.get_running_loop().time()
            assert await wait_until_async(worker.work_one, timeout=10, describe="the message")
            assert worker.ran[-1] == record.id
            assert asyncio.get_running_loop().time() - began < 3
