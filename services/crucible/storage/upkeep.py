"""What storage does by itself: age what waits, end what waited too long, take back what was lost, delete what is old.

Each pass is a function that may run at any time, on any number of instances at once; the loops only call them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from crucible import logs
from crucible.contracts import CleanupRequest, CleanupResult, OwnerUsage, StorageUsage
from crucible.evaluation import Reason, State
from crucible.health import Heartbeat
from crucible.limits import PRIORITY_MAX
from crucible.storage.engine import changed, timed
from crucible.storage.loops import every
from crucible.storage.output import EMPTY_SHA256
from crucible.storage.queue import AGING_LOCK
from crucible.storage.tables import HELD, QUEUED
from crucible.storage.transitions import NOW, Chosen, Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.settings import StorageSettings
    from crucible.storage.attempts import Attempts
    from crucible.storage.dead_letters import DeadLetters
    from crucible.storage.engine import Connection, Database, Row
    from crucible.storage.objects import ObjectStore
    from crucible.storage.output import Outputs
    from crucible.storage.transitions import Lifecycle

log = logs.get_logger("storage.upkeep")

_CHUNK = 1000
_ACTOR = "storage"

_AGED = f"""
WITH due AS (
    SELECT id, least({PRIORITY_MAX}, priority + floor(extract(epoch FROM now() - queued_at) / $1))::smallint AS aged
      FROM evaluations WHERE {QUEUED} AND effective_priority < {PRIORITY_MAX}
       AND effective_priority < least({PRIORITY_MAX}, priority + floor(extract(epoch FROM now() - queued_at) / $1))
     LIMIT {_CHUNK} FOR NO KEY UPDATE SKIP LOCKED)
