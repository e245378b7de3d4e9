"""The whole way from Redis to RabbitMQ and back, by command, with real workers on both brokers and hundreds of evaluations in flight."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.postgres import fresh_database
from tests.support.service_processes import ServiceProcesses
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer
    from tests.support.platform import Client

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

# Waiting or running when each step is taken.
IN_FLIGHT = 100
CODE = "import time; time.sleep(0.05); print('done')"


class Operator:
    """Someone with the command line and an administrator's key, and the load that goes on meanwhile."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.ids: list[str] = []

    async def crucible(self, *words: str) -> dict[str, Any]:
        """Run `crucible broker migrate ... --json` and return what it printed."""
        environment = os.environ | {
            "CRUCIBLE_URL": str(self._client.http.base_url),
            "CRUCIBLE_API_KEY": self._client.http.headers["Authorization"].removeprefix("Bearer "),
        }
        command = [sys.executable, "-m", "crucible.cli.main", "broker", "migrate", *words, "--json"]
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        return json.loads(out)  # type: ignore[no-any-return]

    async def load(self) -> None:
        """Put more in flight."""
        items = [{"code": CODE, "priority": place % 11, "memory_limit": "64Mi"} for place in range(IN_FLIGHT)]
        response = await self._client.http.post("/v1/evaluations/batch", json={"evaluations": items})
        assert response.status_code == 200, response.text
        self.ids += [item["evaluation"]["id"] for item in response.json()["items"]]

    async def all_ended(self) -> list[dict[str, Any]]:
        """Wait until everything that was ever submitted has ended."""
        return [await self._client.ended(each, wait=60) for each in self.ids]


def sides(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    new, legacy = report["brokers"]
    assert (new["role"], legacy["role"]) == ("new", "legacy")
    return new, legacy


@needs("rabbitmq", "redis", "sandbox", "postgres")
async def test_work_moves_from_redis_to_rabbitmq_and_back_and_there_again_while_it_goes_on(
    folder: Path, rabbitmq: RabbitCluster, rabbit_vhost: str, redis_server: RedisServer
) -> None:
    new = rabbitmq.url(vhost=rabbit_vhost)
    legacy = redis_server.url
    declare(new)
    declare(legacy)
    async with fresh_database() as database_url:
        with ServiceProcesses(
            folder, database_url, broker_url=new, legacy_broker_url=legacy, CRUCIBLE_DISPATCHER__CPU_MILLIS="8000"
        ) as services:
            async with services.client() as client:
                operator = Operator(client)

                await operator.load()
                before = await operator.crucible("status")
                assert (before["phase"], before["share"]) == ("legacy", 0)

                half = await operator.crucible("start", "--share", "50")
                assert (half["phase"], half["share"]) == ("sharing", 50)
                await operator.load()

                async def both_work() -> bool:
                    assert services.legacy_worker is not None
                    done = 'worker_hints_total{verdict="done"}'
                    return services.worker.metric(done) > 0 and services.legacy_worker.metric(done) > 0

                await wait_until_async(both_work, timeout=30, describe="both brokers' workers to do something")

                back = await operator.crucible("rollback")
                assert (back["phase"], back["share"]) == ("legacy", 0)

                await operator.load()
                await operator.crucible("start", "--share", "100")
                drained = await operator.crucible("drain", "--wait")
                assert drained["drained"]
                await operator.load()
                assert (await operator.crucible("finish"))["phase"] == "finished"
                new_side, legacy_side = sides(await operator.crucible("status"))
                assert (legacy_side["waiting"], legacy_side["in_flight"]) == (0, 0)
                assert new_side["up"]

                await operator.load()
                assert (await operator.crucible("rollback"))["phase"] == "legacy"
                await operator.load()

                ended = await operator.all_ended()
                assert len(ended) == 6 * IN_FLIGHT
                assert Counter((one["reason"], one["attempt"]) for one in ended) == {("exit_zero", 1): len(ended)}
