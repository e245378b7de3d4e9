"""The outbox relay: tells the bus what the table already says.

Events reach the outbox in the transaction that makes them true, and leave it after the bus has taken them: at least once, in order
per evaluation (an evaluation's events are numbered under its row lock, and a later one is never committed before an earlier
one). One relay works at a time, whoever holds the session lock; with a bus that lives in one process, that process must hold it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import asyncpg

from crucible import logs, metrics
from crucible.health import Heartbeat
from crucible.storage.engine import connect
from crucible.storage.loops import keep_trying
from crucible.storage.records import event

if TYPE_CHECKING:
    from crucible.events import EventBus

log = logs.get_logger("storage.relay")

_BATCH = 500
# Rows of another instance, and wake-ups lost with a connection, wait this long at most.
_POLL_S = 1.0
_LOCK = "hashtextextended('crucible.relay', 0)"
_READ = """
SELECT o.event_id, e.* FROM outbox AS o JOIN events AS e ON e.evaluation_id = o.evaluation_id AND e.seq = o.seq
 ORDER BY o.event_id LIMIT $1"""


class Relay:
    """Publishes committed events."""

    def __init__(self, url: str, bus: EventBus) -> None:
        self._url = url
        self._bus = bus
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
            while True:
                self.heartbeat.beat()
                self._woken.clear()
                if await self._publish(connection) < _BATCH:
                    await self._wait()

    async def _publish(self, connection: asyncpg.Connection[asyncpg.Record]) -> int:
        rows = await connection.fetch(_READ, _BATCH)
        if not rows:
            metrics.OUTBOX_LAG.set(0)
            return 0
        metrics.OUTBOX_LAG.set(max(0.0, (datetime.now(UTC) - rows[0]["at"]).total_seconds()))
        for row in rows:
            self._bus.publish(event(row))
            metrics.EVENTS_PUBLISHED.labels(row["type"]).inc()
        await connection.execute("DELETE FROM outbox WHERE event_id = ANY($1)", [row["event_id"] for row in rows])
        return len(rows)

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await self._woken.wait()
