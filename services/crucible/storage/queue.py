"""The queue's side of storage: claims in strict order, leases, and what can be said about what waits.

The table is the queue. Within a size class the order is effective priority, then order of submission; `FOR UPDATE SKIP LOCKED`
lets many claim at once without ever taking the same row. Whoever claims holds the row under a lease and an attempt number that
is never used again, so that a holder that was given up for lost cannot speak for it any more.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from crucible import logs, metrics
from crucible.contracts import (
    Claim,
    ClaimAnswer,
    ClaimList,
    LeaseAnswer,
    QueueBand,
    QueuePosition,
    QueueReport,
    Sustained,
)
from crucible.evaluation import State
from crucible.limits import PRIORITY_MAX, PRIORITY_MIN, SizeClass
from crucible.problems import ProblemError
from crucible.storage.engine import changed, timed
from crucible.storage.records import evaluation_spec
from crucible.storage.tables import DUE, HELD, QUEUED
from crucible.storage.transitions import NOW, NULL, Chosen, Sql, Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.contracts import ClaimOne, ClaimRequest, LeaseRenewal, Sustaining
    from crucible.storage.bell import Bell
    from crucible.storage.engine import Database, Row
    from crucible.storage.transitions import Lifecycle

log = logs.get_logger("storage.queue")

# A waiting claim looks again this often even if no bell rang.
_POLL_S = 2.0
_MOST_PER_CLAIM = 500
AGING_LOCK = "hashtextextended('crucible.aging', 0)"

# One row per size class, wanted or not: with arrays the planner would guess their length and plan each claim anew, which costs
# more than the claim. The shared lock makes a claim wait for an aging pass, whose row locks it would otherwise skip over.
_CLAIMABLE = f"(queue_deadline IS NULL OR queue_deadline > now()) AND {DUE}"
_WANTED = ", ".join(f"('{size}', ${place}::int)" for place, size in enumerate(SizeClass, 1))
_NEXT = f"""
SELECT q.id, q.seq
  FROM (SELECT pg_advisory_xact_lock_shared({AGING_LOCK}) OFFSET 0) AS fence,
       (VALUES {_WANTED}) AS w(size_class, wanted)
 CROSS JOIN LATERAL (
       SELECT id, seq FROM evaluations
        WHERE {QUEUED} AND size_class = w.size_class AND {_CLAIMABLE}
        ORDER BY effective_priority DESC, number LIMIT w.wanted
          FOR NO KEY UPDATE SKIP LOCKED) AS q"""  # noqa: S608 - constants

# Whoever was told of an evaluation waits for its row: what holds it (an aging pass, a mark) does not make the message void.
_ONE = f"SELECT id, seq FROM evaluations WHERE id = $1 AND {QUEUED} AND {_CLAIMABLE} FOR NO KEY UPDATE"  # noqa: S608 - constants
# The claim that this same asking has led to already, with a whole lease again.
_SAME = f"""
WITH same AS (
    UPDATE evaluations SET lease_until = clock_timestamp() + make_interval(secs => $4)
     WHERE id = $1 AND claim_key = $2 AND worker = $3 AND {HELD} RETURNING *)
