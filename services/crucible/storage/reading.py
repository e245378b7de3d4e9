"""Reading back: single evaluations, filtered lists, events, statistics.

Lists filter in the database before they page, and page by position (the last row's submission time and number) and not by
count, so that a deep page costs what the first one does and nothing is shown twice or skipped when rows come in. Cursors are opaque to
callers; one that was not made here is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import literal, select, tuple_
from sqlalchemy.dialects.postgresql import JSONB

from crucible.contracts import EvaluationPage, EvaluationRecord, EventList, HeldAttempt, HeldPage, Payload, Statistics
from crucible.evaluation import Reason, State, Violation, terminal_state_of
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.records import evaluation_record, event
from crucible.storage.tables import HELD, evaluations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select

    from crucible.storage.engine import Database, Row

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CURSOR = re.compile(r"(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})")
PAGE_MOST = 1000

# Rows below the oldest open transaction: no row that is committed later can sort before them.
_STREAM = """
SELECT * FROM events
 WHERE (xact, id) > ($1::text::xid8, $2::bigint) AND xact < pg_snapshot_xmin(pg_current_snapshot())
   AND ($3::text IS NULL OR owner = $3)
 ORDER BY xact, id LIMIT $4"""
# The index of what is held has as many entries as there are slots, so that sorting them costs nothing.
_HELD_PAGE = f"""
SELECT id, attempt, state, started_at, provisioning_at FROM evaluations WHERE {HELD} AND id > $1 ORDER BY id LIMIT $2"""  # noqa: S608 - constants
_HORIZON = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text"


def make_cursor(first: int, second: int) -> str:
    """Return an opaque cursor for two non-negative numbers."""
    return base64.urlsafe_b64encode(f"{first}.{second}".encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[int, int]:
    """Return the numbers of a cursor.

    Raises:
        ProblemError: `invalid-request`, it was not made by `make_cursor`.
    """
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if not _CURSOR.fullmatch(text):
        refused = Violation(
            field="cursor",
            message="is not a cursor of this list",
            value=ascii(cursor)[:80],
            accepted="the next_cursor of an earlier page, as it came",
        )
        raise ProblemError("invalid-request", "the cursor is not one of this list", violations=[refused])
    first, second = text.split(".")
    return int(first), int(second)


def _label_filter(labels: Sequence[str]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for label in labels:
        key, separator, value = label.partition("=")
        if not separator or not key:
            refused = Violation(
                field="label",
                message="is not key=value",
                value=ascii(label)[:80],
                accepted="key=value, such as team=red",
            )
            raise ProblemError("invalid-request", "a label filter is not key=value", violations=[refused])
        wanted[key] = value
    return wanted


def _micros(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


class Reading:
    """Everything that only reads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @timed("get")
    async def get(self, evaluation_id: str) -> EvaluationRecord:
        """Return one evaluation.

        Raises:
            ProblemError: `not-found`.
        """
        row = await self._database.fetchrow("SELECT * FROM evaluations WHERE id = $1", evaluation_id)
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        return evaluation_record(row)

    @timed("payload")
    async def payload(self, evaluation_id: str) -> Payload:
        """Return what an evaluation runs.

        Raises:
            ProblemError: `not-found`.
        """
        row = await self._database.fetchrow("SELECT code, stdin FROM payloads WHERE evaluation_id = $1", evaluation_id)
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        return Payload(code=row["code"], stdin=row["stdin"])

    # -- lists

    @timed("page")
    async def page(
        self,
        *,
        owner: str | None = None,
        state: Sequence[State] = (),
        reason: Sequence[Reason] = (),
        priority: int | None = None,
        label: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> EvaluationPage:
        """Return a page of the evaluations that pass every filter, newest first. `since` is included, `until` is not.

        Raises:
            ProblemError: `invalid-request`, a cursor or label filter that is none.
        """
        statement = page_statement(
            owner=owner,
            state=state,
            reason=reason,
            priority=priority,
            label=label,
            since=since,
            until=until,
            limit=limit + 1,
            cursor=cursor,
        )
        rows = await self._database.select(statement)
        items = [evaluation_record(row) for row in rows[:limit]]
        more = len(rows) > limit
        last = rows[limit - 1] if more else None
        return EvaluationPage(
            items=items, next_cursor=make_cursor(_micros(last["submitted_at"]), last["number"]) if last else None
        )

    # -- events

    @timed("events")
    async def events(self, evaluation_id: str, after: int) -> EventList:
        """Return an evaluation's events with a sequence number above `after`, in order.

        Raises:
            ProblemError: `not-found`.
        """
        rows = await self._database.fetch(
            "SELECT * FROM events WHERE evaluation_id = $1 AND seq > $2 ORDER BY seq", evaluation_id, after
        )
        if not rows:
            await self.get(evaluation_id)
        return EventList(events=[event(row) for row in rows])

    @timed("held")
    async def held(self, *, after: str, limit: int) -> HeldPage:
        """List attempts under way, by id, from the one after `after`."""
        rows = await self._database.fetch(_HELD_PAGE, after, limit)
        items = [
            HeldAttempt(
                evaluation_id=row["id"],
                attempt=row["attempt"],
                state=State(row["state"]),
                since=row["started_at"] or row["provisioning_at"],
            )
            for row in rows
        ]
        return HeldPage(items=items, after=items[-1].evaluation_id if len(items) == limit else None)

    @timed("event_stream")
    async def event_stream(self, *, owner: str | None, cursor: str | None, limit: int) -> EventList:
        """Return events of all evaluations (or of an owner's) after `cursor`, each exactly once, in an order that never changes.

        Events are ordered by transaction and number, and shown only once no older transaction is open any more: without that, one
        that commits late would put its events before a cursor that has already passed them. So an event appears here a moment
        later than on the bus. Without a cursor there are no events, only where to begin.

        Raises:
            ProblemError: `invalid-request`, not a cursor.
        """
        if cursor is None:
            horizon = await self._database.fetchval(_HORIZON)
            return EventList(events=[], cursor=make_cursor(int(horizon), 0))
        xact, number = read_cursor(cursor)
        async with (
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            horizon = int(await connection.fetchval(_HORIZON))
            rows = await connection.fetch(_STREAM, str(xact), number, owner, limit)
        events = [event(row, make_cursor(row["xact"], row["id"])) for row in rows]
        if len(rows) == limit:
            return EventList(events=events, cursor=events[-1].cursor)
        # Everything below the horizon has been looked at: a quiet owner's next call begins there.
        reached = max((horizon, 0), (xact, number))
        return EventList(events=events, cursor=make_cursor(*reached))

    # -- statistics

    @timed("statistics")
    async def statistics(self, *, owner: str | None, since: datetime | None) -> Statistics:
        """Return aggregates over evaluations submitted since a time, computed by the database."""
        totals, *groups = await self._aggregates(owner, since)
        by_state = {State(row["key"]): row["n"] for row in groups[0]}
        ended = sum(count for state, count in by_state.items() if state.terminal)
        total = totals[0]
        return Statistics(
            total=total["total"],
            by_state=by_state,
            by_reason={Reason(row["key"]): row["n"] for row in groups[1]},
            by_priority={row["key"]: row["n"] for row in groups[2]},
            success_rate=by_state.get(State.COMPLETED, 0) / ended if ended else None,
            wait_seconds_p50=total["wait_p50"],
            wait_seconds_p95=total["wait_p95"],
            run_seconds_p50=total["run_p50"],
            run_seconds_p95=total["run_p95"],
            cpu_seconds=total["cpu_seconds"],
            last_24h=total["last_24h"],
        )

    async def _aggregates(self, owner: str | None, since: datetime | None) -> list[list[Row]]:
        conditions = ["true"]
        args: list[object] = []
        if owner is not None:
            args.append(owner)
            conditions.append(f"owner = ${len(args)}")
        if since is not None:
            args.append(_aware(since))
            conditions.append(f"submitted_at >= ${len(args)}")
        where = " AND ".join(conditions)
        statements = [
            f"""
            SELECT count(*) AS total,
                   count(*) FILTER (WHERE submitted_at >= now() - interval '24 hours') AS last_24h,
                   coalesce(sum(cpu_seconds), 0)::float8 AS cpu_seconds,
                   percentile_cont(0.5) WITHIN GROUP (ORDER BY {_WAIT}) AS wait_p50,
                   percentile_cont(0.95) WITHIN GROUP (ORDER BY {_WAIT}) AS wait_p95,
                   percentile_cont(0.5) WITHIN GROUP (ORDER BY {_RUN}) AS run_p50,
                   percentile_cont(0.95) WITHIN GROUP (ORDER BY {_RUN}) AS run_p95
              FROM evaluations WHERE {where}""",  # noqa: S608 - fixed fragments
            *(
                f"SELECT {column} AS key, count(*) AS n FROM evaluations WHERE {where} AND {column} IS NOT NULL GROUP BY 1"  # noqa: S608 - fixed fragments
                for column in ("state", "reason", "priority")
            ),
        ]
        async with (
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return [await connection.fetch(statement, *args) for statement in statements]


_WAIT = "extract(epoch FROM provisioning_at - queued_at)::float8"
_RUN = "extract(epoch FROM finished_at - started_at)::float8"


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def page_statement(
    *,
    owner: str | None,
    state: Sequence[State],
    reason: Sequence[Reason],
    priority: int | None,
    label: Sequence[str],
    since: datetime | None,
    until: datetime | None,
    limit: int,
    cursor: str | None,
) -> Select[Any]:
    """Compose the SELECT of a list; see `Reading.page`."""
    e = evaluations.c
    where: list[ColumnElement[bool]] = []
    if owner is not None:
        where.append(e.owner == owner)
    # A reason belongs to one state, and states are indexed.
    states = set(state) or {terminal_state_of(each) for each in reason}
    if states:
        where.append(e.state.in_(sorted(states)) if len(states) > 1 else e.state == next(iter(states)))
    if reason:
        where.append(e.reason.in_(list(reason)))
    if priority is not None:
        where.append(e.priority == priority)
    if label:
        where.append(e.labels.op("@>")(literal(orjson.dumps(_label_filter(label)).decode(), JSONB)))
        # Said so that the planner may use the index, which leaves out evaluations without labels.
        where.append(e.labels.op("<>")(literal("{}", JSONB)))
    if since is not None:
        where.append(e.submitted_at >= _aware(since))
    if until is not None:
        where.append(e.submitted_at < _aware(until))
    if cursor is not None:
        micros, number = read_cursor(cursor)
        try:
            after = _EPOCH + timedelta(microseconds=micros)
        except OverflowError:
            after = datetime.max.replace(tzinfo=UTC)
        where.append(tuple_(e.submitted_at, e.number) < (after, number))
    return select(evaluations).where(*where).order_by(e.submitted_at.desc(), e.number.desc()).limit(limit)
