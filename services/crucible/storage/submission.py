"""Accepting evaluations: row, payload, first two events and outbox entries in one statement, whether for one or for a hundred.

Two rules must hold however many submissions arrive at once. One `Idempotency-Key` of an owner gives one evaluation: a unique index
decides, and whoever comes second reads the first one's row. And an owner's quota is never exceeded, without making every
submission wait for the one before it; how is told at `_Headroom`.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import orjson

from crucible.contracts import Stored, StoredList, StoredStatus
from crucible.evaluation import State, check_transition
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.records import evaluation_record
from crucible.storage.tables import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crucible.contracts import NewEvaluation, NewEvaluations
    from crucible.limits import SizeClass
    from crucible.storage.engine import Connection, Database, Row

# What the statement below writes in one go: a row that is submitted and at once queued.
check_transition(State.SUBMITTED, State.QUEUED, None)
_FIRST_SEQ = 2

_COLUMNS = {
    "id": "text",
    "owner": "text",
    "priority": "smallint",
    "size_class": "text",
    "cpu_millis": "int",
    "memory_bytes": "bigint",
    "image": "text",
    "labels": "text",
    "timeout_seconds": "int",
    "queue_timeout_seconds": "int",
    "code_sha256": "bytea",
    "idempotency_key": "text",
    "request_sha256": "text",
    "traceparent": "text",
    "replay_of": "text",
    "code": "text",
    "stdin": "text",
}
_ARRAYS = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_COLUMNS.values(), 3))

# $1 the owner whose quota is at stake, $2 the number up to which there is certainly room (NULL: room has been made sure of).
_CREATE = f"""
WITH shared AS MATERIALIZED (
    SELECT pg_advisory_xact_lock_shared(hashtextextended('crucible.quota ' || $1::text, 0))
),
gate AS MATERIALIZED (
    SELECT $2::bigint IS NULL OR coalesce(pg_sequence_last_value('evaluations_number_seq'::regclass), 0) < $2 AS open
      FROM shared
),
given AS (SELECT * FROM unnest({_ARRAYS}) WITH ORDINALITY AS g({", ".join(_COLUMNS)}, n)),
created AS (
    INSERT INTO evaluations (
        id, owner, state, priority, effective_priority, size_class, cpu_millis, memory_bytes, image, labels,
        timeout_seconds, queue_timeout_seconds, queue_deadline, code_sha256, seq,
        idempotency_key, request_sha256, traceparent, replay_of)
    SELECT g.id, g.owner, '{State.QUEUED}', g.priority, g.priority, g.size_class, g.cpu_millis, g.memory_bytes, g.image,
           g.labels::jsonb, g.timeout_seconds, g.queue_timeout_seconds,
           now() + make_interval(secs => g.queue_timeout_seconds), g.code_sha256, {_FIRST_SEQ},
           g.idempotency_key, g.request_sha256, g.traceparent, g.replay_of
      FROM given AS g, gate WHERE gate.open ORDER BY g.n
        ON CONFLICT DO NOTHING
 RETURNING *
),
paid AS (
    INSERT INTO payloads (evaluation_id, code, stdin)
    SELECT g.id, g.code, g.stdin FROM given AS g JOIN created AS c ON c.id = g.id
),
recorded AS (
    INSERT INTO events (evaluation_id, seq, type, at, owner, actor, state, attempt, data)
    SELECT c.id, s.seq, s.state, c.submitted_at, c.owner, s.actor, s.state, 0,
           jsonb_build_object('priority', c.priority, 'size_class', c.size_class)
      FROM created AS c
     CROSS JOIN LATERAL (VALUES (1, '{State.SUBMITTED}', c.owner), ({_FIRST_SEQ}, '{State.QUEUED}', 'storage'))
           AS s(seq, state, actor)
     ORDER BY c.number, s.seq
 RETURNING id, evaluation_id, seq
),
told AS (INSERT INTO outbox (event_id, evaluation_id, seq) SELECT id, evaluation_id, seq FROM recorded)
SELECT gate.open, c.* FROM gate LEFT JOIN created AS c ON true"""  # noqa: S608 - fixed fragments; values are parameters

_FIND = """
SELECT * FROM evaluations
 WHERE id = ANY($1::text[]) OR (owner = ANY($2::text[]) AND idempotency_key = ANY($3::text[]))"""

_COUNT_ACTIVE = f"""
SELECT (SELECT count(*) FROM evaluations WHERE owner = $1 AND {ACTIVE}) AS active,
       coalesce(pg_sequence_last_value('evaluations_number_seq'::regclass), 0) AS number"""  # noqa: S608 - constants

_OWNERS_REMEMBERED = 10_000


class _Headroom:
    """Up to which number of the row sequence an owner certainly stays within a quota, so that nothing needs counting below it.

    Counting an owner's active evaluations for each submission would cost more the more there are, and doing it exactly means
    one submission at a time. So it is counted once, under an exclusive lock on the owner: `active` rows while the sequence
    stands at `number`. Every later row of anyone takes a number of that sequence, so at number n the owner has at most
    `active + n - number` rows. Single submissions hold the owner's lock shared and pass while that bound, plus one row for
    each connection that may be doing the same at this moment, is within the quota. Near the quota, and for batches, the lock is
    taken exclusively (which waits for the shared holders) and the count is exact. Other owners are never waited for.
    """

    def __init__(self) -> None:
        self.concurrent = 0
        self._until: dict[tuple[str, int], int] = {}

    def until(self, owner: str, max_active: int) -> int | None:
        """Return the number below which one more row is certainly within the quota, if that is known."""
        return self._until.get((owner, max_active))

    def learn(self, owner: str, max_active: int, *, active: int, number: int) -> None:
        """Remember an exact count."""
        if len(self._until) >= _OWNERS_REMEMBERED:
            self._until.clear()
        until = number + max_active - active - self.concurrent
        if until > number:
            self._until[owner, max_active] = until
        else:
            self._until.pop((owner, max_active), None)


def _arrays(items: Sequence[NewEvaluation]) -> list[list[object]]:
    rows = [
        (
            item.id,
            item.owner,
            item.spec.priority,
            item.spec.size_class,
            item.spec.resources.cpu_millis,
            item.spec.resources.memory_bytes,
            item.spec.image,
            orjson.dumps(item.spec.labels).decode(),
            item.spec.timeout_seconds,
            item.spec.queue_timeout_seconds,
            hashlib.sha256(item.spec.code.encode()).digest(),
            item.idempotency_key,
            item.request_sha256,
            item.traceparent,
            item.replay_of,
            item.spec.code,
            item.spec.stdin,
        )
        for item in items
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def _distinct(items: Iterable[NewEvaluation]) -> list[NewEvaluation]:
    """Drop what names an evaluation that an earlier item already names; it will be found as existing."""
    seen: set[object] = set()
    kept = []
    for item in items:
        names = {item.id} if item.idempotency_key is None else {item.id, (item.owner, item.idempotency_key)}
        if not names & seen:
            kept.append(item)
        seen |= names
    return kept


class _Known:
    """Evaluations that exist, found by what a submission calls them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_id = {}
        self._by_key = {}
        for row in rows:
            self._by_id[row["id"]] = row
            self._by_key[row["owner"], row["idempotency_key"]] = row

    def of(self, item: NewEvaluation) -> Row | None:
        """Return the row that an item names, if there is one."""
        found = self._by_id.get(item.id)
        if found is None and item.idempotency_key is not None:
            found = self._by_key.get((item.owner, item.idempotency_key))
        return found


