"""The reading end for a process that is not storage, such as an API: every instance hears everything from now on.

It gives hints and no history. Whenever something may have been missed (Redis away, the stream lost, trimmed past us) every
subscriber is told `Lagged` and reads the table; while Redis stays away it is told so again and again, so that streams go on at the
pace of these marks.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from crucible import logs
from crucible.events import InProcessBus
from crucible.health import Heartbeat
from crucible.streams.connection import answer, connect, stream_errors
from crucible.streams.contract import HINTS, STREAM, MalformedEntryError, channel, decode
from crucible.streams.errors import StreamError
from crucible.streams.outage import Outage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from pydantic import SecretStr

    from crucible.events import Event, Lagged
    from crucible.health import Health
    from crucible.settings import BrokerSettings

log = logs.get_logger("streams.bus")

_BLOCK_S = 2.0
_BATCH = 500
_PAUSE_S = 1.0
_BEGINNING = "0-0"


class StreamBus:
    """An `EventFeed` from Redis. Use `start` before serving and `aclose` at the end."""

    def __init__(self, redis_url: SecretStr | str, settings: BrokerSettings) -> None:
        self._redis = connect(redis_url, settings)
        self._local = InProcessBus()
        self._outage = Outage("bus")
        self._task: asyncio.Task[None] | None = None
        # The entry read last; `_anchored` says that it was there once, so that its absence means something.
        self._place = _BEGINNING
        self._anchored = False
        self.heartbeat = Heartbeat(30.0)

    def subscribe(self, wants: Callable[[Event], bool]) -> AbstractContextManager[asyncio.Queue[Event | Lagged]]:
        """Return a context manager giving a queue of the events for which `wants` is true, and of `Lagged`."""
        return self._local.subscribe(wants)

    def watch(self, health: Health) -> None:
        """Register what tells whether it still turns. A Redis that is away is none of it: readers go on from the table."""
        health.add("events", self.heartbeat.check)

    async def start(self) -> None:
        """Begin to listen; a Redis that is away is waited for meanwhile."""
        self._task = asyncio.create_task(self._run(), name="stream-bus")

    async def aclose(self) -> None:
        """Stop listening. Harmless when repeated."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._redis.aclose()

    async def _run(self) -> None:
        while True:
            self.heartbeat.beat()
            try:
                await self._session()
            except StreamError as error:
                self._outage.failed(error)
            except Exception:
                log.exception("listening to events failed and begins again")
                await asyncio.sleep(_PAUSE_S)
            self._local.lag()
            await asyncio.sleep(self._outage.seconds_left)

    async def _session(self) -> None:
        """Listen until something fails."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._hear_hints())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- the stream

    async def _read(self) -> None:
        with stream_errors():
            await self._check_place()
            self._outage.ended()
            # Also where nothing of the stream was missed: what is only said on channels was.
            self._local.lag()
            while True:
                self.heartbeat.beat()
                found = await answer(
                    self._redis.xread({STREAM: self._place}, count=_BATCH, block=int(_BLOCK_S * 1000)),
                    block_seconds=_BLOCK_S,
                )
                self._outage.ended()
                entries = found[0][1] if found else []
                if len(entries) in (0, _BATCH) and await self._check_place():
                    continue
                for entry_id, fields in entries:
                    self._place, self._anchored = entry_id, True
                    self._pass_on(fields)

    async def _check_place(self) -> bool:
        """Go to the stream's end if the place is gone from it, tell everyone, and return whether it was so.

        The place is gone where more was trimmed than was read, and where Redis lost its data; then ids may even begin anew.
        """
        if self._anchored and await answer(self._redis.xrange(STREAM, self._place, self._place, count=1)):
            return False
        end = await answer(self._redis.xrevrange(STREAM, count=1))
        was, self._place = (self._place, self._anchored), end[0][0] if end else _BEGINNING
        self._anchored = bool(end)
        if was == (self._place, self._anchored):
            return False
        # After the place was taken: what was added before it is in the table already, what comes after it is read here.
        self._local.lag()
        return True

    def _pass_on(self, fields: Mapping[str, str]) -> None:
        try:
            event = decode(fields)
        except MalformedEntryError as error:
            log.warning("an entry of the stream is no event", error=str(error))
            return
        if event is not None:
            self._local.publish(event)

    # -- the channels of what is not in the stream

    async def _hear_hints(self) -> None:
        with stream_errors():
            async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                await answer(pubsub.subscribe(*(channel(kind) for kind in sorted(HINTS))))
                # Redis closing the connection ends it; Redis falling silent is what the reader of the stream notices.
                async for message in pubsub.listen():
                    self._pass_on({"event": message["data"]})
