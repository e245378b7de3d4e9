"""Stopping and starting the platform in an orderly way: what runs is given back, what waits keeps its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.folders import scratch_dir
from tests.support.platform import connect
from tests.support.platform_process import PlatformProcess
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

RUNS_A_WHILE = "import time\nprint('begin', flush=True)\ntime.sleep({seconds})\nprint('end', flush=True)"


@pytest.fixture
def platform() -> Iterator[PlatformProcess]:
    for folder in scratch_dir():
        process = platform_over(folder)
        yield process
        process.kill()


def platform_over(folder: Path) -> PlatformProcess:
    return PlatformProcess(folder, CRUCIBLE_WORKER__DRAIN_SECONDS="0.3", CRUCIBLE_WORKER__SLOTS="1")


async def test_a_drain_gives_back_what_runs_and_the_next_start_finishes_everything_in_order(
    platform: PlatformProcess,
) -> None:
    await platform.up()
    async with connect(platform.url, platform.api_key) as client:
        running = await client.submit(RUNS_A_WHILE.format(seconds=3), priority=3)

        async def begun() -> bool:
            return await client.output(running["id"]) == b"begin\n"

        await wait_until_async(begun, timeout=20, describe="the first one to run")
        waiting = [(await client.submit("pass", priority=priority))["id"] for priority in (1, 9, 5)]
    # Three restarts: giving way is no loss, however often it happens.
    for _ in range(3):
        assert await platform.stop() == 0
        await platform.up()
    async with connect(platform.url, platform.api_key) as client:
        ended = [await client.ended(name) for name in (running["id"], *waiting)]
        assert [one["state"] for one in ended] == ["completed"] * 4
        assert ended[0]["attempt"] > 1
        order = sorted(ended[1:], key=lambda one: one["provisioning_at"])
        assert [one["priority"] for one in order] == [9, 5, 1]
        assert await client.output(running["id"]) == b"begin\nend\n"
        assert (await client.http.get("/v1/dead-letters")).json()["items"] == []
    assert await platform.stop() == 0
