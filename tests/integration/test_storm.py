"""Two thousand evaluations through a storm: whatever carries them fails in turn, and each ends once, with its cause.

The order and length of the blows come from a seed; the one that failed is printed, and set in CRUCIBLE_TEST_SEED it comes again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from crucible.evaluation import State
from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.events import redis_client, streamed
from tests.support.platform import TERMINAL
from tests.support.postgres import fresh_database
from tests.support.service_processes import ServiceProcesses
from tests.support.storm import Blow, Scene, plan
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = int(os.environ.get("CRUCIBLE_TEST_SEED", "20261124"))
EVALUATIONS = 2000
BATCH = 20
# What is submitted: its code, and how it must end. The long one outlasts the lease of a worker that is killed; of the others most are over
# before it has ended, since their sandboxes go on without a worker.
KINDS: dict[str, tuple[str, tuple[str, str]]] = {
    "quick": ("print('done')", ("completed", "exit_zero")),
    "failing": ("raise SystemExit(3)", ("failed", "exit_nonzero")),
    "longer": ("import time; time.sleep(0.4); print('done')", ("completed", "exit_zero")),
    "long": ("import time; time.sleep(7); print('done')", ("completed", "exit_zero")),
}
KIND_SHARES = (80, 10, 10, 0)
PACE_SECONDS = 0.8
SETTLE_SECONDS = 180
SETTINGS = {
    "CRUCIBLE_WORKER__SLOTS": "8",
    "CRUCIBLE_DISPATCHER__CPU_MILLIS": "16000",
    # Several blows in a row may find the same evaluation; what is judged here is that none is lost.
    "CRUCIBLE_STORAGE__MAX_ATTEMPTS": "10",
    "CRUCIBLE_STORAGE__LEASE_SECONDS": "5",
    "CRUCIBLE_STORAGE__RETRY_SECONDS": "0.2",
    "CRUCIBLE_BROKER__RECONCILE_SECONDS": "2",
    "CRUCIBLE_LOG__LEVEL": "warning",
}


class Submitter:
    """Submits batches until each is accepted; an Idempotency-Key makes asking again harmless."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self._http = http
        self._dice = random.Random(seed)
        self.accepted: dict[str, str] = {}

    async def batch(self, number: int) -> None:
        """Submit one batch of any kinds."""
        await self._submit(f"storm-{number}", self._dice.choices(list(KINDS), KIND_SHARES, k=BATCH))

    async def before(self, blow: Blow) -> None:
        """Have something run that outlasts the lease of a worker that is about to be killed."""
        if blow is not Blow.WORKER_KILLED:
            return
        (name,) = await self._submit("storm-long", ["long"], priority=10)

        async def runs() -> bool:
            return bool((await self._http.get(f"/v1/evaluations/{name}")).json()["state"] == State.RUNNING)

        await wait_until_async(runs, timeout=60, describe="the long one to run", poll=0.1)

    async def _submit(self, key: str, kinds: list[str], priority: int | None = None) -> list[str]:
        """Submit as often as it takes, and remember the kind of each evaluation by its id."""
        ids: list[str] = []
        wanted = [
            {
                "code": KINDS[kind][0],
                "priority": self._dice.randint(0, 10) if priority is None else priority,
                "memory_limit": self._dice.choice(["64Mi", "64Mi", "64Mi", "300Mi"]),
            }
            for kind in kinds
        ]

        async def accepted() -> bool:
            response = await self._http.post(
                "/v1/evaluations/batch",
                json={"evaluations": wanted},
                headers={"Idempotency-Key": key},
            )
            if response.status_code >= 500:
                return False
            assert response.status_code == 200, response.text
            for kind, item in zip(kinds, response.json()["items"], strict=True):
                ids.append(item["evaluation"]["id"])
                self.accepted[ids[-1]] = kind
            return True

        await wait_until_async(
            accepted, timeout=90, describe="a batch to be accepted", poll=0.3, tolerate=(httpx.HTTPError,)
        )
        return ids


