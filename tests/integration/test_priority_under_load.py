"""What priority is worth when every slot is taken: beside a first-come-first-served queue on the same load in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import needs
from tests.support.platform import running_platform
from tests.support.waits import pass_time

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster
    from tests.support.platform import Client

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

SLOTS = 6
LOAD = 150
URGENT = 10
URGENT_EVERY_SECONDS = 1.0
HALF_A_SECOND = {"code": "import time; time.sleep(0.5)", "memory_limit": "64Mi"}


async def waits_of_the_urgent(client: Client, *, urgent: int, other: int) -> list[float]:
    """Fill the queue, submit an urgent evaluation every second meanwhile, and return those waits in seconds, shortest first."""
    ids: list[str] = []
    for _ in range(LOAD // 50):
        items = [{**HALF_A_SECOND, "priority": other}] * 50
        response = await client.http.post("/v1/evaluations/batch", json={"evaluations": items})
        assert response.status_code == 200, response.text
        ids += [item["evaluation"]["id"] for item in response.json()["items"]]
    chosen = []
    for _ in range(URGENT):
        await pass_time(URGENT_EVERY_SECONDS)
        chosen.append((await client.submit(**HALF_A_SECOND, priority=urgent))["id"])
    ended = [await client.ended(each, wait=60) for each in chosen]
    assert (await client.get(ids[-1]))["state"] == "queued" or urgent == other, "the slots were not taken all the time"
    for each in ids:
        await client.ended(each, wait=60)
    return sorted(each["queue_wait_seconds"] for each in ended)


def p95(ordered: list[float]) -> float:
    return ordered[int(0.95 * (len(ordered) - 1))]


@needs("rabbitmq", "sandbox", "postgres")
async def test_an_urgent_evaluation_takes_the_next_free_slot_where_first_come_first_served_would_make_it_wait(
    folder: Path, rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    settings = {"slots": SLOTS}
    async with running_platform(
        folder, broker_url=rabbitmq.url(vhost=rabbit_vhost), worker=settings, dispatcher={"cpu_millis": 8000}
    ) as (_, client):
        first_come = await waits_of_the_urgent(client, urgent=5, other=5)
        by_priority = await waits_of_the_urgent(client, urgent=10, other=2)
    ratio = p95(by_priority) / p95(first_come)
    print(f"p95 wait: {p95(by_priority):.2f} s by priority, {p95(first_come):.2f} s first come: {ratio:.3f}")
    assert ratio <= 0.05
    assert p95(by_priority) < 5
