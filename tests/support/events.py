"""Events through a real Redis in tests: what is on the stream, what was said on the channels, and consumers to look at."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from crucible.events import Event, Lagged
from crucible.settings import BrokerSettings, EventSettings
from crucible.streams.connection import Client, connect
from crucible.streams.consumer import EventConsumer
from crucible.streams.contract import CHANNEL_PREFIX, STREAM
from crucible.streams.log import EventLog
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.servers.redis import RedisServer
    from tests.support.storage import Bench


@asynccontextmanager
async def redis_client(url: str) -> AsyncIterator[Client]:
    """Open a client of the test's own."""
    client = connect(url, BrokerSettings())
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def event_log(server: RedisServer, **settings: Any) -> AsyncIterator[EventLog]:
    """Open the writing end of the stream."""
    log = EventLog(server.url, EventSettings(**settings), BrokerSettings())
    try:
        yield log
    finally:
        await log.aclose()


async def entries(client: Client) -> list[dict[str, str]]:
    """Read the fields of every entry of the stream, oldest first."""
    return [fields for _, fields in await client.xrange(STREAM)]


async def streamed(client: Client) -> list[Event]:
    """Read every event of the stream, oldest first."""
    return [Event.model_validate_json(fields["event"]) for fields in await entries(client)]


async def all_entries(client: Client, bench: Bench) -> list[dict[str, str]]:
    """Wait until the relay has nothing left to do, and return the fields of what the stream holds."""

    async def empty() -> bool:
        return not await bench.sql("SELECT FROM outbox LIMIT 1")

    _: bool = await wait_until_async(empty, timeout=15, describe="the outbox to be empty")
    return await entries(client)


async def all_streamed(client: Client, bench: Bench) -> list[Event]:
    """Wait until the relay has nothing left to do, and return the events that the stream holds."""
    await all_entries(client, bench)
    return await streamed(client)


class Channels:
    """What was said on the channels, as JSON, by channel."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return what was said on the channel of one type."""
        return [message for name, message in self.said if name == f"{CHANNEL_PREFIX}{kind}"]


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[Channels]:
    """Listen to every channel of events, as any client of Redis can."""
    heard = Channels()
    async with redis_client(url) as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.psubscribe(f"{CHANNEL_PREFIX}*")
        # The answer to the subscription: from here on nothing is missed.
        await pubsub.get_message(ignore_subscribe_messages=False, timeout=5)

        async def listen() -> None:
            async for message in pubsub.listen():
                heard.said.append((message["channel"], json.loads(message["data"])))

        task = asyncio.create_task(listen())
        try:
            yield heard
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Table:
    """A consumer that keeps a table of states from events, and reads the truth where it may have missed some."""

    def __init__(self, bench: Bench) -> None:
        self.states: dict[str, str] = {}
        self.events: list[Event] = []
        self.lags = 0
        self._seqs: dict[str, int] = {}
        self._bench = bench

    async def take(self, item: Event | Lagged) -> None:
        """Take note of an event."""
        if isinstance(item, Lagged):
            self.lags += 1
            for row in await self._bench.sql("SELECT id, state, seq FROM evaluations"):
                self._note(row["id"], row["state"], row["seq"])
            return
        self.events.append(item)
        self._note(item.evaluation_id, item.state, item.seq)

    def _note(self, evaluation_id: str, state: str, seq: int) -> None:
        if seq > self._seqs.get(evaluation_id, 0):
            self._seqs[evaluation_id] = seq
            self.states[evaluation_id] = str(state)


@asynccontextmanager
async def consuming(
    server: RedisServer, take: Callable[[Event | Lagged], Awaitable[None]], *, name: str = "one", **settings: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer of the group `test`; its task may be cancelled, which is a death: it leaves what it holds."""
    options = {"max_deliveries": settings.pop("max_deliveries")} if "max_deliveries" in settings else {}
    consumer = EventConsumer(
        server.url,
        EventSettings(**{"claim_idle_seconds": 1.0} | settings),
        BrokerSettings(),
        group="test",
        name=name,
        **options,
    )
    task = asyncio.create_task(consumer.run(take))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await consumer.aclose()
