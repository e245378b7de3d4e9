"""The one way in which an evaluation changes state.

A transition is a compare-and-set: it names rows and the state that they must be in, and what is no longer so is left alone and
not returned. One statement writes the row, one event per step and the outbox entries, so that none is ever seen without the
others. Everything that moves evaluations (claims, reports of the dispatcher, cancels, sweeps) goes through here; submission
alone writes rows of its own, since before it there is nothing to compare with.
"""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from crucible import metrics
from crucible.evaluation import Reason, State, check_transition
from crucible.storage.records import storable_json, storable_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from datetime import datetime

    from crucible.events import EventType
    from crucible.storage.engine import Connection, Database, Row


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows to move: a SELECT of `id` and `seq` that locks them, its parameters `$1...`, and the state that they are in."""

    current: State
    sql: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a transition, and so one event. `at` defaults to now.

    With `event` it is an event that moves nothing: `state` is the one that the step before it led to.
    """

    state: State
    actor: str
    reason: Reason | None = None
    detail: str | None = None
    at: datetime | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    event: EventType | None = None


@dataclass(frozen=True, slots=True)
class Sql:
    """A column's new value as an expression. `e` is the row as it was, `picked.at` the time of the transition."""

    text: str


NOW = Sql("picked.at")
NULL = Sql("NULL")
_STEP_COLUMNS = {
    "type": "text",
    "state": "text",
    "actor": "text",
    "at": "timestamptz",
    "reason": "text",
    "detail": "text",
    "data": "text",
}


@lru_cache(maxsize=256)
def _statement(chosen: str, given: int, columns: tuple[str, ...], values: tuple[str | None, ...], payload: bool) -> str:
    """Compose the statement. Parameters: `chosen`'s own, three states and counts, the steps' columns, then each None in `values`."""
    current, target, steps = given + 1, given + 2, given + 3
    arrays = ", ".join(f"${given + 4 + place}::{kind}[]" for place, kind in enumerate(_STEP_COLUMNS.values()))
    free = itertools.count(given + 4 + len(_STEP_COLUMNS))
    changes = "".join(
        f", {column} = {f'${next(free)}' if value is None else value}"
        for column, value in zip(columns, values, strict=True)
    )
    extra, join = (", p.code, p.stdin", " JOIN payloads AS p ON p.evaluation_id = m.id") if payload else ("", "")
    return f"""
WITH chosen AS MATERIALIZED ({chosen}),
picked AS MATERIALIZED (SELECT c.id, c.seq, clock_timestamp() AS at FROM chosen AS c),
moved AS (
    UPDATE evaluations AS e SET state = ${target}, seq = e.seq + ${steps}::int{changes}
      FROM picked
     WHERE e.id = picked.id AND e.seq = picked.seq AND e.state = ${current}
 RETURNING e.*, picked.at AS moved_at
),
recorded AS (
    INSERT INTO events (evaluation_id, seq, type, at, owner, actor, state, attempt, reason, detail, data)
    SELECT m.id, m.seq - ${steps}::int + s.n, s.type, coalesce(s.at, m.moved_at), m.owner, s.actor, s.state, m.attempt,
           s.reason, s.detail, s.data::jsonb
      FROM moved AS m
     CROSS JOIN unnest({arrays}) WITH ORDINALITY AS s({", ".join(_STEP_COLUMNS)}, n)
     ORDER BY m.number, s.n
 RETURNING id, evaluation_id, seq
),
told AS (INSERT INTO outbox (event_id, evaluation_id, seq) SELECT id, evaluation_id, seq FROM recorded)
SELECT m.*{extra} FROM moved AS m{join} ORDER BY m.effective_priority DESC, m.number"""  # noqa: S608 - fixed fragments; values are parameters


async def transition(
    connection: Connection,
    chosen: Chosen,
    steps: Sequence[Step],
    changes: Mapping[str, object],
    *,
    payload: bool = False,
) -> list[Row]:
    """Move the chosen rows through `steps` and return those that moved, as they are now.

    Args:
        connection: where to run; with no transaction open, the statement is one of its own.
        chosen: which rows, and the state that they must be in.
        steps: one or more steps of the lifecycle, in order.
        changes: what else the rows become, by column; `Sql` is an expression, all else a value.
        payload: also return `code` and `stdin`.

    Raises:
        TransitionError: the lifecycle has no such steps.
    """
    state = chosen.current
    for step in steps:
        if step.event is None:
            check_transition(state, step.state, step.reason)
            state = step.state
    values = tuple(value.text if isinstance(value, Sql) else None for value in changes.values())
    sql = _statement(chosen.sql, len(chosen.args), tuple(changes), values, payload)
    return await connection.fetch(
        sql,
        *chosen.args,
        chosen.current,
        state,
        len(steps),
        [step.event or step.state for step in steps],
        [step.state for step in steps],
        [storable_text(step.actor) for step in steps],
        [step.at for step in steps],
        [step.reason for step in steps],
        [storable_text(step.detail) for step in steps],
        [storable_json(dict(step.data)) for step in steps],
        *(value for value in changes.values() if not isinstance(value, Sql)),
    )


def _seconds(row: Row, since: str, until: str) -> float:
    return max(0.0, (row[until] - row[since]).total_seconds())  # type: ignore[no-any-return]


def _count(rows: Sequence[Row], steps: Sequence[Step]) -> None:
    for step in steps:
        if step.event is not None:
            continue
        match step.state:
            case State.PROVISIONING:
                for row in rows:
                    metrics.QUEUE_WAIT.labels(row["priority"]).observe(_seconds(row, "queued_at", "provisioning_at"))
            case State.RUNNING:
                for row in rows:
                    metrics.SCHEDULE_SECONDS.observe(_seconds(row, "provisioning_at", "started_at"))
            case State.QUEUED:
                metrics.REQUEUED.labels(step.reason or "released").inc(len(rows))
            case _:
                metrics.TERMINAL.labels(step.state, step.reason).inc(len(rows))
                for row in rows:
                    if row["started_at"] is not None:
                        metrics.RUN_SECONDS.observe(_seconds(row, "started_at", "finished_at"))


class Moves:
    """Transitions within one transaction of their own; what they caused is counted and told once it is committed."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._made: list[tuple[list[Row], Sequence[Step]]] = []

    async def move(self, chosen: Chosen, steps: Sequence[Step], changes: Mapping[str, object]) -> list[Row]:
        """Like `transition`."""
        rows = await transition(self.connection, chosen, steps, changes)
        self._made.append((rows, steps))
        return rows

    def count(self) -> bool:
        """Feed the metrics and return whether anything moved."""
        for rows, steps in self._made:
            _count(rows, steps)
        return any(rows for rows, _ in self._made)


class Lifecycle:
    """Transitions on a database, with the hook that wakes the outbox relay after each commit."""

    def __init__(self, database: Database, committed: Callable[[], None]) -> None:
        self._database = database
        self._committed = committed

    async def move(
        self, chosen: Chosen, steps: Sequence[Step], changes: Mapping[str, object], *, payload: bool = False
    ) -> list[Row]:
        """Like `transition`, in a transaction of its own: one round trip."""
        async with self._database.connection() as connection:
            rows = await transition(connection, chosen, steps, changes, payload=payload)
        if rows:
            _count(rows, steps)
            self._committed()
        return rows

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Moves]:
        """Several transitions, or transitions and other statements, all or none."""
        async with self._database.transaction() as connection:
            moves = Moves(connection)
            yield moves
        if moves.count():
            self._committed()
