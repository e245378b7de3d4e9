"""The events of real lives, held against the published schemas: what storage writes is what the documentation promises."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from crucible import contracts as c
from crucible.evaluation import Reason
from crucible.events import DATA, Event, EventType, InProcessBus, Lagged
from crucible.frames import Frame, Kind
from tests.support.capabilities import needs
from tests.support.events import Channels, all_entries, event_log, listening, redis_client
from tests.support.folders import scratch_dir
from tests.support.platform import Client, running_platform
from tests.support.storage import WORKER, running_storage
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.servers.redis import RedisServer

pytestmark = pytest.mark.integration

SCHEMAS = Path(__file__).parents[2] / "docs/schemas/events"


def hold_to_contract(event: dict[str, Any]) -> None:
    kind = EventType(event["type"])
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text())
    jsonschema.validate(event, schema, cls=jsonschema.Draft202012Validator)
    # The schemas allow members that they do not know, for later versions; this version sends none.
    assert set(event) <= set(Event.model_fields)
    assert set(event["data"]) <= set(DATA[kind].model_fields)


async def lives(client: Client) -> list[dict[str, Any]]:
    """Lead evaluations to as many different ends as one machine can show quickly."""

    async def cancelled() -> dict[str, Any]:
        sleeper = await client.submit("import time; time.sleep(600)")

        async def runs() -> bool:
            return bool((await client.get(sleeper["id"]))["state"] == "running")

        await wait_until_async(runs, timeout=30, describe="the sleeper to run")
        await client.http.post(f"/v1/evaluations/{sleeper['id']}/cancel")
        return await client.ended(sleeper["id"])

    ways: list[Awaitable[dict[str, Any]]] = [
        client.run("print('hello')"),
        client.run("import sys; print('x', file=sys.stderr); sys.exit(3)"),
        client.run("1/0"),
        client.run("import os; os.kill(os.getpid(), 11)"),
        client.run("while True: pass", timeout_seconds=1),
        client.run("x = bytearray(10**9)", memory_limit="64Mi"),
        cancelled(),
    ]
    return list(await asyncio.gather(*ways))


async def hear(queue: asyncio.Queue[Event | Lagged], *, steps: int) -> list[Event]:
    """Listen until so many steps were published; what else is heard meanwhile counts too."""
    heard: list[Event] = []

    def enough() -> bool:
        heard.extend(item for _ in range(queue.qsize()) if isinstance(item := queue.get_nowait(), Event))
        return sum(event.type is not EventType.OUTPUT for event in heard) >= steps

    await wait_until_async(enough, timeout=10, describe=f"the relay to publish {steps} steps")
    return heard


async def heard_by_channels(channels: Channels, *, steps: int) -> list[dict[str, Any]]:
    """Listen to Redis until so many steps were said."""

    def enough() -> bool:
        return sum(name != "evaluation:output" for name, _ in channels.said) >= steps

    await wait_until_async(enough, timeout=10, describe=f"the channels to say {steps} steps")
    return [event for _, event in channels.said]


@needs("postgres", "sandbox", "redis")
async def test_every_event_of_every_kind_of_life_keeps_to_its_schema(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    bus = InProcessBus()
    monkeypatch.setattr("crucible.local.platform.InProcessBus", lambda: bus)
    for folder in scratch_dir():
        async with (
            running_platform(folder, redis_url=redis_server.url) as (_, client),
            listening(redis_server.url) as channels,
        ):
            with bus.subscribe(lambda _: True) as queue:
                start = (await client.http.get("/v1/events")).json()["cursor"]
                ended = await lives(client)
                read = {
                    one["id"]: (await client.http.get(f"/v1/evaluations/{one['id']}/events")).json()["events"]
                    for one in ended
                }
                everyone = (await client.http.get("/v1/events", params={"cursor": start, "limit": 500})).json()[
                    "events"
                ]
                published = await hear(queue, steps=sum(map(len, read.values())))
                said = await heard_by_channels(channels, steps=sum(map(len, read.values())))
    for one in ended:
        events = read[one["id"]]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert [event["type"] for event in events] == ["submitted", "queued", "provisioning", "running", one["state"]]
        assert (events[-1]["reason"], events[-1]["data"].get("exit_code")) == (one["reason"], one.get("exit_code"))
        for event in events:
            hold_to_contract(event)
    for event in everyone:
        hold_to_contract(event)
        assert event["cursor"]
    assert len(everyone) == sum(map(len, read.values()))
    for event in published:
        hold_to_contract(json.loads(event.model_dump_json(exclude_none=True)))
    for event in said:
        hold_to_contract(event)
    assert {str(event.type) for event in published} == {event["type"] for event in said}
    assert EventType.OUTPUT in {event.type for event in published}
    for name, events in read.items():
        steps = [event.seq for event in published if event.evaluation_id == name and event.type is not EventType.OUTPUT]
        assert steps == [event["seq"] for event in events], "the bus tells each step, in order"
        told = [Event.model_validate(event) for event in said if event["evaluation_id"] == name]
        assert [event for event in told if event.type is not EventType.OUTPUT] == [
            Event.model_validate(event) for event in events
        ], "so do the channels"


@needs("postgres")
async def test_an_evaluation_that_never_ran_has_events_that_keep_to_their_schemas() -> None:
    for folder in scratch_dir():
        async with running_platform(folder, worker={"slots": 1}) as (_, client):
            blocker = await client.submit("import time; time.sleep(600)", priority=10)
            waits = await client.submit("pass", queue_timeout_seconds=1)
            unwanted = await client.submit("pass")
            await client.http.post(f"/v1/evaluations/{unwanted['id']}/cancel")
            for one, reason in (
                (await client.ended(unwanted["id"]), "cancelled_by_user"),
                (await client.ended(waits["id"]), "queue_wait"),
            ):
                assert one["reason"] == reason
                events = (await client.http.get(f"/v1/evaluations/{one['id']}/events")).json()["events"]
                assert [event["type"] for event in events] == ["submitted", "queued", one["state"]]
                for event in events:
                    hold_to_contract(event)
            await client.http.post(f"/v1/evaluations/{blocker['id']}/cancel")


@needs("postgres", "redis")
async def test_what_is_on_the_stream_and_on_every_channel_keeps_to_the_schemas(redis_server: RedisServer) -> None:
    async with redis_client(redis_server.url) as client:
        await client.flushall()
        async with (
            event_log(redis_server) as log,
            running_storage(event_log=log) as bench,
            listening(redis_server.url) as channels,
        ):
            for reason in (Reason.EXIT_ZERO, Reason.EXCEPTION, Reason.SIGNAL, Reason.WALL_CLOCK, Reason.OOM_KILLED):
                record = await bench.submit()
                await bench.start(record.id, (await bench.claim_one()).attempt)
                await bench.finish(record.id, reason, exception_type="ValueError", signal=9, run_seconds=1.5)
            cancelled = await bench.submit()
            await bench.client.cancel(cancelled.id, c.CancelRequest(actor="ada", reason=Reason.CANCELLED_BY_USER))
            released = await bench.submit()
            claim = await bench.claim_one()
            await bench.client.release(released.id, c.Release(worker=WORKER, attempt=claim.attempt, detail="drain"))
            writes = await bench.claim_one()
            await bench.start(released.id, writes.attempt)
            printed = Frame(Kind.STDOUT, 1, b"hello")
            await bench.client.append_output(released.id, [printed], attempt=writes.attempt, frame=0)
            await bench.finish(released.id, attempt=writes.attempt, collected=True)
            streamed = [json.loads(fields["event"]) for fields in await all_entries(client, bench)]
            await wait_until_async(
                lambda: {name for name, _ in channels.said} == {f"evaluation:{kind}" for kind in EventType},
                timeout=5,
                describe="every channel to have said something",
            )
    for event in streamed:
        hold_to_contract(event)
    assert {event["type"] for event in streamed} == set(EventType) - {EventType.OUTPUT}
    for name, event in channels.said:
        hold_to_contract(event)
        assert name == f"evaluation:{event['type']}"
    assert [event for _, event in channels.said if event["type"] != "output"] == streamed
