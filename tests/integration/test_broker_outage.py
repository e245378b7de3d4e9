"""The broker is away: submissions go on as if it were there, and what piled up is told in strict order when it returns."""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import TYPE_CHECKING

import pytest

from crucible import metrics
from crucible.broker.urls import BrokerUrl
from crucible.settings import BrokerSettings
from crucible.storage.hints import Brokers
from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.hint_worker import hint_worker
from tests.support.storage import Bench, new_evaluation, storage_over
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

pytestmark = pytest.mark.integration

SETTINGS = BrokerSettings(reconcile_seconds=0.5)
# Far above what was measured; against a broker that is waited for (its connect time-out is 2 s) it is little.
MOST_MEDIAN_SECONDS = 0.2


async def submission_seconds(bench: Bench, count: int = 150) -> list[float]:
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(count):
        began = loop.time()
        await bench.submit()
        took.append(loop.time() - began)
    return took


def gauge(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def silent() -> AsyncIterator[int]:
    """A port that takes connections and never says a word."""

    async def keep(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(keep, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    for writer in writers:
        writer.close()
    server.close()


@pytest.mark.parametrize(
    "broker", ["amqp://a:b@127.0.0.1:9/c", "amqp://a:b@127.0.0.1:{silent}/c", "redis://127.0.0.1:9/0"]
)
async def test_submissions_go_on_without_a_broker_and_take_no_longer(
    broker: str, silent: int, database: str, folder: Path
) -> None:
    async with storage_over(database, folder) as bench:
        await submission_seconds(bench, 20)
        alone = await submission_seconds(bench)
    impatient = SETTINGS.model_copy(update={"connect_timeout_seconds": 0.5})
    brokers = Brokers(BrokerUrl.parse(broker.format(silent=silent)), None, impatient)
    async with storage_over(database, folder, brokers=brokers) as bench:
        without = await submission_seconds(bench)
        report = await bench.client.broker()
        (side,) = report.brokers
        assert (side.up, side.queued) == (False, None)
        assert side.problem
        assert report.untold == 320
        assert bench.health.problems() == {}
        began = asyncio.get_running_loop().time()
        await bench.storage.aclose()
        closing = asyncio.get_running_loop().time() - began
    ratio = statistics.median(without) / statistics.median(alone)
    print(f"median submission without a broker / with none configured: {ratio:.2f}; closing took {closing:.2f} s")
    assert statistics.median(without) < MOST_MEDIAN_SECONDS
    assert closing < 6


@needs("rabbitmq")
async def test_what_piled_up_is_told_highest_priority_first_when_the_broker_returns(
    rabbitmq: RabbitCluster, rabbit_vhost: str, database: str, folder: Path
) -> None:
    url = declare(rabbitmq.url(vhost=rabbit_vhost), SETTINGS)
    async with storage_over(database, folder, brokers=Brokers(url, None, SETTINGS)) as bench:
        first = await bench.submit(priority=5)

        async def told() -> bool:
            return (await bench.client.broker()).untold == 0

        await wait_until_async(told, timeout=20, describe="the first evaluation to be told of")
        for node in rabbitmq.nodes:
            node.kill()
        order = [priority for priority in range(11) for _ in range(30)]
        random.Random(5).shuffle(order)
        items = [new_evaluation(f"print({n})", priority=priority) for n, priority in enumerate(order)]
        for start in range(0, len(items), 10):
            await bench.submit_many(items[start : start + 10])

        async def down() -> bool:
            (side,) = (await bench.client.broker()).brokers
            return not side.up and gauge("broker_up", broker=lane.name) == 0

        assert bench.storage.hints is not None
        (lane,) = bench.storage.hints.lanes.values()
        await wait_until_async(down, timeout=20, describe="the outage to be noticed")
        await bench.storage.hints.gauge()
        assert gauge("hint_backlog") == len(items)
        rabbitmq.restore()
        await wait_until_async(told, timeout=60, describe="the backlog to be told of")

        def up() -> bool:
            # A queue whose nodes still look for each other may refuse once more.
            return gauge("broker_up", broker=lane.name) == 1

        await wait_until_async(up, timeout=20, describe="the broker to be seen as up")
        told_first = await bench.sql(
            "SELECT priority FROM evaluations WHERE id <> $1 ORDER BY hinted_at LIMIT 50", first.id
        )
        # The first batch is the 50 most urgent; what was not confirmed of it is in the next.
        assert min(row["priority"] for row in told_first) >= 8
        place = sum(item.spec.priority > 5 for item in items)
        async with hint_worker(url, SETTINGS, bench.client) as worker:

            async def all_ran() -> bool:
                while await worker.work_one():
                    pass
                return len(worker.ran) == len(items) + 1

            await wait_until_async(all_ran, timeout=60, describe="everything to run")
            # The one that was told before the outage kept its message through it, or was missed and told again.
            assert worker.ran.index(first.id) >= place
            of = {item.id: item.spec.priority for item in items}
            ran = [of[name] for name in worker.ran if name != first.id]
            assert ran == sorted(order, reverse=True)


@needs("redis")
async def test_a_redis_that_comes_back_empty_is_told_everything_again(
    redis_server: RedisServer, database: str, folder: Path
) -> None:
    url = BrokerUrl.parse(f"{redis_server.url}/3")
    async with storage_over(database, folder, brokers=Brokers(url, None, SETTINGS)) as bench:
        items = [new_evaluation(priority=n % 11) for n in range(100)]
        await bench.submit_many(items)

        async def told() -> bool:
            return (await bench.client.broker()).untold == 0

        await wait_until_async(told, timeout=20, describe="everything to be told")
        redis_server.wipe()
        async with hint_worker(url, SETTINGS, bench.client) as worker:

            async def all_ran() -> bool:
                while await worker.work_one():
                    pass
                return len(worker.ran) == len(items)

            await wait_until_async(all_ran, timeout=60, describe="everything to run", poll=0.1)
        assert sorted(worker.ran) == sorted(item.id for item in items)


@needs("rabbitmq")
async def test_an_alarm_of_the_broker_holds_back_hints_and_nothing_else(
    rabbitmq: RabbitCluster, rabbit_vhost: str, database: str, folder: Path
) -> None:
    url = declare(rabbitmq.url(vhost=rabbit_vhost), SETTINGS)
    async with storage_over(database, folder, brokers=Brokers(url, None, SETTINGS)) as bench:
        rabbitmq.set_alarm("disk")
        took = await submission_seconds(bench, 50)
        assert statistics.median(took) < MOST_MEDIAN_SECONDS

        async def blocked() -> bool:
            assert bench.storage.hints is not None
            (lane,) = bench.storage.hints.lanes.values()
            return lane.problem is not None and lane.problem.reason == "blocked"

        await wait_until_async(blocked, timeout=20, describe="the alarm to be noticed")
        assert (await bench.client.broker()).untold > 0
        rabbitmq.clear_alarms()

        async def told() -> bool:
            return (await bench.client.broker()).untold == 0

        await wait_until_async(told, timeout=30, describe="the backlog to be told of")
