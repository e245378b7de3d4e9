"""Events through a real Redis: in order and at least once, through its loss and its consumers' deaths; never in anyone's way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crucible import contracts as c
from crucible import metrics
from crucible.api.app import Api, make_api_app
from crucible.auth import make_key
from crucible.cli.exit_codes import ExitCode
from crucible.clients import DispatcherClient, http_client
from crucible.evaluation import Reason
from crucible.events import Event, EventType, Lagged
from crucible.frames import Frame, Kind
from crucible.settings import BrokerSettings, EventSettings, Settings, SettingsError
from crucible.streams.bus import StreamBus
from crucible.streams.composition import make_bus, make_event_log
from crucible.streams.connection import connect
from crucible.streams.consumer import EventConsumer
from crucible.streams.contract import DEAD_ENTRY, DEAD_STREAM, ENTRY, STREAM
from crucible.streams.errors import StreamError, StreamFailure
from crucible.streams.log import EventLog
from tests.support.capabilities import needs
from tests.support.event_stream import open_stream
from tests.support.events import Table, all_streamed, consuming, entries, event_log, listening, redis_client, streamed
from tests.support.fake_storage import TOKEN, FakePlatform
from tests.support.folders import scratch_dir
from tests.support.postgres import fresh_database
from tests.support.storage import Bench, new_evaluation, running_storage, storage_over
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from crucible.streams.connection import Client
    from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.integration, needs("postgres", "redis")]

STEPS = 5
DOCS = Path(__file__).parents[2] / "docs"


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Client]:
    """A client of an empty Redis."""
    async with redis_client(redis_server.url) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def bench(redis_server: RedisServer, redis: Client) -> AsyncIterator[Bench]:
    """Storage whose events go to Redis."""
    async with event_log(redis_server) as log, running_storage(event_log=log) as bench:
        yield bench


async def lead_lives(bench: Bench, count: int) -> list[str]:
    return [(await bench.run_one()).id for _ in range(count)]


async def bus_heard(bench: Bench, ids: list[str], count: int = STEPS, *, timeout: float = 5) -> None:  # noqa: ASYNC109
    def complete() -> bool:
        told = Counter(event.evaluation_id for event in bench.heard)
        return all(told[each] >= count for each in ids)

    await wait_until_async(complete, timeout=timeout, describe="the bus of the process to hear every event")


def frame(payload: bytes) -> Frame:
    return Frame(Kind.STDOUT, 1, payload)


def seqs(events: list[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        found.setdefault(event.evaluation_id, []).append(event.seq)
    return found


# -- the relay


async def test_every_event_is_on_the_stream_in_order_and_said_on_the_channel_of_its_type(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    async with listening(redis_server.url) as channels:
        ids = await lead_lives(bench, 6)
        timed_out = await bench.run_one(Reason.WALL_CLOCK)
        found = await all_streamed(redis, bench)
        for each in (*ids, timed_out.id):
            assert [event for event in found if event.evaluation_id == each] == await bench.events(each)
        await wait_until_async(
            lambda: len(channels.said) == len(found), timeout=5, describe="the channels to say it all"
        )
    texts = [fields["event"] for fields in await entries(redis)]
    assert [message for _, message in channels.said] == [json.loads(text) for text in texts]
    assert all(name == f"evaluation:{message['type']}" for name, message in channels.said)
    assert [message["evaluation_id"] for message in channels.of("timeout")] == [timed_out.id]
    assert len(channels.of("completed")) == len(ids)
    for fields in await entries(redis):
        event = json.loads(fields["event"])
        assert set(fields) == set(ENTRY)
        assert (fields["type"], fields["evaluation_id"], fields["seq"]) == (
            event["type"],
            event["evaluation_id"],
            str(event["seq"]),
        )


async def test_events_of_many_writers_at_once_are_on_the_stream_in_order_per_evaluation(
    bench: Bench, redis: Client
) -> None:
    items = [new_evaluation() for _ in range(60)]
    await bench.submit_many(items)

    async def work() -> None:
        for claim in await bench.claim(6):
            await bench.start(claim.evaluation_id)
            await bench.finish(claim.evaluation_id)

    await asyncio.gather(*(work() for _ in range(12)))
    found = seqs(await all_streamed(redis, bench))
    assert found == {item.id: [1, 2, 3, 4, 5] for item in items}


async def test_output_is_hinted_on_its_channel_and_kept_out_of_the_stream(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    async with listening(redis_server.url) as channels:
        record = await bench.submit()
        claim = await bench.claim_one()
        await bench.start(record.id)
        await bench.client.append_output(record.id, [frame(b"hello")], attempt=claim.attempt, frame=0)
        await wait_until_async(lambda: channels.of("output"), timeout=5, describe="the channel to hint at output")
    assert channels.of("output")[0]["data"]["stdout_bytes"] == 5
    assert EventType.OUTPUT not in {event.type for event in await all_streamed(redis, bench)}


async def test_what_a_relay_left_behind_the_next_one_hands_over(redis_server: RedisServer, redis: Client) -> None:
    async with fresh_database() as url:
        for folder in scratch_dir():
            redis_server.kill()
            async with event_log(redis_server) as log, storage_over(url, folder, event_log=log) as before:
                ids = await lead_lives(before, 3)
                await bus_heard(before, ids)
            redis_server.start()
            async with event_log(redis_server) as log, storage_over(url, folder, event_log=log) as after:
                ids += await lead_lives(after, 2)
                found = seqs(await all_streamed(redis, after))
                assert found == {each: [1, 2, 3, 4, 5] for each in ids}
                # The first process' listeners heard the first three; nobody new has anything to learn from them.
                assert {event.evaluation_id for event in after.heard} == set(ids[3:])


async def test_a_redis_that_is_away_delays_nothing_and_what_waits_for_it_is_told_once_here(
    bench: Bench, redis: Client, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = await lead_lives(bench, 1)
    await all_streamed(redis, bench)
    redis_server.kill()
    began = time.monotonic()
    ids = await lead_lives(bench, 5)
    assert time.monotonic() - began < 4, "submissions, claims and ends do not wait for Redis"
    await bus_heard(bench, ids, timeout=2)

    await wait_until_async(
        lambda: sample("storage_outbox_oldest_seconds") > 1, timeout=5, describe="the outbox to show its age"
    )
    assert sample("event_stream_up", part="relay") == 0
    redis_server.start()
    found = seqs(await all_streamed(redis, bench))
    assert found == {each: [1, 2, 3, 4, 5] for each in first + ids}
    assert set(Counter((event.evaluation_id, event.seq) for event in bench.heard).values()) == {1}
    await wait_until_async(
        lambda: sample("storage_outbox_oldest_seconds") == 0,
        timeout=5,
        describe="the outbox to be empty for all to see",
    )
    assert sample("event_stream_up", part="relay") == 1
    assert "".join(capsys.readouterr()).count("Redis does not serve events") == 1


async def test_a_redis_that_hangs_does_not_hold_up_the_bus(bench: Bench, redis: Client) -> None:
    await lead_lives(bench, 1)
    await all_streamed(redis, bench)
    await redis.execute_command("CLIENT", "PAUSE", "4000", "ALL")
    began = time.monotonic()
    ids = await lead_lives(bench, 3)
    await bus_heard(bench, ids, timeout=3)
    assert time.monotonic() - began < 3
    found = await all_streamed(redis, bench)
    assert {each: seqs(found)[each] for each in ids} == {each: [1, 2, 3, 4, 5] for each in ids}
    assert set(Counter((event.evaluation_id, event.seq) for event in bench.heard).values()) == {1}


async def test_a_redis_that_comes_back_with_its_data_is_not_told_again(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    rebuilt = sample("event_stream_rebuilt_total")
    ids = await lead_lives(bench, 3)
    await all_streamed(redis, bench)
    redis_server.restart()
    ids += await lead_lives(bench, 2)
    found = seqs(await all_streamed(redis, bench))
    assert found == {each: [1, 2, 3, 4, 5] for each in ids}
    assert sample("event_stream_rebuilt_total") == rebuilt


@pytest.mark.parametrize("way", ["restarted empty", "flushed", "fallen back", "emptied while storage was down"])
async def test_a_stream_that_redis_lost_is_filled_again_from_the_table(
    redis_server: RedisServer, redis: Client, way: str, tmp_path: Path
) -> None:
    rebuilt = sample("event_stream_rebuilt_total")
    async with fresh_database() as url:
        folder = tmp_path
        async with event_log(redis_server) as log, storage_over(url, folder, event_log=log) as bench:
            ids = await lead_lives(bench, 4)
            await all_streamed(redis, bench)
            heard = len(bench.heard)
            match way:
                case "restarted empty":
                    redis_server.wipe()
                case "flushed":
                    await redis.flushall()
                case "fallen back":
                    for entry_id, _ in (await redis.xrange(STREAM))[7:]:
                        await redis.xdel(STREAM, entry_id)
            if way != "emptied while storage was down":
                # Nothing new happens: the relay finds out by itself.
                await wait_until_async(
                    lambda: sample("event_stream_rebuilt_total") > rebuilt, timeout=8, describe="the loss to be noticed"
                )
                found = seqs(await all_streamed(redis, bench))
                assert {each: sorted(set(found[each])) for each in ids} == {each: [1, 2, 3, 4, 5] for each in ids}
                assert len(bench.heard) == heard, "the bus of the process lost nothing and hears nothing again"
        if way == "emptied while storage was down":
            await redis.flushall()
        async with event_log(redis_server) as log, storage_over(url, folder, event_log=log) as bench:
            ids += await lead_lives(bench, 1)
            await wait_until_async(
                lambda: sample("event_stream_rebuilt_total") > rebuilt, timeout=8, describe="the loss to be noticed"
            )
            found = seqs(await all_streamed(redis, bench))
            assert {each: sorted(set(found[each])) for each in ids} == {each: [1, 2, 3, 4, 5] for each in ids}
    assert sample("event_stream_rebuilt_total") == rebuilt + 1


async def test_nothing_new_is_added_to_a_stream_that_was_lost_a_moment_ago(
    redis_server: RedisServer, redis: Client
) -> None:
    async with running_storage() as bench:
        told = await bench.events((await bench.run_one()).id)
    async with event_log(redis_server) as log:
        assert await log.append(told[:3])
        assert not await log.has_lost(None)
        await redis.flushall()
        assert not await log.append(told[3:])
        assert await streamed(redis) == []
        log.forget()
        assert await log.append(told)
        assert await streamed(redis) == told


async def test_the_stream_is_trimmed_by_length_and_that_is_no_loss(redis_server: RedisServer, redis: Client) -> None:
    rebuilt = sample("event_stream_rebuilt_total")
    async with event_log(redis_server, stream_length=1000) as log, running_storage(event_log=log) as bench:
        for _ in range(2):
            await bench.submit_many([new_evaluation() for _ in range(1000)])
        await all_streamed(redis, bench)
        # Whole nodes of the stream go at a time, 100 entries by default.
        assert 1000 <= await redis.xlen(STREAM) <= 1200
        last = await bench.submit()
        assert (await all_streamed(redis, bench))[-1].evaluation_id == last.id
    assert sample("event_stream_rebuilt_total") == rebuilt


# -- consumers of a group


async def test_what_a_dead_consumer_held_is_claimed_by_another_within_the_idle_time(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    ids = await lead_lives(bench, 4)
    await all_streamed(redis, bench)
    holds = asyncio.Event()
    done: list[Event] = []

    async def die_at_the_third(item: Event | Lagged) -> None:
        if isinstance(item, Event):
            if len(done) == 2:
                holds.set()
                await asyncio.Event().wait()
            done.append(item)

    table = Table(bench)
    redelivered = sample("event_redelivered_total", group="test")
    async with consuming(redis_server, die_at_the_third, name="mortal", claim_idle_seconds=2.0) as mortal:
        await asyncio.wait_for(holds.wait(), 5)
        mortal.cancel()
        async with consuming(redis_server, table.take, name="heir"):
            died = time.monotonic()
            await wait_until_async(
                lambda: len(table.events) >= 4 * STEPS - 2, timeout=8, describe="the heir to have what was left"
            )
            assert time.monotonic() - died < 5
    assert seqs(done + table.events) == {each: [1, 2, 3, 4, 5] for each in ids}
    assert sample("event_redelivered_total", group="test") - redelivered == 4 * STEPS - 2
    assert [group["pending"] for group in await redis.xinfo_groups(STREAM)] == [0]


async def test_an_event_that_cannot_be_handled_is_given_up_after_some_deliveries_and_blocks_nothing(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    poison, fine = await lead_lives(bench, 2)
    told = json.loads((await all_streamed(redis, bench))[0].model_dump_json())
    await redis.xadd(STREAM, {"event": '{"not": "an event"}'})
    await redis.xadd(STREAM, {"event": json.dumps(told | {"type": "invented"}), "type": "invented"})
    handled: list[Event] = []
    dead = sample("event_dead_total", group="test")

    async def choke(item: Event | Lagged) -> None:
        if isinstance(item, Event):
            if item.evaluation_id == poison and item.type is EventType.RUNNING:
                raise ValueError("cannot digest this")
            handled.append(item)

    async with consuming(redis_server, choke, claim_idle_seconds=0.2, max_deliveries=3):
        await wait_until_async(
            lambda: sample("event_dead_total", group="test") == dead + 2, timeout=8, describe="both to be given up"
        )
    assert seqs(handled) == {poison: [1, 2, 3, 5], fine: [1, 2, 3, 4, 5]}
    letters = {fields["deliveries"]: fields for _, fields in await redis.xrange(DEAD_STREAM)}
    assert all(set(fields) == set(DEAD_ENTRY) for fields in letters.values())
    assert Event.model_validate_json(letters["3"]["event"]).evaluation_id == poison
    assert letters["3"]["error"] == "ValueError: cannot digest this"
    assert letters["1"]["event"] == '{"not": "an event"}'
    assert [group["pending"] for group in await redis.xinfo_groups(STREAM)] == [0]


async def test_a_table_kept_from_events_converges_though_redis_loses_them_under_way(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    table = Table(bench)
    async with consuming(redis_server, table.take):
        for storm in (redis.flushall, None, None):
            await lead_lives(bench, 2)
            if storm is not None:
                await storm()
            else:
                redis_server.wipe()
            await bench.submit()
            await bench.finish((await bench.claim_one()).evaluation_id, Reason.EXCEPTION)

        async def same() -> bool:
            truth = await bench.sql("SELECT id, state FROM evaluations")
            return table.states == {row["id"]: row["state"] for row in truth}

        await wait_until_async(same, timeout=15, describe="the table to be what storage says")
        assert table.lags >= 2
        # The stream itself is whole again too: a group that begins now gets everything.
        await all_streamed(redis, bench)
        late: list[Event] = []

        async def whole() -> bool:
            late[:] = await streamed(redis)
            return {each: sorted(set(found)) for each, found in seqs(late).items()} == {
                row["id"]: list(range(1, row["seq"] + 1)) for row in await bench.sql("SELECT id, seq FROM evaluations")
            }

        await wait_until_async(whole, timeout=15, describe="the stream to be whole")


async def test_repetitions_are_dropped_and_what_comes_late_is_counted(redis_server: RedisServer, redis: Client) -> None:
    async with running_storage() as bench:
        record = await bench.run_one()
        told = await bench.events(record.id)
    table = Table(bench)
    redelivered, late = (
        sample("event_redelivered_total", group="test"),
        sample("event_out_of_order_total", group="test"),
    )
    async with event_log(redis_server) as log, consuming(redis_server, table.take):
        await log.append([told[0], told[1], told[0], told[3], told[2], told[3], told[4]])
        await wait_until_async(lambda: len(table.events) == STEPS, timeout=5, describe="all to be handled")
    assert [event.seq for event in table.events] == [1, 2, 4, 3, 5]
    assert sample("event_redelivered_total", group="test") - redelivered == 2
    assert sample("event_out_of_order_total", group="test") - late == 1


async def test_a_group_that_is_overtaken_by_the_trimming_is_told(redis_server: RedisServer, redis: Client) -> None:
    async with event_log(redis_server, stream_length=1000) as log, running_storage(event_log=log) as bench:
        table = Table(bench)
        await bench.submit()
        await all_streamed(redis, bench)
        async with consuming(redis_server, table.take, name="early"):
            await wait_until_async(lambda: len(table.events) == 2, timeout=5, describe="the consumer to begin")
        lags = table.lags
        await bench.submit_many([new_evaluation() for _ in range(1000)])
        await all_streamed(redis, bench)
        async with consuming(redis_server, table.take, name="late"):
            await wait_until_async(lambda: len(table.events) > 1000, timeout=8, describe="the consumer to catch up")
        assert table.lags == lags + 1
        assert len(table.states) == 1001
        await wait_until_async(
            lambda: sample("event_stream_entries") >= 1000, timeout=8, describe="the length to be measured"
        )


# -- an API in another process than storage


@asynccontextmanager
async def api_over(bench: Bench, bus: StreamBus) -> AsyncIterator[tuple[FastAPI, str, Api]]:
    """An API that hears of events through Redis alone."""
    fake = FakePlatform()
    key, key_id, digest = make_key()
    await bench.client.add_key(
        c.NewApiKey(key_id=key_id, owner="ada", role=c.Role.SUBMITTER, name="test", secret_sha256=digest)
    )
    async with http_client(fake.dispatcher_app, TOKEN) as dispatcher:
        api = Api(Settings(), bench.client, DispatcherClient(dispatcher), bus)
        await bus.start()
        await api.start()
        bus.watch(api.health)
        try:
            yield make_api_app(api), key, api
        finally:
            await api.aclose()
            await bus.aclose()


async def test_an_api_that_hears_through_redis_misses_no_end_while_redis_comes_and_goes(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    async with api_over(bench, StreamBus(redis_server.url, BrokerSettings())) as (app, key, api):
        headers = [("Authorization", f"Bearer {key}"), ("Accept", "text/event-stream")]

        async def ends_while(disturb: Any) -> float:
            """Follow an evaluation to its end, which comes after the disturbance; return how late the follower heard of it."""
            record = await bench.submit()
            async with open_stream(app, f"/v1/evaluations/{record.id}/events", headers) as stream:
                assert (await stream.event()).data["type"] == "submitted"  # type: ignore[union-attr]
                polled = asyncio.create_task(api.wait_ended(await bench.client.get(record.id), 30))
                await disturb()
                claim = await bench.claim_one()
                await bench.start(record.id, claim.attempt)
                await bench.finish(record.id, attempt=claim.attempt)
                ended = time.monotonic()
                rest = [event.data["type"] for event in await stream.rest()]
                late = time.monotonic() - ended
                assert rest == ["queued", "provisioning", "running", "completed"]
                assert (await asyncio.wait_for(polled, 5)).state.terminal
                return late

        async def nothing() -> None:
            pass

        async def killed() -> None:
            redis_server.kill()

        async def back() -> None:
            redis_server.start()

        async def wiped() -> None:
            await asyncio.to_thread(redis_server.wipe)

        await wait_until_async(
            lambda: sample("event_stream_up", part="bus") == 1, timeout=5, describe="the bus to listen"
        )
        assert await ends_while(nothing) < 2
        # By themselves streams look at the table every 15 s; the marks that Redis is away, at most 3 s apart, make them look now.
        assert await ends_while(killed) < 6
        assert await ends_while(back) < 6
        assert await ends_while(wiped) < 6
        await wait_until_async(
            lambda: sample("event_stream_up", part="bus") == 1, timeout=5, describe="the bus to listen"
        )
        await all_streamed(redis, bench)
        assert await ends_while(nothing) < 2
        assert api.health.problems() == {}


async def test_an_api_hears_of_output_through_redis(bench: Bench, redis: Client, redis_server: RedisServer) -> None:
    bus = StreamBus(redis_server.url, BrokerSettings())
    await bus.start()
    try:
        with bus.subscribe(lambda event: event.type is EventType.OUTPUT) as queue:
            assert isinstance(await asyncio.wait_for(queue.get(), 5), Lagged)
            record = await bench.submit()
            claim = await bench.claim_one()
            await bench.start(record.id)
            # A subscription takes effect when Redis has it, so the first words may be lost.
            batch = 0

            async def heard() -> bool:
                nonlocal batch
                await bench.client.append_output(record.id, [frame(b"x")], attempt=claim.attempt, frame=batch)
                batch += 1
                return any(isinstance(queue.get_nowait(), Event) for _ in range(queue.qsize()))

            await wait_until_async(heard, timeout=5, describe="the API to hear of output")
    finally:
        await bus.aclose()


async def test_a_feed_whose_place_was_trimmed_away_says_so_and_goes_on(
    redis_server: RedisServer, redis: Client
) -> None:
    async with running_storage() as bench:
        told = await bench.events((await bench.run_one()).id)
    bus = StreamBus(redis_server.url, BrokerSettings())
    async with event_log(redis_server) as log:
        await log.append(told[:2])
        await bus.start()
        try:
            with bus.subscribe(lambda _: True) as queue:
                assert isinstance(await asyncio.wait_for(queue.get(), 5), Lagged)
                # Another Redis by this name, whose clock is behind: what it adds has lower ids than what was read.
                await redis.delete(STREAM)
                await redis.xadd(STREAM, {"event": told[2].model_dump_json()}, id="5-1")
                assert isinstance(await asyncio.wait_for(queue.get(), 5), Lagged)
                await redis.xadd(STREAM, {"event": told[3].model_dump_json()}, id="5-2")
                assert await asyncio.wait_for(queue.get(), 5) == told[3]
        finally:
            await bus.aclose()


# -- the way to Redis


async def test_events_travel_over_tls_and_each_mistake_on_the_way_has_its_name() -> None:
    from tests.servers.certificates import Authority
    from tests.servers.redis import RedisServer

    authority, stranger = Authority(), Authority()
    for folder in scratch_dir():
        strange = stranger.issue_into(folder / "strange", "127.0.0.1")
        with RedisServer(folder / "redis", tls=authority) as server:
            trusted = BrokerSettings(ca_file=folder / "redis" / "certificates" / "authority.pem")
            port = server.port

            async def failure(url: str, settings: BrokerSettings) -> StreamFailure:
                log = EventLog(url, EventSettings(), settings)
                try:
                    with pytest.raises(StreamError) as caught:
                        await log.measure()
                finally:
                    await log.aclose()
                assert server.password not in f"{caught.value} {caught.value.hint}"
                return caught.value.reason

            log = EventLog(server.url, EventSettings(), trusted)
            async with running_storage(event_log=log) as bench:
                client = connect(server.url, trusted)
                assert len(await all_streamed(client, bench)) == 0
                await bench.run_one()
                assert len(await all_streamed(client, bench)) == STEPS
                await client.aclose()
            await log.aclose()
            assert await failure(server.url, BrokerSettings(ca_file=strange.authority)) is StreamFailure.TLS
            assert await failure(server.url, BrokerSettings()) is StreamFailure.TLS
            assert await failure(f"redis://127.0.0.1:{port}", trusted) in (StreamFailure.UNREACHABLE, StreamFailure.TLS)
            assert await failure(f"rediss://:wrong@127.0.0.1:{port}", trusted) is StreamFailure.CREDENTIALS
            assert await failure(f"rediss://127.0.0.1:{port}", trusted) is StreamFailure.CREDENTIALS
        assert await failure(server.url, trusted) is StreamFailure.UNREACHABLE


async def test_users_with_no_more_than_the_documentation_gives_them_can_do_their_part(
    redis_server: RedisServer, redis: Client
) -> None:
    lines = re.findall(r"^ACL (SETUSER .*)$", (DOCS / "events.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        await redis.execute_command("ACL", *line.replace("PASSWORD", "secret").split())

    def url(user: str) -> str:
        return f"redis://{user}:secret@127.0.0.1:{redis_server.port}"

    bus = StreamBus(url("api"), BrokerSettings())
    log = EventLog(url("storage"), EventSettings(), BrokerSettings())
    consumer = EventConsumer(
        url("consumer"), EventSettings(claim_idle_seconds=0.2), BrokerSettings(), group="g", name="n", max_deliveries=1
    )
    handled: list[Event] = []

    async def take(item: Event | Lagged) -> None:
        if isinstance(item, Event):
            if not handled:
                handled.append(item)
                raise ValueError("the first is given up, which needs rights of its own")
            handled.append(item)

    try:
        async with running_storage(event_log=log) as bench:
            await bus.start()
            with bus.subscribe(lambda event: event.state.terminal) as queue:
                await asyncio.wait_for(queue.get(), 5)
                await bench.run_one()
                assert isinstance(await asyncio.wait_for(queue.get(), 5), Event)
            await asyncio.wait_for(consumer.run(take, limit=STEPS - 1), 5)
            assert sample("event_stream_up", part="bus") == sample("event_stream_up", part="relay") == 1
    finally:
        await consumer.aclose()
        await bus.aclose()
        await log.aclose()
    assert len(handled) == STEPS
    assert await redis.xinfo_consumers(STREAM, "g") == []


def test_settings_decide_what_there_is() -> None:
    assert make_event_log(Settings()) is None
    assert make_bus(Settings()) is None
    with pytest.raises(SettingsError, match="CRUCIBLE_REDIS_URL"):
        make_event_log(Settings(redis_url="http://somewhere"))  # type: ignore[arg-type]


# -- the command


async def test_the_command_prints_every_event_once_and_goes_on_where_it_left(
    bench: Bench, redis: Client, redis_server: RedisServer
) -> None:
    ids = await lead_lives(bench, 2)
    found = await all_streamed(redis, bench)
    command = [sys.executable, "-m", "crucible.cli.main", "events", "consume", "--group", "forward"]
    environment = os.environ | {"CRUCIBLE_REDIS_URL": redis_server.url, "CRUCIBLE_EVENTS__CLAIM_IDLE_SECONDS": "0.5"}
    printed: list[dict[str, Any]] = []
    for count in (4, 6):
        process = await asyncio.create_subprocess_exec(
            *command, "--count", str(count), env=environment, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0
        printed += [json.loads(line) for line in out.decode().splitlines()]
    assert [Event.model_validate(each) for each in printed] == found
    assert {each["evaluation_id"] for each in printed} == set(ids)
    assert [group["consumers"] for group in await redis.xinfo_groups(STREAM)] == [0], "who leaves takes its name along"

    # Whoever reads it goes away: so does the command, and what was not read by anyone is not acknowledged.
    record = await bench.submit()
    await all_streamed(redis, bench)
    read, write = os.pipe()
    os.close(read)
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=write)
    os.close(write)
    assert await asyncio.wait_for(process.wait(), 20) == ExitCode.READER_GONE
    process = await asyncio.create_subprocess_exec(
        *command, "--count", "2", env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert [json.loads(line)["evaluation_id"] for line in out.decode().splitlines()] == [record.id] * 2
