"""Many at once while what carries them breaks, and very many waiting: nothing is lost, nothing is doubled, nothing grows.

    make test-storm              150 at once; `make test-cluster` runs as many as two processors carry beside everything else

This file is the last of its tier, since it leaves thousands of evaluations behind that wait.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from crucible.evaluation import TERMINAL_STATES
from crucible.names import EVALUATION_NAMESPACE, LEASE_LEADER
from tests.support.capabilities import needs
from tests.support.deployed import WORKER
from tests.support.platform import ReadingAgain, connect
from tests.support.waits import pass_time, wait_for, wait_until, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.cluster import Cluster
    from tests.support.deployed import DeployedPlatform
    from tests.support.platform import Client

AT_ONCE = int(os.environ.get("CRUCIBLE_TEST_AT_ONCE", "20"))
# Long enough that the first still runs when the last has started, on two processors that start one in less than a second.
HOLD_SECONDS = float(AT_ONCE)
# What an evaluation may take besides: its own start, after those of all others, twice.
PATIENCE_SECONDS = 2 * (HOLD_SECONDS + 2 * AT_ONCE) + 120
WAITING = int(os.environ.get("CRUCIBLE_TEST_WAITING", "15000"))
BATCH = 100
SMALLEST = {"memory_limit": "64Mi", "cpu_limit": "250m"}
FAIL_OVER_SECONDS = 15
# Why an attempt may have been void here: each names what this test breaks.
BROKEN = {"node_lost", "preempted", "sandbox_error"}
# What a service may grow by while 15,000 evaluations come in, bytes: caches and buffers, not what waits.
GROWTH_BYTES = 64 * 1024**2

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs("cluster"), pytest.mark.timeout(600 + 6 * AT_ONCE)]


@pytest.fixture
async def client(platform: DeployedPlatform) -> AsyncIterator[Client]:
    transport = ReadingAgain()
    async with connect(platform.url, platform.api_key, transport=transport) as client:
        yield client
    print(f"reads that were repeated: {dict(transport.repeated)}")


def kill(platform: DeployedPlatform, pod: str) -> None:
    """End a Pod at once, as its node's power cut would."""
    platform.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")


def leadership(platform: DeployedPlatform) -> dict[str, Any]:
    """The lease of whoever leads: its holder, since when, and when it was last renewed."""
    return dict(json.loads(platform.kubectl("get", "lease", LEASE_LEADER, "-o", "json"))["spec"])


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


async def submit_all(client: Client, requests: list[dict[str, Any]]) -> list[str]:
    ids = []
    for start in range(0, len(requests), BATCH):
        response = await client.http.post(
            "/v1/evaluations/batch", json={"evaluations": requests[start : start + BATCH]}
        )
        assert response.is_success, response.text
        ids += [item["evaluation"]["id"] for item in response.json()["items"]]
    return ids


async def states(client: Client) -> Counter[str]:
    statistics = (await client.http.get("/v1/statistics")).json()
    return Counter(statistics["by_state"])


def spare_node(platform: DeployedPlatform) -> str:
    """The worker node that may lose its power: the one without the database, of which there is one."""
    (database,) = platform.pods("postgres")
    return next(name for name in ("w1", "w2") if name != database["spec"]["nodeName"])


def lose_the_leader(platform: DeployedPlatform) -> None:
    """Kill the monitor that leads, and see another lead soon enough."""
    last = old = leadership(platform)
    (victim,) = [
        pod["metadata"]["name"]
        for pod in platform.pods("monitor")
        if old["holderIdentity"].startswith(pod["metadata"]["name"])
    ]
    kill(platform, victim)

    def another_leads() -> dict[str, Any] | None:
        nonlocal last
        now = leadership(platform)
        if now.get("holderIdentity") == old["holderIdentity"]:
            last = now
        return None if now.get("holderIdentity") in ("", old["holderIdentity"]) else now

    new = wait_until(another_leads, timeout=90, describe="another monitor to lead")
    assert new is not None
    # By the lease's own times, which do not count how long it takes to ask and to kill on a busy machine.
    took = seconds_between(last["renewTime"], new["acquireTime"])
    print(f"fail-over of the leader took {took:.1f} s from its last sign of life")
    assert took < FAIL_OVER_SECONDS


async def events_of(client: Client, name: str) -> list[dict[str, Any]]:
    return list((await client.http.get(f"/v1/evaluations/{name}/events")).json()["events"])


async def history(client: Client, name: str) -> list[str]:
    """What happened to an evaluation, a line each."""
    events = await events_of(client, name)
    return [f"{event['at']} {event['type']} {event['reason'] or ''} {event['detail'] or ''}" for event in events]


async def ran_again(client: Client, name: str, output: bytes) -> bool:
    """Whether an evaluation took more than one attempt; its history and output must be those of one that ended once."""
    events = await events_of(client, name)
    types = [event["type"] for event in events]
    assert sum(kind in TERMINAL_STATES for kind in types) == 1, types
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert await client.output(name) == output
    void = [event for event in events if event["type"] == "queued" and event["attempt"] > 0]
    assert {event["reason"] for event in void} <= BROKEN | {None}, void
    assert all(event["reason"] or event["detail"] for event in void), "an attempt was given up in silence"
    # Its sandbox was lost, or it never got one. A worker that is lost takes no sandbox with it.
    assert not [event for event in void if "not heard of" in (event["detail"] or "")], void
    return bool(void)


