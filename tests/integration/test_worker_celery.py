"""The worker that a broker feeds, as a cluster runs it: real services in processes of their own, a real broker, real sandboxes.

What is broken is broken for real: nodes and processes are killed, queues deleted, networks parted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import psutil
import pytest

from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import queue_name
from crucible.broker.urls import BrokerUrl
from crucible.cli.exit_codes import ExitCode
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.platform import connect
from tests.support.platform_process import PlatformProcess
from tests.support.postgres import fresh_database
from tests.support.service_processes import ServiceProcesses
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.servers.rabbitmq import RabbitCluster, RabbitNode
    from tests.servers.redis import RedisServer
    from tests.support.platform import Client

pytestmark = [pytest.mark.integration, needs("rabbitmq", "sandbox")]

ENVIRONMENT = {"CRUCIBLE_BROKER__RECONCILE_SECONDS": "1"}
NOT_SOON = "import time; time.sleep(600)"
SMALL = queue_name(SizeClass.SMALL)
BATCH = 100


class Scene:
    """The services over a broker, and short ways to say what tests do with them."""

    def __init__(self, services: ServiceProcesses, client: Client, publisher: Publisher, database: str) -> None:
        self.services = services
        self.client = client
        self.publisher = publisher
        self._database = database

    async def submit_many(self, requests: list[dict[str, Any]]) -> list[str]:
        """Submit in batches; returns the ids in this order."""
        ids: list[str] = []
        for start in range(0, len(requests), BATCH):
            body = {"evaluations": requests[start : start + BATCH]}
            response = await self.client.http.post("/v1/evaluations/batch", json=body)
            assert response.status_code in (200, 201, 207), response.text
            ids += [item["evaluation"]["id"] for item in response.json()["items"]]
        return ids

    async def rows(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """Read the database beside the services."""
        connection = await asyncpg.connect(self._database)
        try:
            return await connection.fetch(sql, *args)
        finally:
            await connection.close()

    async def count(self, condition: str) -> int:
        """Count evaluations."""
        (row,) = await self.rows(f"SELECT count(*) FROM evaluations WHERE {condition}")
        return int(row[0])

    async def until_counted(self, condition: str, count: int, *, seconds: float = 30) -> None:
        """Wait until so many evaluations fulfil a condition."""

        async def counted() -> bool:
            return await self.count(condition) == count

        await wait_until_async(counted, timeout=seconds, poll=0.05, describe=f"{count} evaluations with {condition}")

    async def waiting_in_broker(self) -> int:
        """Read how many messages of small evaluations no worker holds."""
        depths = await asyncio.to_thread(self.publisher.depths)
        return depths[SizeClass.SMALL].ready

    async def busy(self) -> str:
        """Submit an evaluation that takes the one slot, and return it once it runs."""
        blocker = (await self.client.submit(NOT_SOON, priority=10))["id"]
        await self.until_counted("state = 'running'", 1)
        return str(blocker)

    async def cancel(self, evaluation_id: str) -> None:
        """Cancel an evaluation."""
        response = await self.client.http.post(f"/v1/evaluations/{evaluation_id}/cancel")
        assert response.status_code in (200, 202), response.text

    async def until_logged(self, pattern: str, *, after: int = 0, seconds: float = 30) -> str:
        """Wait until the worker says something; returns it."""

        def said() -> re.Match[str] | None:
            return re.search(pattern, self.services.worker.log[after:])

        found = await wait_until_async(said, timeout=seconds, describe=f"the worker to say {pattern}")
        assert found
        return found[0]


@asynccontextmanager
async def scene(broker_url: str, **environment: str) -> AsyncIterator[Scene]:
    async with fresh_database() as database:
        for folder in scratch_dir():
            with Publisher(BrokerUrl.parse(broker_url), BrokerSettings()) as publisher:
                await asyncio.to_thread(publisher.declare)
                services = ServiceProcesses(folder, database, broker_url=broker_url, **ENVIRONMENT | environment)
                with services:
                    async with services.client() as client:
                        yield Scene(services, client, publisher, database)


def url_of(rabbitmq: RabbitCluster, vhost: str) -> str:
    return rabbitmq.url(vhost=vhost)


def node_of(services: ServiceProcesses, rabbitmq: RabbitCluster) -> RabbitNode:
    """The node that the worker consumes from."""
    (*_, address) = re.findall(r'"broker":"([\d.]+):\d+","event":"consuming"', services.worker.log)
    return next(node for node in rabbitmq.nodes if node.address == address)


def strict(rows: list[asyncpg.Record]) -> list[tuple[int, int]]:
    return sorted(((row["priority"], row["number"]) for row in rows), key=lambda row: (-row[0], row[1]))


async def test_an_evaluation_runs_once_whatever_the_broker_says_of_it(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    async with scene(url_of(rabbitmq, rabbit_vhost)) as stage:
        running = (await stage.client.submit("import time; time.sleep(1.5); print('once')"))["id"]
        await stage.until_counted("state = 'running'", 1)
        done = await stage.client.run("print(6 * 7)")
        again = [Hint(name, SizeClass.SMALL, 5, None) for name in (running, done["id"]) for _ in range(5)]
        assert all(await asyncio.to_thread(stage.publisher.publish, again, 10))
        foreign = Hint("ev-" + 26 * "0", SizeClass.SMALL, 10, None)
        assert all(await asyncio.to_thread(stage.publisher.publish, [foreign], 10))
        ended = await stage.client.ended(running)
        assert (ended["state"], ended["attempt"]) == ("completed", 1)
        assert await stage.client.output(running) == b"once\n"

        async def settled() -> bool:
            return stage.services.worker.metric('worker_hints_total{verdict="done"}') == 13

        await wait_until_async(settled, timeout=10, describe="every message to be acknowledged")
        assert await stage.waiting_in_broker() == 0
        starts = await stage.rows("SELECT evaluation_id FROM events WHERE type = 'running'")
        assert sorted(row["evaluation_id"] for row in starts) == sorted([running, done["id"]])


async def test_what_waits_is_claimed_in_strict_order_while_the_leader_of_its_queue_is_killed(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    async with scene(url_of(rabbitmq, rabbit_vhost), CRUCIBLE_WORKER__SLOTS="1") as stage:
        blocker = await stage.busy()
        await stage.submit_many([{"code": "pass", "priority": number % 11} for number in range(220)])

        async def told() -> bool:
            return await stage.waiting_in_broker() == 220

        await wait_until_async(told, timeout=20, describe="the broker to have heard of all")
        # The worst case is both at once: the worker's own node leads the queue.
        victim = node_of(stage.services, rabbitmq)
        lead(victim, rabbit_vhost)
        await wait_until_async(
            lambda: rabbitmq.leader_of(SMALL, rabbit_vhost) is victim, timeout=20, describe="the leader to change"
        )
        await stage.cancel(blocker)

        async def begun() -> bool:
            return await stage.count("provisioning_at IS NOT NULL") > 60

        await wait_until_async(begun, timeout=30, poll=0.005, describe="the drain to be under way")
        victim.kill()
        await stage.until_counted("state = 'completed'", 220, seconds=90)
        rows = await stage.rows(
            "SELECT priority, number, attempt, provisioning_at FROM evaluations WHERE id <> $1 ORDER BY provisioning_at",
            blocker,
        )
        assert [(row["priority"], row["number"]) for row in rows] == strict(rows)
        assert {row["attempt"] for row in rows} == {1}
        claims = [row["provisioning_at"] for row in rows]
        longest = max((after - before).total_seconds() for before, after in itertools.pairwise(claims))
        assert longest < 5
        assert stage.services.worker.metric("worker_broker_connections_total") >= 2


def lead(node: RabbitNode, vhost: str) -> None:
    """Make a node the leader of the small queue."""
    queue = f'rabbit_misc:r(<<"{vhost}">>, queue, <<"{SMALL}">>)'
    node.ctl(
        "eval", f"{{ok, Q}} = rabbit_amqqueue:lookup({queue}), rabbit_quorum_queue:transfer_leadership(Q, node())."
    )


async def test_a_stopped_worker_finishes_or_gives_back_and_never_both(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    async with scene(url_of(rabbitmq, rabbit_vhost)) as stage:
        short = await stage.submit_many([{"code": "import time; time.sleep(1)"}] * 2)
        await stage.until_counted("state = 'running'", 2)
        long = await stage.submit_many([{"code": NOT_SOON}] * 2)
        await stage.until_counted("state = 'running'", 4)
        waiting = await stage.submit_many([{"code": "pass"}] * 3)
        assert stage.services.worker.stop() == 0
        rows = {row["id"]: row for row in await stage.rows("SELECT id, state, attempt, losses FROM evaluations")}
        assert [(rows[name]["state"], rows[name]["attempt"]) for name in short] == [("completed", 1)] * 2
        assert [rows[name]["state"] for name in long + waiting] == ["queued"] * 5
        assert {rows[name]["losses"] for name in long} == {0}
        assert {rows[name]["attempt"] for name in waiting} == {0}
        capacity = (await stage.client.http.get("/v1/capacity")).json()
        assert [node["sandboxes"] for node in capacity["nodes"]] == [0]
        stage.services.worker.start()
        for name in waiting:
            assert (await stage.client.ended(name))["state"] == "completed"
        await stage.until_counted("state = 'running' AND attempt = 2", 2)


async def test_a_second_signal_ends_the_worker_at_once_and_a_killed_one_loses_nothing(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    short_lease = {"CRUCIBLE_STORAGE__LEASE_SECONDS": "2", "CRUCIBLE_STORAGE__RETRY_SECONDS": "0"}
    patient = {"CRUCIBLE_WORKER__DRAIN_SECONDS": "600"}
    async with scene(url_of(rabbitmq, rabbit_vhost), **short_lease, **patient) as stage:
        worker = stage.services.worker
        held = await stage.submit_many([{"code": NOT_SOON}] * 2)
        await stage.until_counted("state = 'running'", 2)
        worker.signal(signal.SIGTERM)
        await wait_until_async(lambda: not worker.ready(), timeout=10, describe="the worker to drain")
        worker.signal(signal.SIGTERM)
        assert worker.wait(10) == ExitCode.INTERRUPTED
        worker.start()
        await stage.until_counted("state = 'running' AND attempt = 2", 2)
        worker.kill()
        worker.start()
        await stage.until_counted("state = 'running' AND attempt = 3", 2)
        for name in held:
            await stage.cancel(name)
            assert (await stage.client.ended(name))["state"] == "cancelled"


async def test_while_storage_is_away_the_worker_holds_what_it_was_told_of_and_asks_again(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    async with scene(url_of(rabbitmq, rabbit_vhost)) as stage:
        services = stage.services
        services.worker.signal(signal.SIGSTOP)
        names = await stage.submit_many([{"code": "pass", "priority": number} for number in range(8)])

        async def told() -> bool:
            return await stage.count("hint_priority IS NOT NULL") == 8

        await wait_until_async(told, timeout=20, describe="the broker to have heard of all")
        services.storage.kill()
        services.worker.signal(signal.SIGCONT)
        await stage.until_logged("storage does not answer; holding the messages")
        services.storage.start()
        await stage.until_logged("storage answers again")
        for name in names:
            assert (await stage.client.ended(name))["state"] == "completed"
        assert services.worker.metric('worker_hints_total{verdict="given_up"}') == 0


async def test_a_queue_that_is_deleted_and_made_again_is_consumed_without_a_restart(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    async with scene(url_of(rabbitmq, rabbit_vhost)) as stage:
        worker = stage.services.worker
        pid = worker.pid
        held = (await stage.client.submit(NOT_SOON))["id"]
        await stage.until_counted("state = 'running'", 1)
        await asyncio.to_thread(stage.publisher.delete_queues)
        await stage.until_logged("lacks a queue or exchange.*crucible broker apply")
        assert not worker.ready()
        told = len(worker.log)
        await pass_time(1.0)
        assert len(worker.log) == told, "the same is not said again and again"
        name = (await stage.client.submit("pass"))["id"]
        await asyncio.to_thread(stage.publisher.declare)
        assert (await stage.client.ended(name))["state"] == "completed"
        assert worker.pid == pid
        assert (await stage.client.get(held))["attempt"] == 1
        assert (await stage.client.get(held))["state"] == "running"


@needs("network namespaces")
async def test_a_node_that_is_cut_off_from_the_others_is_left(rabbitmq: RabbitCluster, rabbit_vhost: str) -> None:
    if not rabbitmq.can_be_cut:
        pytest.fail("the cluster's nodes have no networks of their own")
    async with scene(url_of(rabbitmq, rabbit_vhost)) as stage:
        node = node_of(stage.services, rabbitmq)
        # Clients still reach it, and it answers them.
        await asyncio.to_thread(lambda: rabbitmq.cut_off(node, clients=False))
        await stage.until_logged("has lost touch with the others|does not answer; leaving it", seconds=20)

        def elsewhere() -> bool:
            return stage.services.worker.ready() and node_of(stage.services, rabbitmq) is not node

        await wait_until_async(elsewhere, timeout=40, describe="another node to be consumed from")
        await asyncio.to_thread(rabbitmq.heal)
        assert (await stage.client.run("print('on')"))["state"] == "completed"


async def test_more_than_a_hundred_run_at_once_and_never_more_than_there_are_slots(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    room = {"CRUCIBLE_DISPATCHER__CPU_MILLIS": "1000000", "CRUCIBLE_DISPATCHER__MEMORY_BYTES": str(1 << 40)}
    async with scene(url_of(rabbitmq, rabbit_vhost), CRUCIBLE_WORKER__SLOTS="110", **room) as stage:
        await stage.submit_many([{"code": NOT_SOON}] * 110)
        extra = await stage.submit_many([{"code": "pass"}] * 10)
        await stage.until_counted("state = 'running'", 110, seconds=60)
        held = await stage.count("state IN ('provisioning', 'running')")
        assert held == 110
        # The connection breaks: what runs goes on, what comes again joins it, and no slot is filled twice.
        connected = stage.services.worker.metric("worker_broker_connections_total")
        rabbitmq.nodes[0].ctl("close_all_connections", "--vhost", rabbit_vhost, "a test wants it")

        async def back() -> bool:
            return stage.services.worker.metric("worker_broker_connections_total") > connected

        await wait_until_async(back, timeout=20, describe="the worker to be connected again")
        redelivered = 'broker_redelivered_total{size_class="small"}'
        await wait_until_async(
            lambda: stage.services.worker.metric(redelivered) >= 110, timeout=20, describe="all to be handed out again"
        )
        assert await stage.count("state IN ('provisioning', 'running')") == 110
        assert await stage.count("attempt > 1") == 0
        assert {(await stage.client.get(name))["state"] for name in extra} == {"queued"}


@pytest.fixture
def platform(rabbitmq: RabbitCluster, rabbit_vhost: str) -> Iterator[PlatformProcess]:
    for folder in scratch_dir():
        process = PlatformProcess(folder, CRUCIBLE_BROKER_URL=url_of(rabbitmq, rabbit_vhost))
        yield process
        process.kill()


async def test_the_worker_of_one_machine_is_started_again_when_it_dies_and_dies_with_its_platform(
    platform: PlatformProcess,
) -> None:
    await platform.up()
    (pid,) = json.loads((platform.data_dir / "server.json").read_text())["workers"]
    async with connect(platform.url, platform.api_key) as client:
        assert (await client.run("pass"))["state"] == "completed"
        psutil.Process(pid).kill()
        assert (await client.run("pass"))["state"] == "completed"
    (worker,) = [process for process in platform.tree() if "worker" in process.cmdline()]
    assert worker.pid != pid
    psutil.Process(platform.pid).kill()
    await platform.reap()
    await wait_until_async(lambda: not worker.is_running(), timeout=10, describe="the worker to be gone")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"password": "wrong"}, "refuses user 'admin' or its password"),
        ({"vhost": "elsewhere"}, "has no virtual host 'elsewhere'"),
    ],
)
def test_a_worker_that_can_never_connect_says_why_and_leaves(
    rabbitmq: RabbitCluster, wrong: dict[str, str], told: str
) -> None:
    variables = {
        "CRUCIBLE_BROKER_URL": rabbitmq.url(**wrong),  # type: ignore[arg-type]
        "CRUCIBLE_INTERNAL_TOKEN": "token",
        "CRUCIBLE_STORAGE_URL": "http://127.0.0.1:9",
        "CRUCIBLE_DISPATCHER_URL": "http://127.0.0.1:9",
    }
    done = serve("worker", variables)
    assert done.returncode == ExitCode.UNAVAILABLE
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def serve(service: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crucible.cli.main", "serve", service, "--port", "0"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("service", "variable"),
    [
        ("storage", "CRUCIBLE_INTERNAL_TOKEN"),
        ("worker", "CRUCIBLE_BROKER_URL"),
    ],
)
def test_a_service_names_the_setting_that_it_lacks(service: str, variable: str) -> None:
    done = serve(service, {})
    assert done.returncode == ExitCode.USAGE
    assert variable in done.stderr


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    url = f"{redis_server.url}/0"
    yield url
    redis_server.start()
    with Publisher(BrokerUrl.parse(url), BrokerSettings()) as publisher:
        publisher.purge()


@needs("redis")
async def test_the_broker_that_is_being_left_is_consumed_by_the_same_worker_through_its_restarts(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with scene(redis_url, CRUCIBLE_WORKER__SLOTS="1") as stage:
        blocker = await stage.busy()
        await stage.submit_many([{"code": "pass", "priority": number % 11} for number in range(33)])

        async def told() -> bool:
            return await stage.count("hint_priority IS NOT NULL AND state = 'queued'") == 33

        await wait_until_async(told, timeout=20, describe="the broker to have heard of all")
        await stage.cancel(blocker)
        await stage.until_counted("state = 'completed'", 33)
        rows = await stage.rows(
            "SELECT priority, number FROM evaluations WHERE id <> $1 ORDER BY provisioning_at", blocker
        )
        assert [(row["priority"], row["number"]) for row in rows] == strict(rows)
        await asyncio.to_thread(redis_server.kill)
        await stage.until_logged("the connection to the broker was lost")
        name = (await stage.client.submit("pass"))["id"]
        await asyncio.to_thread(redis_server.start)
        assert (await stage.client.ended(name))["state"] == "completed"
        assert stage.services.worker.stop() == 0