SELECT s.*, p.code, p.stdin FROM same AS s JOIN payloads AS p ON p.evaluation_id = s.id"""  # noqa: S608 - constants
_STANDING = f"SELECT state, {QUEUED} AND {_CLAIMABLE} AS claimable FROM evaluations WHERE id = $1"  # noqa: S608 - constants
_TRIES = 20

_RENEW = f"""
WITH held AS (SELECT * FROM unnest($1::text[], $2::int[]) AS h(id, attempt)),
renewed AS (
    UPDATE evaluations AS e SET lease_until = clock_timestamp() + make_interval(secs => $4)
      FROM held AS h WHERE e.id = h.id AND e.attempt = h.attempt AND e.worker = $3 AND {HELD}
 RETURNING e.id, e.cancel_reason IS NOT NULL AS cancelled
)
SELECT h.id, r.cancelled,
       r.id IS NULL AND NOT EXISTS (
           SELECT FROM evaluations AS e WHERE e.id = h.id AND e.attempt = h.attempt AND e.finished_at IS NOT NULL) AS lost
  FROM held AS h LEFT JOIN renewed AS r ON r.id = h.id"""  # noqa: S608 - constants

# Half a lease without a word from its worker. Where a cancel was asked for nobody may be left to carry it out: that lease may end.
_SUSTAIN = f"""
UPDATE evaluations AS e SET lease_until = clock_timestamp() + make_interval(secs => $3)
  FROM unnest($1::text[], $2::int[]) AS h(id, attempt)
 WHERE e.id = h.id AND e.attempt = h.attempt AND {HELD} AND e.cancel_reason IS NULL
   AND e.lease_until < clock_timestamp() + make_interval(secs => $3 / 2)"""  # noqa: S608 - constants

_BANDS = f"""
SELECT size_class, effective_priority, count(*) AS waiting,
       extract(epoch FROM now() - min(queued_at))::float8 AS oldest_seconds
  FROM evaluations WHERE {QUEUED} GROUP BY 1, 2 ORDER BY 1, 2 DESC"""  # noqa: S608 - constants

_RUNNING = f"SELECT size_class, count(*) AS held FROM evaluations WHERE {HELD} GROUP BY 1"  # noqa: S608 - constants

_RECENT = 500
_MEAN_HOLD = f"""
SELECT size_class, avg(extract(epoch FROM finished_at - provisioning_at))::float8 AS seconds
  FROM (SELECT size_class, finished_at, provisioning_at FROM evaluations
         WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT {_RECENT}) AS recent
 WHERE provisioning_at IS NOT NULL GROUP BY 1"""  # noqa: S608 - constants

_AHEAD = f"""
SELECT (SELECT count(*) FROM evaluations
         WHERE {QUEUED} AND size_class = $1 AND effective_priority > $2)
     + (SELECT count(*) FROM evaluations
         WHERE {QUEUED} AND size_class = $1 AND effective_priority = $2 AND number < $3)"""  # noqa: S608 - constants

# What a row forgets when its holder lets go of it.
UNHELD = {
    "worker": NULL,
    "instance": NULL,
    "lease_until": NULL,
    "sandbox": NULL,
    "provisioning_at": NULL,
    "started_at": NULL,
    "claim_key": NULL,
    # Whatever message there was has done its work.
    "hint_priority": NULL,
    "hint_broker": NULL,
    "hinted_at": NULL,
    "retry_at": NULL,
}


def _claimed_by(worker: str) -> list[Step]:
    return [Step(State.PROVISIONING, actor=worker, data={"worker": worker})]


class Queue:
    """Hands out work and keeps the leases."""

    def __init__(
        self,
        database: Database,
        lifecycle: Lifecycle,
        bell: Bell,
        give_back: Callable[[str, int, str], Awaitable[object]],
        *,
        instance: str,
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._lifecycle = lifecycle
        self._bell = bell
        self._give_back = give_back
        self._instance = instance
        self._lease_seconds = lease_seconds
        self._returning: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def aclose(self) -> None:
        """Answer every waiting claim with what there is, and finish giving back what could not be delivered."""
        self._closing.set()
        self._bell.ring_here(SizeClass)
        await asyncio.gather(*self._returning, return_exceptions=True)

    async def claim(self, request: ClaimRequest) -> ClaimList:
        """Take up to `wanted` evaluations per size class, waiting for the first if there is none.

        If the caller goes away while the claim is being made, what was claimed goes back to the queue.
        """
        wanted = {size: min(count, _MOST_PER_CLAIM) for size, count in request.wanted.items() if count > 0}
        if not wanted:
            return ClaimList(claims=[])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.wait_seconds
        while True:
            # The ear goes to the bell before the look at the table: what comes in between is not missed.
            with self._bell.listen(wanted) as rung:
                claims = await self._undisturbed(request.worker, wanted)
                left = deadline - loop.time()
                if claims or left <= 0 or self._closing.is_set():
                    return ClaimList(claims=claims)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _POLL_S)):
                        await rung.wait()

    async def _undisturbed(self, worker: str, wanted: dict[SizeClass, int]) -> list[Claim]:
        taking = asyncio.ensure_future(self._take(worker, wanted))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            returning = asyncio.create_task(self._return_all(taking))
            self._returning.add(returning)
            returning.add_done_callback(self._returning.discard)
            raise

    async def _return_all(self, taking: asyncio.Future[list[Claim]]) -> None:
        try:
            claims = await taking
            for claim in claims:
                await self._give_back(claim.evaluation_id, claim.attempt, "the worker that asked for it had gone")
        except ProblemError as error:
            # The lease will end and bring them back.
            log.warning("claims that nobody waits for could not be given back", error=error.detail)

    @timed("claim")
    async def _take(self, worker: str, wanted: dict[SizeClass, int]) -> list[Claim]:
        rows = await self._lifecycle.move(
            Chosen(State.QUEUED, _NEXT, tuple(wanted.get(size, 0) for size in SizeClass)),
            _claimed_by(worker),
            self._held_by(worker),
            payload=True,
        )
        return [self._claim(row) for row in rows]

    @timed("claim_one")
    async def claim_one(self, evaluation_id: str, request: ClaimOne) -> ClaimAnswer:
        """Take one evaluation that the caller was told of, if it waits. The same key gives the same claim while it is held.

        Raises:
            ProblemError: `unavailable`, its row changes faster than it can be read.
        """
        for _ in range(_TRIES):
            rows = await self._lifecycle.move(
                Chosen(State.QUEUED, _ONE, (evaluation_id,)),
                _claimed_by(request.worker),
                {**self._held_by(request.worker), "claim_key": request.key},
                payload=True,
            )
            if rows:
                return ClaimAnswer(claim=self._claim(rows[0]))
            same = await self._database.fetchrow(
                _SAME, evaluation_id, request.key, request.worker, float(self._lease_seconds)
            )
            if same is not None:
                return ClaimAnswer(claim=self._claim(same))
            standing = await self._database.fetchrow(_STANDING, evaluation_id)
            # It may have come back to the queue while the statement above waited for its row.
            if standing is None or not standing["claimable"]:
                return ClaimAnswer(state=State(standing["state"]) if standing else None)
        raise ProblemError("unavailable", f"{evaluation_id} changes faster than it can be read", retry_after=1)

    def _held_by(self, worker: str) -> dict[str, object]:
        return {
            "attempt": Sql("e.attempt + 1"),
            "worker": worker,
            "instance": self._instance,
            "provisioning_at": NOW,
            "lease_until": Sql(f"picked.at + make_interval(secs => {float(self._lease_seconds)!r})"),
            "retry_at": NULL,
        }

    def _claim(self, row: Row) -> Claim:
        return Claim(
            evaluation_id=row["id"],
            attempt=row["attempt"],
            owner=row["owner"],
            spec=evaluation_spec(row),
            lease_seconds=self._lease_seconds,
            traceparent=row["traceparent"],
        )

    @timed("renew")
    async def renew(self, renewal: LeaseRenewal) -> LeaseAnswer:
        """Renew a worker's leases. What has ended as the worker's own is neither cancelled nor lost."""
        if not renewal.held:
            return LeaseAnswer()
        rows = await self._database.fetch(
            _RENEW,
            [held.evaluation_id for held in renewal.held],
            [held.attempt for held in renewal.held],
            renewal.worker,
            float(self._lease_seconds),
        )
        return LeaseAnswer(
            cancelled=[row["id"] for row in rows if row["cancelled"]], lost=[row["id"] for row in rows if row["lost"]]
        )

    @timed("sustain")
    async def sustain(self, sustaining: Sustaining) -> Sustained:
        """Keep the leases of attempts that are watched where they run, and whose workers may be gone.

        What has a sandbox in a cluster needs no worker any more: whoever watches it records its end.
        """
        ids = [held.evaluation_id for held in sustaining.watched]
        attempts = [held.attempt for held in sustaining.watched]
        seconds = float(self._lease_seconds)
        done = await self._database.execute(_SUSTAIN, ids, attempts, seconds) if ids else "UPDATE 0"
        return Sustained(leases=changed(done), lease_seconds=seconds)

    @timed("queue_report")
    async def report(self) -> QueueReport:
        """Say what waits, by size class and by the priority that the queue orders by."""
        async with self._database.connection() as connection:
            bands = await connection.fetch(_BANDS)
            running = await connection.fetch(_RUNNING)
        return QueueReport(
            bands=[
                QueueBand(
                    size_class=row["size_class"],
                    priority=row["effective_priority"],
                    waiting=row["waiting"],
                    oldest_seconds=max(0.0, row["oldest_seconds"]),
                )
                for row in bands
            ],
            running={SizeClass(row["size_class"]): row["held"] for row in running},
            mean_hold_seconds=await self._mean_hold(),
        )

    async def gauge(self) -> None:
        """Feed the metrics of what waits; a band that has emptied shows 0."""
        bands = {(row["size_class"], row["effective_priority"]): row for row in await self._database.fetch(_BANDS)}
        for size in SizeClass:
            rows = [bands.get((size, priority)) for priority in range(PRIORITY_MIN, PRIORITY_MAX + 1)]
            for priority, row in enumerate(rows, PRIORITY_MIN):
                metrics.QUEUE_DEPTH.labels(size, priority).set(row["waiting"] if row else 0)
                metrics.QUEUE_OLDEST.labels(size, priority).set(max(0.0, row["oldest_seconds"]) if row else 0.0)

    async def _mean_hold(self) -> dict[SizeClass, float]:
        rows = await self._database.fetch(_MEAN_HOLD)
        return {SizeClass(row["size_class"]): row["seconds"] for row in rows}

    @timed("position")
    async def position(self, evaluation_id: str) -> QueuePosition:
        """Say how many of its size class are ahead of an evaluation.

        Raises:
            ProblemError: `not-found`.
        """
        row = await self._database.fetchrow(
            "SELECT state, size_class, effective_priority, number FROM evaluations WHERE id = $1", evaluation_id
        )
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        size = SizeClass(row["size_class"])
        position = 0
        if row["state"] == State.QUEUED:
            ahead = await self._database.fetchval(_AHEAD, size, row["effective_priority"], row["number"])
            position = ahead + 1
        mean = (await self._mean_hold()).get(size)
        return QueuePosition(position=position, size_class=size, mean_hold_seconds=mean)
