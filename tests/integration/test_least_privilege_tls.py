"""The services as they are to run in production: each its own user of the broker, everything by TLS, nothing declared by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.broker import Installation
from tests.support.capabilities import needs
from tests.support.postgres import fresh_database
from tests.support.service_processes import ServiceProcesses

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LOAD = 40


@needs("rabbitmq", "redis", "sandbox", "postgres")
async def test_work_gets_through_tls_with_each_service_its_own_user_and_goes_on_after_the_broker_was_away(
    folder: Path,
) -> None:
    from tests.servers.certificates import Authority
    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

    authority = Authority()
    trusted = authority.issue_into(folder / "certificates", "client").authority
    with (
        RabbitCluster(folder / "rabbitmq", nodes=1, tls=authority) as cluster,
        RedisServer(folder / "redis", tls=authority) as redis,
    ):
        installation = Installation(cluster, cluster.new_vhost())
        installation.apply()

        def url(user: str) -> str:
            password = installation.passwords[user]
            return cluster.url(user=user, password=password, vhost=installation.vhost, tls=True)

        (folder / "services").mkdir()
        async with fresh_database() as database_url:
            with ServiceProcesses(
                folder / "services",
                database_url,
                broker_url=url("crucible-storage"),
                worker_broker_url=url("crucible-worker"),
                redis_url=redis.url,
                CRUCIBLE_BROKER__CA_FILE=str(trusted),
            ) as services:
                async with services.client() as client:
                    for _ in range(2):
                        ids = [(await client.submit("print('hello')"))["id"] for _ in range(LOAD)]
                        ended = [await client.ended(each, wait=60) for each in ids]
                        assert {one["reason"] for one in ended} == {"exit_zero"}
                        cluster.nodes[0].kill()
                        ids.append((await client.submit("print('while the broker is away')"))["id"])
                        cluster.nodes[0].start()
                        assert (await client.ended(ids[-1], wait=60))["reason"] == "exit_zero"
