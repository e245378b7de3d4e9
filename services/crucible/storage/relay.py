"""The outbox relay: tells the bus and the event stream what the table already says.

Events reach the outbox in the transaction that makes them true, and leave it after the bus of this process and, where there is
one, the event stream have taken them: at least once, in order per evaluation (an evaluation's events are numbered under its row
lock, and a later one is never committed before an earlier one). One relay works at a time, whoever holds the session lock; with a
bus that lives in one process, that process must hold it.

The bus never waits for Redis: what Redis has not taken is marked as told, and waits in the outbox. What Redis took and lost comes
back into the outbox from the table of events.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import asyncpg

from crucible import logs, metrics
from crucible.health import Heartbeat
from crucible.storage.engine import changed, connect
from crucible.storage.loops import keep_trying
from crucible.storage.records import event
from crucible.streams.errors import StreamError
from crucible.streams.outage import Outage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crucible.events import Event, EventSink
    from crucible.storage.engine import Row
    from crucible.streams.log import EventLog

log = logs.get_logger("storage.relay")

_BATCH = 500
# Rows of another instance, and wake-ups lost with a connection, wait this long at most.
_POLL_S = 1.0
# A Redis that is well takes a batch within it. The bus waits no longer; the answer is collected when it comes.
_PATIENCE_S = 0.1
# How often an idle stream is looked at: whether it still holds what it was given, and how far its readers are.
_LOOK_S = 2.0
_LOCK = "hashtextextended('crucible.relay', 0)"
_JOINED = "FROM outbox AS o JOIN events AS e ON e.evaluation_id = o.evaluation_id AND e.seq = o.seq"
_WAITING = f"SELECT o.event_id, o.told, e.* {_JOINED} ORDER BY o.event_id LIMIT $1"
_UNTOLD = f"SELECT o.event_id, o.told, e.* {_JOINED} WHERE NOT o.told ORDER BY o.event_id LIMIT $1"
_OLDEST = f"SELECT e.at {_JOINED} ORDER BY o.event_id LIMIT 1"
_TOLD = "UPDATE outbox SET told = true WHERE event_id = ANY($1) AND NOT told"
_DONE = "DELETE FROM outbox WHERE event_id = ANY($1)"
# Not EXISTS, which the planner may turn into a join of all with all where it believes the outbox to be empty.
_NEWEST_HANDED_OVER = """
SELECT evaluation_id, seq FROM events AS e WHERE (SELECT o.event_id FROM outbox AS o WHERE o.event_id = e.id) IS NULL
 ORDER BY xact DESC, id DESC LIMIT 1"""
_AGAIN = """
INSERT INTO outbox (event_id, evaluation_id, seq, told)
SELECT id, evaluation_id, seq, true FROM events ORDER BY xact DESC, id DESC LIMIT $1
    ON CONFLICT (event_id) DO NOTHING"""


class Relay:
    """Publishes committed events."""

    def __init__(self, url: str, bus: EventSink, event_log: EventLog | None = None) -> None:
        self._url = url
        self._bus = bus
        self._stream = None if event_log is None else _Stream(event_log, self.wake)
        self._woken = asyncio.Event()
        self.heartbeat = Heartbeat(15.0)

    def wake(self) -> None:
        """Something was committed."""
        self._woken.set()

    async def run(self) -> None:
        """Relay for ever."""
        await keep_trying("relay", self._session)

    async def _session(self) -> None:
        async with connect(self._url) as connection:
            # Losing this deletion only publishes again what was published: no reason to wait for the disk.
            await connection.execute("SET synchronous_commit = off")
            while not await connection.fetchval(f"SELECT pg_try_advisory_lock({_LOCK})"):
                self.heartbeat.beat()
                await asyncio.sleep(_POLL_S)
            if self._stream is None:
                await self._turns(connection, None)
                return
            try:
                await self._turns(connection, self._stream)
            finally:
                await self._stream.leave()

    async def _turns(self, connection: asyncpg.Connection[asyncpg.Record], stream: _Stream | None) -> None:
        while True:
            self.heartbeat.beat()
            self._woken.clear()
            found = await (self._publish(connection) if stream is None else self._hand_over(connection, stream))
            if found < _BATCH:
                await self._wait(_POLL_S if stream is None else stream.pause)

    async def _publish(self, connection: asyncpg.Connection[asyncpg.Record]) -> int:
        rows = await connection.fetch(_WAITING, _BATCH)
        _show_lag(rows[0]["at"] if rows else None)
        if rows:
            self._tell(rows)
            await connection.execute(_DONE, _ids(rows))
        return len(rows)

    async def _hand_over(self, connection: asyncpg.Connection[asyncpg.Record], stream: _Stream) -> int:
        await stream.settle(connection)
        ready = stream.ready
        rows = await connection.fetch(_WAITING if ready else _UNTOLD, _BATCH)
        _show_lag(rows[0]["at"] if rows and ready else await connection.fetchval(_OLDEST))
        new = [row for row in rows if not row["told"]]
        self._tell(new)
        if ready and (rows or stream.unwatched) and await stream.take(connection, rows):
            await stream.settle(connection)
        elif new:
            await connection.execute(_TOLD, _ids(new))
        return len(rows)

    def _tell(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._bus.publish(event(row))
            metrics.EVENTS_PUBLISHED.labels(row["type"]).inc()

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()


def _show_lag(oldest: datetime | None) -> None:
    age = 0.0 if oldest is None else (datetime.now(UTC) - oldest).total_seconds()
    metrics.OUTBOX_LAG.set(max(0.0, age))


def _ids(rows: Sequence[Row]) -> list[int]:
    return [row["event_id"] for row in rows]


class _Stream:
    """The hand-over to Redis, one batch at a time: started, waited for a moment, and settled whenever its answer comes."""

    def __init__(self, event_log: EventLog, wake: Callable[[], None]) -> None:
        self._log = event_log
        self._wake = wake
        self._outage = Outage("relay")
        self._giving: asyncio.Task[bool] | None = None
        self._given: list[int] = []
        self._looked = 0.0
        # The stream is being filled again: what it should hold is known only once the first of it is there.
        self._refilling = False

    @property
    def ready(self) -> bool:
        """Whether a batch may be given now."""
        return self._giving is None and self._outage.seconds_left == 0

    @property
    def unwatched(self) -> bool:
        """Whether it is time to look at the stream, though there is nothing to give."""
        return time.monotonic() - self._looked >= _LOOK_S

    @property
    def pause(self) -> float:
        """How long nothing but a commit is worth looking at the outbox for."""
        return min(_POLL_S, self._outage.seconds_left or _POLL_S)

    async def take(self, connection: asyncpg.Connection[asyncpg.Record], rows: Sequence[Row]) -> bool:
        """Give a batch, which may be empty, and return whether the answer is there; `settle` says what follows from it."""
        newest = None
        if not self._log.placed and not self._refilling:
            row = await connection.fetchrow(_NEWEST_HANDED_OVER)
            newest = None if row is None else (row["evaluation_id"], row["seq"])
        self._given = _ids(rows)
        self._giving = asyncio.create_task(self._give([event(row) for row in rows], newest), name="event-log")
        done, _ = await asyncio.wait({self._giving}, timeout=_PATIENCE_S)
        if not done:
            self._giving.add_done_callback(lambda _: self._wake())
        return bool(done)

    async def _give(self, events: list[Event], newest: tuple[str, int] | None) -> bool:
        """Return False if the stream has lost what it was given before, and was given nothing now."""
        if (not events or not self._log.placed) and await self._log.has_lost(newest):
            return False
        if events and not await self._log.append(events):
            return False
        if self.unwatched:
            self._looked = time.monotonic()
            await self._log.measure()
        return True

    async def settle(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Do what the answer asks for, if there is one: the batch is done with, waits on, or others join it in the outbox."""
        if self._giving is None or not self._giving.done():
            return
        giving, self._giving = self._giving, None
        try:
            whole = giving.result()
        except StreamError as error:
            self._outage.failed(error)
            await connection.execute(_TOLD, self._given)
            return
        self._outage.ended()
        if not whole:
            await self._refill(connection)
        elif self._given:
            self._refilling = False
            await connection.execute(_DONE, self._given)

    async def _refill(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._log.forget()
        self._refilling = True
        # Also what was given now and the bus has heard: it is in the outbox still.
        await connection.execute(_TOLD, self._given)
        done = await connection.execute(_AGAIN, self._log.length)
        metrics.EVENT_STREAM_REBUILT.inc()
        self._wake()
        log.warning("Redis lost events; the stream is filled again from the table", events=changed(done))

    async def leave(self) -> None:
        """Give up what is under way: another relay may be the next to add to the stream."""
        if self._giving is not None:
            giving, self._giving = self._giving, None
            giving.cancel()
            with suppress(asyncio.CancelledError, StreamError):
                await giving
        self._log.forget()
        self._refilling = False