async def every_evaluation(http: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    """Read the whole list, by id."""
    found: dict[str, dict[str, Any]] = {}
    path: str | None = "/v1/evaluations?limit=200"
    while path:
        response = await http.get(path)
        assert response.status_code == 200, response.text
        page = response.json()
        found |= {each["id"]: each for each in page["items"]}
        path = page["next"]
    return found


async def blow_by_blow(scene: Scene) -> None:
    for strike in plan(SEED):
        await scene.strike(strike)


async def submit_through(submitter: Submitter, storm: asyncio.Task[None]) -> None:
    """Submit for as long as the storm lasts, so that no blow falls on an idle platform; what is left comes after it."""
    for number in range(EVALUATIONS // BATCH):
        await submitter.batch(number)
        if not storm.done():
            await asyncio.wait((storm,), timeout=PACE_SECONDS)


async def settled(http: httpx.AsyncClient) -> bool:
    """Whether nothing waits or runs any more."""
    under_way = [("state", state) for state in State if not state.terminal]
    response = await http.get("/v1/evaluations", params=[*under_way, ("limit", 1)])
    assert response.status_code == 200, response.text
    return not response.json()["items"]


def test_the_same_seed_is_the_same_storm_and_every_blow_falls_once_the_leader_first() -> None:
    for seed in range(50):
        strikes = plan(seed)
        assert strikes == plan(seed)
        assert sorted(strike.blow for strike in strikes) == sorted(Blow)
        nodes = [
            strike.blow for strike in strikes if "node" in strike.blow.name.lower() or strike.blow is Blow.LEADER_KILLED
        ]
        assert nodes == [Blow.LEADER_KILLED, Blow.SECOND_NODE_KILLED, Blow.THIRD_NODE_KILLED]
    assert plan(1) != plan(2)


@needs("rabbitmq", "redis", "sandbox", "postgres", "network namespaces")
async def test_two_thousand_evaluations_come_through_a_storm_each_with_one_result_and_its_cause(
    folder: Path, rabbitmq: RabbitCluster, rabbit_vhost: str, redis_server: RedisServer
) -> None:
    print(f"CRUCIBLE_TEST_SEED={SEED}")
    url = rabbitmq.url(vhost=rabbit_vhost)
    declare(url)
    async with fresh_database() as database_url:
        with ServiceProcesses(folder, database_url, broker_url=url, redis_url=redis_server.url, **SETTINGS) as services:
            async with services.client() as client:
                submitter = Submitter(client.http, SEED)
                worker, storage = services.worker, services.storage
                scene = Scene(rabbitmq, rabbit_vhost, redis_server, worker, storage, submitter.before)
                storm = asyncio.create_task(blow_by_blow(scene))
                await submit_through(submitter, storm)
                await storm
                await wait_until_async(
                    lambda: settled(client.http), timeout=SETTLE_SECONDS, describe="everything to end", poll=1
                )
                found = await every_evaluation(client.http)
            lost_attempts = await judge(submitter.accepted, found, database_url, redis_server.url)
    print(
        f"{len(found)} evaluations, {lost_attempts} lost attempts, {Counter(one['reason'] for one in found.values())}"
    )
    assert lost_attempts > 0, "the worker was killed in mid-run, and nothing was tried again"


async def judge(accepted: dict[str, str], found: dict[str, dict[str, Any]], database_url: str, redis_url: str) -> int:
    """Hold what became of each to what was promised; returns how many attempts were lost on the way."""
    assert len(accepted) == EVALUATIONS + 1
    assert set(found) == set(accepted), "lost, or run without having been accepted"
    otherwise = {
        name: (one["state"], one["reason"], one["detail"])
        for name, one in found.items()
        if (one["state"], one["reason"]) != KINDS[accepted[name]][1]
    }
    assert not otherwise
    ends = ",".join(f"'{state}'" for state in sorted(TERMINAL))
    connection = await asyncpg.connect(database_url)
    try:
        twice = await connection.fetch(
            f"SELECT evaluation_id FROM events WHERE type IN ({ends}) GROUP BY 1 HAVING count(*) <> 1"
        )
        told = await connection.fetch(f"SELECT evaluation_id, seq FROM events WHERE type IN ({ends})")
        lost_attempts = await connection.fetchval("SELECT sum(losses) FROM evaluations")
        left_behind = await connection.fetchval("SELECT count(*) FROM outbox")
    finally:
        await connection.close()
    assert not twice, "more than one visible result"
    assert left_behind == 0, "events that were told to nobody"
    async with redis_client(redis_url) as client:
        streamed_ends = {(event.evaluation_id, event.seq) for event in await streamed(client) if event.type in TERMINAL}
    assert streamed_ends == {(row["evaluation_id"], row["seq"]) for row in told}
    return int(lost_attempts)
