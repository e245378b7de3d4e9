"""How fast an owner may submit, over several replicas of the API: one limit, which a Redis that is away does not turn into none."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from crucible.api.access import SubmissionRate
from crucible.problems import ProblemError
from crucible.settings import ApiSettings, Settings
from tests.support.capabilities import needs
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.integration, needs("redis")]

LIMIT = 6


@asynccontextmanager
async def replica(server: RedisServer) -> AsyncIterator[SubmissionRate]:
    settings = Settings(api=ApiSettings(rate_per_second=LIMIT / 60), redis_url=SecretStr(server.url))
    rate = SubmissionRate(settings)
    try:
        yield rate
    finally:
        await rate.aclose()


async def refused(rate: SubmissionRate, owner: str) -> ProblemError:
    with pytest.raises(ProblemError) as raised:
        await rate.take(owner, 1)
    return raised.value


async def test_replicas_share_one_limit_per_owner(redis_server: RedisServer) -> None:
    async with replica(redis_server) as one, replica(redis_server) as other:
        await one.take("alice", 4)
        await other.take("alice", 2)
        for rate in (one, other):
            error = await refused(rate, "alice")
            assert error.kind.slug == "rate-limited"
            assert error.extra["limit"] == LIMIT
            assert error.retry_after is not None
        await other.take("bob", LIMIT)


async def test_a_refused_batch_is_not_counted(redis_server: RedisServer) -> None:
    async with replica(redis_server) as one, replica(redis_server) as other:
        await one.take("carol", 4)
        with pytest.raises(ProblemError):
            await other.take("carol", 3)
        await other.take("carol", 2)


async def test_while_redis_is_away_each_replica_counts_and_afterwards_they_share_again(
    redis_server: RedisServer,
) -> None:
    async with replica(redis_server) as one, replica(redis_server) as other:
        await one.take("dave", LIMIT)
        redis_server.kill()
        for rate in (one, other):
            await rate.take("dave", LIMIT)
            await refused(rate, "dave")
        redis_server.start()

        owners = (f"owner-{number}" for number in itertools.count())

        async def counted_together() -> bool:
            # Once Redis counts again, what one replica takes is taken from the other.
            owner = next(owners)
            for rate in (one, other):
                try:
                    await rate.take(owner, LIMIT // 2 + 1)
                except ProblemError:
                    return True
            return False

        await wait_until_async(counted_together, timeout=10, describe="the shared counter to be asked again")