async def test_many_at_once_lose_a_dispatcher_the_leader_and_a_node_and_none_is_lost_or_doubled(
    cluster: Cluster, platform: DeployedPlatform, client: Client
) -> None:
    before = await states(client)
    lost_node = spare_node(platform)

    async def ended() -> int:
        now = await states(client)
        return sum(now[state] - before[state] for state in TERMINAL_STATES)

    most_running = 0

    async def until_started(count: int) -> None:
        async def so_many() -> bool:
            nonlocal most_running
            running = (await states(client))["running"]
            most_running = max(most_running, running)
            return running + await ended() >= count

        await wait_until_async(
            so_many, timeout=PATIENCE_SECONDS, poll=0.5, describe=f"{count} evaluations to have started"
        )

    def jobs() -> int:
        return len(cluster.kubectl("get", "jobs", "-n", EVALUATION_NAMESPACE, "-o", "name").splitlines())

    with platform.slots(AT_ONCE):
        ids = await submit_all(
            client,
            [
                {
                    "code": f"import time; time.sleep({HOLD_SECONDS}); print('mark {number}')",
                    "timeout_seconds": 600,
                    **SMALLEST,
                }
                for number in range(AT_ONCE)
            ],
        )
        # In the middle of creating: some Jobs are there, more are to come.
        wait_until(lambda: jobs() >= AT_ONCE // 10, timeout=60, describe="the first Jobs")
        kill(platform, platform.pods("dispatcher")[0]["metadata"]["name"])

        await until_started(AT_ONCE // 3)
        lose_the_leader(platform)

        await until_started(AT_ONCE)
        print(f"{most_running} of {AT_ONCE} ran at one moment")
        cluster.node(lost_node).power_cut()
        try:
            # Until Kubernetes has noticed, and what ran there is known to be lost.
            wait_until(lambda: not ready(cluster, lost_node), timeout=60, describe=f"{lost_node} to be missed")
        finally:
            cluster.node(lost_node).revive()
        results = await wait_for(client, ids, simple=True, seconds=PATIENCE_SECONDS)

    unwell = [name for name, result in zip(ids, results, strict=True) if result.status != "completed"]
    for name in unwell:
        # pytest cuts what an assertion says, and this is what one needs to know why.
        print(name, *await history(client, name), sep="\n    ")
    assert not unwell
    again = [await ran_again(client, name, f"mark {number}\n".encode()) for number, name in enumerate(ids)]
    print(f"{sum(again)} of {AT_ONCE} ran again, each saying why")
    wait_until(lambda: jobs() == 0, timeout=90, poll=0.5, describe="every Job to be cleaned up")


def ready(cluster: Cluster, node: str) -> bool:
    path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    return cluster.kubectl("get", "node", node, "-o", path) == "True"


def memory(platform: DeployedPlatform) -> dict[str, int]:
    """Resident memory of each service's process, bytes."""
    read = "print(next(line.split()[1] for line in open('/proc/1/status') if line.startswith('VmRSS')))"
    found = {}
    for component in ("api", "storage", "dispatcher"):
        for pod in platform.pods(component):
            name = pod["metadata"]["name"]
            found[name] = int(platform.kubectl("exec", name, "--", "python3", "-c", read)) * 1024
    return found


async def test_15_000_waiting_are_waiting_in_the_queue_and_nowhere_else(
    cluster: Cluster, platform: DeployedPlatform, client: Client
) -> None:
    slot_count = 8

    def evaluation_pods() -> Counter[str]:
        said = cluster.kubectl("get", "pods", "-n", EVALUATION_NAMESPACE, "-o", "jsonpath={.items[*].status.phase}")
        return Counter(said.split())

    with platform.slots(slot_count):
        held = await submit_all(
            client,
            [{"code": "import time; time.sleep(900)", "timeout_seconds": 900, "priority": 10, **SMALLEST}] * slot_count,
        )

        async def all_run() -> bool:
            return {(await client.get(name))["state"] for name in held} == {"running"}

        await wait_until_async(all_run, timeout=120, poll=0.5, describe="every slot to be held")
        at_first = memory(platform)
        most: Counter[str] = Counter()
        filling = asyncio.create_task(
            submit_all(client, [{"code": "print(1)", "priority": number % 10, **SMALLEST} for number in range(WAITING)])
        )
        while not filling.done():
            now = await asyncio.to_thread(evaluation_pods)
            most = Counter({phase: max(most[phase], now[phase]) for phase in {*most, *now}})
            await pass_time(0.5)
        waiting = await filling
        assert len(set(waiting)) == WAITING
        at_last = memory(platform)
        # Ended, so that what waits does not begin to run when this test is over.
        platform.kubectl("scale", WORKER, "--replicas=0")

    assert sum(most.values()) <= slot_count, most
    assert (await states(client))["queued"] >= WAITING - slot_count
    grown = {name: at_last[name] - size for name, size in at_first.items() if name in at_last}
    assert set(grown) == set(at_first), "a service was restarted while evaluations came in"
    print({name: f"{size / 1024**2:+.0f} MiB" for name, size in grown.items()})
    assert max(grown.values()) <= GROWTH_BYTES, grown
