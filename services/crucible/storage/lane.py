"""One broker's lane: publishes the hints that are its share, and finds again what the broker has lost.

One storage instance at a time works a lane, whoever holds its session lock. Everything that speaks to the broker blocks, so it runs in
a thread of its own; the event loop, and with it every request, only ever waits for PostgreSQL.

How what was lost is found, every `reconcile_seconds`:

- **Too few**: the queue holds fewer messages than the table has rows that were told of a while ago (a purged queue, a broker that came
  back empty). As many as are missing, from the front of the queue, are told again, for what is lost singly is lost at the front.
- **Overtaken**: a lower priority of the same class was claimed after a row had been told of; the broker orders strictly, so the
  row's message is gone (a worker that died between acknowledging and claiming).
- **Returned**: the broker gave a message up and the evaluation still waits.

Telling again is harmless, so these may err; they may not flood: a row is told again at most once in two periods, and less and less
often while it keeps waiting.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from crucible import logs, metrics
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import DEAD_QUEUE, queue_name
from crucible.health import Heartbeat
from crucible.limits import SizeClass
from crucible.storage.engine import changed, connect
from crucible.storage.loops import keep_trying
from crucible.storage.returns import ReturnDesk
from crucible.storage.route import ALL, MINE, Role, broker_name
from crucible.storage.tables import DUE, HELD, QUEUED, UNHINTED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import asyncpg

    from crucible.broker.publisher import QueueDepth
    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings
    from crucible.storage.bell import Bell

    Connection = asyncpg.Connection[asyncpg.Record]

log = logs.get_logger("storage.hints")
P = ParamSpec("P")
R = TypeVar("R")

# Hints at a time: many, since confirms are awaited together, and few enough that what is urgent is soon in the next batch.
_BATCH_LEAST, _BATCH_MOST = 50, 500
_BATCH_S = 0.1
# What no bell tells of (a raised priority, the end of a rest) waits this long at most.
_POLL_S = 0.5
_CONFIRM_S = 5.0
# A closed broker is knocked at this often at most; one that needs a person first, less often.
_BACK_OFF_FIRST_S = 0.1
_BACK_OFF_MOST_S = 2.0
_BACK_OFF_MISTAKE_S = 15.0
_FAREWELL_S = 2.0
# In periods: how long a message must have been in the broker before it counts as missed, and the longest pause between two
# messages about one row that keeps being missed.
_GRACE = 2
_GRACE_MOST = 8
# Missing a few may mean that others are missing than those at the front.
_MARGIN = 10
_RETURNS_AT_ONCE = 100
# Also what keeps the connection from falling silent.
_RETURNS_S = 2.0

# A class whose queue refused is left alone for so long, so that what it keeps back does not hold up the other classes.
_REFUSED_S = 1.0

# What was claimed before it could be marked is marked too, for it shows through which broker it came; nothing later is.
_MARK = f"""
UPDATE evaluations AS e SET hint_priority = g.priority, hint_broker = $5, hinted_at = clock_timestamp()
  FROM unnest($1::text[], $2::int[], $3::int[], $4::smallint[]) AS g(id, seq, attempt, priority)
 WHERE e.id = g.id AND ((e.seq = g.seq AND {QUEUED}) OR (e.attempt = g.attempt + 1 AND e.hint_broker IS NULL AND {HELD}))"""  # noqa: S608 - constants

_TOLD = f"{QUEUED} AND hint_priority IS NOT NULL AND hint_broker = $1"
_EXPECTED = f"""
SELECT size_class, count(*) AS told FROM evaluations
 WHERE {_TOLD} AND hinted_at < clock_timestamp() - make_interval(secs => $2) GROUP BY 1"""  # noqa: S608 - constants
# $2 the period, $3 the grace and $4 the longest pause in periods: doubled each time, since a row's pause is as long as it has waited.
_RESTED = """hinted_at < clock_timestamp() - make_interval(
           secs => $2 * least($4::float8, greatest($3::float8, extract(epoch FROM hinted_at - queued_at)::float8 / $2)))"""
_TOO_FEW = f"""
UPDATE evaluations SET hint_priority = NULL WHERE id IN (
    SELECT id FROM evaluations WHERE {_TOLD} AND size_class = $5 AND {_RESTED}
     ORDER BY effective_priority DESC, number LIMIT $6 FOR NO KEY UPDATE SKIP LOCKED)"""  # noqa: S608 - constants
_OVERTAKEN = f"""
WITH claimed AS (
    SELECT size_class, hint_priority, max(provisioning_at) AS latest FROM evaluations
     WHERE {HELD} AND hint_broker = $1 AND hint_priority IS NOT NULL GROUP BY 1, 2)