UPDATE evaluations AS e SET effective_priority = due.aged FROM due WHERE e.id = due.id AND e.effective_priority < due.aged"""  # noqa: S608 - constants

_WAITED_TOO_LONG = f"""
SELECT id, seq FROM evaluations WHERE {QUEUED} AND queue_deadline <= now()
 ORDER BY queue_deadline LIMIT {_CHUNK} FOR NO KEY UPDATE SKIP LOCKED"""  # noqa: S608 - constants

_EXPIRED = f"SELECT * FROM evaluations WHERE {HELD} AND lease_until < now() ORDER BY lease_until LIMIT {_CHUNK}"  # noqa: S608 - constants
_FOREIGN = f"SELECT * FROM evaluations WHERE {HELD} AND instance IS DISTINCT FROM $1 AND worker IS DISTINCT FROM $1"  # noqa: S608 - constants

_OLD = """
SELECT id FROM evaluations WHERE finished_at < now() - make_interval(secs => $1) ORDER BY finished_at LIMIT $2"""
_OLD_COUNT = "SELECT count(*) FROM evaluations WHERE finished_at < now() - make_interval(secs => $1)"
_DRY = """
SELECT count(DISTINCT c.object_id) AS objects, coalesce(sum(o.size), 0)::bigint AS bytes
  FROM output_chunks AS c JOIN objects AS o ON o.id = c.object_id WHERE c.evaluation_id = ANY($1)"""
_OWNERS = """
SELECT owner, count(*) AS evaluations, sum(stdout_bytes + stderr_bytes)::bigint AS output_bytes,
       coalesce(sum(cpu_seconds), 0)::float8 AS cpu_seconds
  FROM evaluations GROUP BY owner ORDER BY output_bytes DESC, owner"""
_DAY_S = 86_400


class Upkeep:
    """The passes, and the loops that call them."""

    def __init__(
        self,
        *,
        database: Database,
        lifecycle: Lifecycle,
        attempts: Attempts,
        outputs: Outputs,
        objects: ObjectStore,
        dead_letters: DeadLetters,
        settings: StorageSettings,
    ) -> None:
        self._database = database
        self._lifecycle = lifecycle
        self._attempts = attempts
        self._outputs = outputs
        self._objects = objects
        self._dead_letters = dead_letters
        self._settings = settings
        self.heartbeat = Heartbeat(60.0)

    async def run(self) -> None:
        """Do everything when it is due, for ever."""
        settings = self._settings
        loops: dict[str, tuple[float, Callable[[], Awaitable[object]]]] = {
            "leases": (min(1.0, settings.lease_seconds / 4), self._take_back_expired),
            "queue_timeouts": (0.5, self.end_waits),
            "aging": (min(30.0, settings.aging_seconds / 10), self.age),
            "unsettled_output": (20.0, self._outputs.settle),
            "object_garbage": (60.0, self._objects.sweep),
            "dead_letter_gauge": (30.0, self._dead_letters.gauge),
            "retention": (600.0, self._delete_old),
        }
        async with asyncio.TaskGroup() as group:
            for name, (seconds, work) in loops.items():
                group.create_task(every(name, seconds, work))

    # -- the queue

    async def age(self) -> int:
        """Raise what has waited long; nobody waits longer than it takes to reach the highest priority. Returns how many."""
        raised = 0
        while True:
            async with self._database.transaction() as connection:
                # While rows are locked here, a claim would skip them; it waits the moment instead.
                await connection.execute(f"SELECT pg_advisory_xact_lock({AGING_LOCK})")
                done = await connection.execute(_AGED, float(self._settings.aging_seconds))
            count = changed(done)
            raised += count
            if count < _CHUNK:
                return raised

    async def end_waits(self) -> int:
        """End what has waited longer than its request agreed to. Returns how many."""
        detail = "it waited in the queue for as long as its request allowed"
        rows = await self._lifecycle.move(
            Chosen(State.QUEUED, _WAITED_TOO_LONG),
            [Step(State.TIMEOUT, actor=_ACTOR, reason=Reason.QUEUE_WAIT, detail=detail)],
            {
                "reason": Reason.QUEUE_WAIT,
                "detail": detail,
                "finished_at": NOW,
                "stdout_sha256": EMPTY_SHA256,
                "stderr_sha256": EMPTY_SHA256,
            },
        )
        return len(rows)

    # -- what was lost

    async def _take_back_expired(self) -> None:
        self.heartbeat.beat()
        # While the database was away no worker could renew: each gets a whole lease's time to do so first.
        if self._database.answering_for >= self._settings.lease_seconds:
            await self.reclaim_expired()

    async def reclaim_expired(self) -> int:
        """Take back what is held under a lease that has ended. Returns how many."""
        rows = await self._database.fetch(_EXPIRED)
        return await self._lose(rows, "its worker was not heard of for longer than its lease", expired=True)

    async def reclaim_foreign(self, instance: str) -> int:
        """Take back everything that is held by another instance than this one, which for a single machine means a dead one."""
        rows = await self._database.fetch(_FOREIGN, instance)
        taken = await self._lose(rows, "the platform process that held it is gone")
        if taken:
            log.info("evaluations were taken back from a process that is gone", count=taken)
        return taken

    async def _lose(self, rows: list[Row], detail: str, *, expired: bool = False) -> int:
        taken = 0
        for row in rows:
            if await self._attempts.lose(row, Reason.NODE_LOST, detail, _ACTOR, expired=expired) is not None:
                taken += 1
        return taken

    # -- what is old

    async def _delete_old(self) -> None:
        request = CleanupRequest(older_than_days=self._settings.retention_days, limit=_CHUNK)
        while True:
            done = await self.clean(request)
            if done.evaluations == 0 or done.remaining == 0:
                return

    @timed("cleanup")
    async def clean(self, request: CleanupRequest) -> CleanupResult:
        """Delete (or count) evaluations that ended long ago, with their code, events, output and dead letters."""
        seconds = request.older_than_days * _DAY_S
        if request.dry_run:
            ids = [row["id"] for row in await self._database.fetch(_OLD, seconds, request.limit)]
            found = await self._database.fetchrow(_DRY, ids)
            objects, size = (found["objects"], found["bytes"]) if found is not None else (0, 0)
        else:
            async with self._database.transaction() as connection:
                rows = await connection.fetch(f"{_OLD} FOR UPDATE SKIP LOCKED", seconds, request.limit)
                ids = [row["id"] for row in rows]
                objects, size = await self._delete(connection, ids)
            await self._objects.sweep()
        total = await self._database.fetchval(_OLD_COUNT, seconds)
        if ids and not request.dry_run:
            log.info("old evaluations were deleted", evaluations=len(ids), objects=objects, bytes=size)
        return CleanupResult(
            evaluations=len(ids),
            objects=objects,
            bytes=size,
            dry_run=request.dry_run,
            remaining=total - len(ids) if request.dry_run else total,
        )

    async def _delete(self, connection: Connection, ids: list[str]) -> tuple[int, int]:
        await connection.execute("SET LOCAL crucible.retention = 'on'")
        objects, size = await self._outputs.discard(connection, ids)
        for table in ("outbox", "events", "payloads", "dead_letters"):
            await connection.execute(f"DELETE FROM {table} WHERE evaluation_id = ANY($1)", ids)  # noqa: S608 - constants
        await connection.execute("DELETE FROM evaluations WHERE id = ANY($1)", ids)
        return objects, size

    @timed("usage")
    async def usage(self) -> StorageUsage:
        """Report where the bytes are, and whose."""
        async with self._database.connection() as connection:
            database_bytes = await connection.fetchval("SELECT pg_database_size(current_database())")
            inline = await connection.fetchval("SELECT coalesce(sum(inline_bytes), 0)::bigint FROM evaluations")
            owners = await connection.fetch(_OWNERS)
        return StorageUsage(
            primary=self._objects.primary_name,
            database_bytes=database_bytes,
            inline_output_bytes=inline,
            backends=await self._objects.usage(),
            owners=[OwnerUsage(**dict(row)) for row in owners],
        )