class Submissions:
    """Takes in what the API has accepted."""

    def __init__(self, database: Database, queued: Callable[[set[SizeClass]], None]) -> None:
        self._database = database
        self._queued = queued
        self._headroom = _Headroom()
        self._counting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self) -> None:
        """Learn how many connections may submit at once, over all instances."""
        self._headroom.concurrent = int(await self._database.fetchval("SHOW max_connections"))

    @timed("create")
    async def create(self, request: NewEvaluations) -> StoredList:
        """Store all items in one transaction and say what became of each, in their order."""
        if not request.items:
            return StoredList(results=[])
        if len({item.owner for item in request.items}) > 1:
            raise ProblemError("invalid-request", "all evaluations of one call must have one owner")
        created, refused, active = await self._insert(request)
        others = [item for item in request.items if item.id not in created]
        found = await self._database.fetch(_FIND, *_names(others)) if others else []
        known = _Known([*created.values(), *found])
        results, fresh = [], set()
        for item in request.items:
            # An id that comes twice in one call was created by its first mention only.
            if (row := created.pop(item.id, None)) is not None:
                results.append(Stored(status=StoredStatus.CREATED, evaluation=evaluation_record(row)))
                fresh.add(item.spec.size_class)
            elif (row := known.of(item)) is not None:
                same = row["id"] == item.id or row["request_sha256"] == item.request_sha256
                status = StoredStatus.EXISTING if same else StoredStatus.KEY_CONFLICT
                results.append(Stored(status=status, evaluation=evaluation_record(row)))
            elif refused:
                results.append(Stored(status=StoredStatus.OVER_QUOTA, evaluation=None, active=active))
            else:
                # Its Idempotency-Key was taken a moment ago by a row that retention has deleted since; asking again creates it.
                raise ProblemError("unavailable", "an earlier evaluation with this key is being deleted", retry_after=1)
        if fresh:
            self._queued(fresh)
        return StoredList(results=results)

    async def _insert(self, request: NewEvaluations) -> tuple[dict[str, Row], bool, int | None]:
        """Return the rows created by id, whether the quota had no room for some, and how many the owner has under way."""
        items = _distinct(request.items)
        owner = items[0].owner
        if request.max_active is None:
            return await self._create(items, owner, None), False, None
        until = self._headroom.until(owner, request.max_active)
        if until is not None and len(items) == 1:
            async with self._database.connection() as connection:
                rows = await connection.fetch(_CREATE, owner, until, *_arrays(items))
            if rows[0]["open"]:
                return _by_id(rows), False, None
        # One at a time here as well: those who wait for the owner's lock in the database would each hold a connection.
        async with self._counting.setdefault(owner, asyncio.Lock()):
            return await self._insert_counting(items, owner, request.max_active)

    async def _insert_counting(
        self, items: list[NewEvaluation], owner: str, max_active: int
    ) -> tuple[dict[str, Row], bool, int | None]:
        async with self._database.transaction() as connection:
            # A statement of its own: what is counted below must be read after the lock is held.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('crucible.quota ' || $1, 0))", owner
            )
            known = _Known(await connection.fetch(_FIND, *_names(items)))
            (count,) = await connection.fetch(_COUNT_ACTIVE, owner)
            new = [item for item in items if known.of(item) is None]
            room = max(0, max_active - count["active"])
            accepted = new[:room]
            created = await self._create(accepted, owner, connection) if accepted else {}
        active = count["active"] + len(created)
        self._headroom.learn(owner, max_active, active=active, number=count["number"] + len(created))
        return created, len(accepted) < len(new), active

    async def _create(self, items: list[NewEvaluation], owner: str, connection: Connection | None) -> dict[str, Row]:
        args = (owner, None, *_arrays(items))
        if connection is not None:
            return _by_id(await connection.fetch(_CREATE, *args))
        return _by_id(await self._database.fetch(_CREATE, *args))


def _by_id(rows: Iterable[Row]) -> dict[str, Row]:
    return {row["id"]: row for row in rows if row["id"] is not None}


def _names(items: Iterable[NewEvaluation]) -> tuple[list[str], list[str], list[str]]:
    items = list(items)
    keyed = [item for item in items if item.idempotency_key is not None]
    return [item.id for item in items], [item.owner for item in keyed], [str(item.idempotency_key) for item in keyed]