UPDATE evaluations SET hint_priority = NULL WHERE id IN (
    SELECT id FROM evaluations AS e WHERE {_TOLD} AND {_RESTED} AND EXISTS (
           SELECT FROM claimed AS c WHERE c.size_class = e.size_class AND c.hint_priority < e.hint_priority
              AND c.latest > e.hinted_at + make_interval(secs => $2 * $3))
       FOR NO KEY UPDATE OF e SKIP LOCKED)"""  # noqa: S608 - constants
_RETURNED = f"UPDATE evaluations SET hint_priority = NULL WHERE id = ANY($2) AND {_TOLD}"  # noqa: S608 - constants


def _next(condition: str) -> str:
    return f"""
SELECT id, seq, attempt, size_class, effective_priority, traceparent FROM evaluations
 WHERE {UNHINTED} AND {DUE} AND (queue_deadline IS NULL OR queue_deadline > now())
   AND size_class <> ALL($2::text[]) AND {condition}
 ORDER BY effective_priority DESC, number LIMIT $1"""  # noqa: S608 - constants


def _strays(sole: str) -> str:
    """Return the statement that forgets hints which nobody consumes: of brokers unknown now, and of one that is being left."""
    return f"""
UPDATE evaluations SET hint_priority = NULL
 WHERE {QUEUED} AND hint_priority IS NOT NULL AND hint_broker IS DISTINCT FROM $1 AND (hint_broker <> ALL($2) OR {sole})"""  # noqa: S608 - constants


class Lane:
    """Tells one broker what waits.

    Args:
        role: which of the installation's brokers it is.
        urls: all of them.
        settings: how to speak to brokers.
        database_url: for a session of the lane's own.
        bell: rings when something was queued, here or by another instance.
    """

    def __init__(
        self, role: Role, urls: Mapping[Role, BrokerUrl], settings: BrokerSettings, database_url: str, bell: Bell
    ) -> None:
        url = urls[role]
        self.role = role
        self.url = url
        self.name = broker_name(url)
        self.heartbeat = Heartbeat(60.0)
        self.problem: BrokerError | None = None
        self._known = [broker_name(each) for each in urls.values()]
        self._database_url = database_url
        self._bell = bell
        self._period = settings.reconcile_seconds
        self._publisher = Publisher(url, settings)
        # Redis has no dead letters: what its consumers reject is gone, and found to be missing.
        self._desk = ReturnDesk(url, settings) if url.kind == "rabbitmq" else None
        self._thread = self._new_thread()
        self._next = _next(MINE[role] if len(urls) > 1 else "true")
        self._strays = _strays(ALL[role] if len(urls) > 1 else "true")
        # Redis' order is by priority across its lists only where nothing is fetched ahead: too weak a sign.
        self._strict = url.kind == "rabbitmq"
        self._batch = _BATCH_LEAST
        self._ever = False
        self._said: dict[str, BrokerReason] = {}
        self._wait = _BACK_OFF_FIRST_S
        self._refusing: dict[SizeClass, float] = {}
        self._full: set[SizeClass] = set()
        self._missing: dict[SizeClass, int] = {}
        self._due = self._returns_due = 0.0

    async def run(self) -> None:
        """Publish and look after what was published, for ever."""
        await keep_trying(f"hints to {self.name}", self._session)

    async def aclose(self) -> None:
        """Say farewell to the broker, for as long as that may take; to be called once `run` has ended."""
        # The next one's thread begins with its first use, so that closing twice, or starting again, is no mistake.
        thread, self._thread = self._thread, self._new_thread()
        closing = asyncio.get_running_loop().run_in_executor(thread, self._close)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing, _FAREWELL_S)
        thread.shutdown(wait=False, cancel_futures=True)

    def _new_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix=f"hints-{self.role}")

    def _close(self) -> None:
        self._publisher.close()
        if self._desk is not None:
            self._desk.close()

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call something that speaks to the broker, in the one thread that may."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    # -- what others may ask for

    async def depths(self) -> Mapping[SizeClass, QueueDepth]:
        """Return what each queue holds; raises `BrokerError`."""
        return await self._call(self._publisher.depths)

    async def purge(self) -> int:
        """Empty the queues; raises `BrokerError`."""
        return await self._call(self._publisher.purge)

    async def delete_queues(self) -> None:
        """Delete the queues; raises `BrokerError`."""
        await self._call(self._publisher.delete_queues)

    async def declare(self) -> None:
        """Make sure that the queues are there; raises `BrokerError`."""
        await self._call(self._publisher.declare)

    # -- the loop

    async def _session(self) -> None:
        async with connect(self._database_url) as connection:
            # Losing a mark only makes a hint come twice: no reason to wait for the disk.
            await connection.execute("SET synchronous_commit = off")
            lock = f"crucible.hints {self.name}"
            while not await connection.fetchval("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", lock):
                self.heartbeat.beat()
                await asyncio.sleep(_POLL_S)
            if len(self._known) == 1:
                # Nobody is being left: a later migration begins at its beginning.
                await connection.execute("DELETE FROM broker_route")
            while True:
                self.heartbeat.beat()
                # The ear goes to the bell before the look at the table: what comes in between is not missed.
                with self._bell.listen(SizeClass) as rung:
                    if not await self._turn(connection):
                        with suppress(TimeoutError):
                            async with asyncio.timeout(min(_POLL_S, self._period)):
                                await rung.wait()

    async def _turn(self, connection: Connection) -> bool:
        """Do what is due; True if there is certainly more."""
        try:
            more = await self._publish(connection)
        except BrokerError as error:
            self._refuse("publish", error)
            await self._rest(error)
            return True
        await self._look_after(connection)
        return more

    def _refuse(self, work: str, error: BrokerError) -> None:
        """Say once, until the same work can be done again, what is wrong with the broker."""
        if self._said.get(work) is not error.reason:
            log.warning("the broker cannot be used as it should be", broker=self.name, work=work, error=str(error))
            self._said[work] = error.reason
        if error.passing:
            self.problem = error
            metrics.BROKER_UP.labels(self.name).set(0)

    async def _rest(self, error: BrokerError) -> None:
        self.problem = error
        metrics.BROKER_UP.labels(self.name).set(0)
        most = _BACK_OFF_MOST_S if error.passing else _BACK_OFF_MISTAKE_S
        await asyncio.sleep(min(self._wait, most) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        self._wait = min(self._wait * 2, most)

    def _answered(self, work: str) -> None:
        self._said.pop(work, None)
        if self.problem is not None or not self._ever:
            log.info("the broker answers", broker=self.name)
        self.problem, self._ever, self._wait = None, True, _BACK_OFF_FIRST_S
        metrics.BROKER_UP.labels(self.name).set(1)

    # -- publishing

    async def _publish(self, connection: Connection) -> bool:
        now = asyncio.get_running_loop().time()
        self._refusing = {size: until for size, until in self._refusing.items() if until > now}
        most = self._batch
        rows = await connection.fetch(self._next, most, list(self._refusing))
        if not rows:
            return False
        hints = [
            Hint(row["id"], SizeClass(row["size_class"]), row["effective_priority"], row["traceparent"]) for row in rows
        ]
        confirmed = await self._confirmed(hints)
        told = [row for row, sure in zip(rows, confirmed, strict=True) if sure]
        columns = ([row[name] for row in told] for name in ("id", "seq", "attempt", "effective_priority"))
        await connection.execute(_MARK, *columns, self.name)
        return len(rows) == most

    async def _confirmed(self, hints: list[Hint]) -> list[bool]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            confirmed = await self._call(self._publisher.publish, hints, _CONFIRM_S)
        except BrokerError as error:
            metrics.BROKER_PUBLISHED.labels(self.name, error.reason).inc(len(hints))
            if error.reason is not BrokerReason.FULL:
                raise
            confirmed = [False] * len(hints)
        else:
            took = loop.time() - began
            self._batch = max(_BATCH_LEAST, min(_BATCH_MOST, int(len(hints) * _BATCH_S / took)))
            metrics.BROKER_CONFIRM_SECONDS.labels(self.name).observe(took)
            metrics.BROKER_PUBLISHED.labels(self.name, "confirmed").inc(sum(confirmed))
            metrics.BROKER_PUBLISHED.labels(self.name, "unconfirmed").inc(len(confirmed) - sum(confirmed))
        self._answered("publish")
        refused = {hint.size_class for hint, sure in zip(hints, confirmed, strict=True) if not sure}
        if fresh := refused - self._full:
            log.warning("a queue takes no more hints; they wait in the table", broker=self.name, queues=sorted(fresh))
        self._full = self._full - {hint.size_class for hint in hints} | refused
        self._refusing |= dict.fromkeys(refused, loop.time() + _REFUSED_S)
        return confirmed

    # -- looking after what was published

    async def _look_after(self, connection: Connection) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._returns_due and self._desk is not None:
            self._returns_due = now + min(_RETURNS_S, self._period)
            await self._tried("take back", self._take_back(connection, self._desk))
        if now >= self._due:
            self._due = now + self._period
            await self._tried("count", self._find_missing(connection))

    async def _tried(self, work: str, doing: Awaitable[None]) -> None:
        """Do what may fail without holding up anything: publishing finds out by itself whether it still can."""
        try:
            await doing
        except BrokerError as error:
            self._refuse(work, error)
        else:
            self._answered(work)

    async def _take_back(self, connection: Connection, desk: ReturnDesk) -> None:
        returned, left = await self._call(desk.collect, _RETURNS_AT_ONCE)
        metrics.BROKER_QUEUE_MESSAGES.labels(self.name, DEAD_QUEUE).set(left)
        if not returned:
            return
        ids = [message.evaluation_id for message in returned if message.evaluation_id is not None]
        waiting = changed(await connection.execute(_RETURNED, self.name, ids))
        # Before the acknowledgement: if that is lost they come once more, and change nothing.
        await self._call(desk.settle)
        for message in returned:
            metrics.BROKER_RETURNED.labels(self.name, message.reason).inc()
        metrics.HINTS_REPAIRED.labels("returned").inc(waiting)
        log.warning("the broker gave messages up", broker=self.name, messages=len(returned), still_waiting=waiting)

    async def _find_missing(self, connection: Connection) -> None:
        strays = changed(await connection.execute(self._strays, self.name, self._known))
        metrics.HINTS_REPAIRED.labels("moved").inc(strays)
        # The broker is asked first: what is consumed between the two looks is then missing in neither.
        depths = await self.depths()
        grace = _GRACE * self._period
        told = {row["size_class"]: row["told"] for row in await connection.fetch(_EXPECTED, self.name, grace)}
        args = (self.name, float(self._period), float(_GRACE), float(_GRACE_MOST))
        for size, depth in depths.items():
            metrics.BROKER_QUEUE_MESSAGES.labels(self.name, queue_name(size)).set(depth.ready)
            if depth.consumers is not None:
                metrics.BROKER_CONSUMERS.labels(self.name, queue_name(size)).set(depth.consumers)
            # Two looks in a row: what is on its way from the broker to its claim is missing for a moment only.
            before, self._missing[size] = self._missing.get(size, 0), max(0, told.get(size, 0) - depth.ready)
            if missing := min(before, self._missing[size]):
                again = changed(await connection.execute(_TOO_FEW, *args, size, 2 * missing + _MARGIN))
                self._repaired("missing", again, queue=queue_name(size), missing=missing)
        if self._strict:
            self._repaired("overtaken", changed(await connection.execute(_OVERTAKEN, *args)))

    def _repaired(self, why: str, count: int, **details: object) -> None:
        if count:
            metrics.HINTS_REPAIRED.labels(why).inc(count)
            log.warning("hints are published again", broker=self.name, why=why, count=count, **details)
