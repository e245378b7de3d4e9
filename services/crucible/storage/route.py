"""Which broker is told of what, and the way from one broker to another.

While both are consumed, a share of what waits goes to the new broker; a hash of the id decides, so that an evaluation stays on its side.
The steps only change one row (and have hints forgotten, which the lanes then publish anew), so each of them takes effect at once, can be
repeated, and can be taken back. Queues are emptied or deleted only when nothing in them counts any more.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING

from crucible import logs
from crucible.broker.errors import BrokerError
from crucible.contracts import BrokerAction, BrokerPhase, BrokerReport, BrokerSide
from crucible.evaluation import Violation
from crucible.limits import SizeClass
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.tables import ACTIVE, DUE, HELD, QUEUED, UNHINTED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from crucible.broker.publisher import QueueDepth
    from crucible.broker.urls import BrokerUrl
    from crucible.contracts import BrokerMove
    from crucible.storage.engine import Connection, Database, Row
    from crucible.storage.lane import Lane

log = logs.get_logger("storage.route")


class Role(StrEnum):
    """A broker's part while one is left for another."""

    NEW = "new"
    LEGACY = "legacy"


_SHARE = "coalesce((SELECT share FROM broker_route), 0)"
_BUCKET = "(hashtextextended(id, 0) & 9223372036854775807) % 100"
# Where there are two brokers: which rows are a broker's own, and when all are.
MINE = {Role.NEW: f"{_BUCKET} < {_SHARE}", Role.LEGACY: f"{_BUCKET} >= {_SHARE}"}
ALL = {Role.NEW: f"{_SHARE} = 100", Role.LEGACY: f"{_SHARE} = 0"}

# How long a broker may take to say what it holds, for a status.
_ANSWER_S = 5.0

_READ = "SELECT phase, share, changed_at, changed_by FROM broker_route"
_WRITE = """
INSERT INTO broker_route (phase, share, changed_by) VALUES ($1, $2, $3)
    ON CONFLICT (single) DO UPDATE SET phase = $1, share = $2, changed_by = $3, changed_at = now()"""
_FORGET = f"""
UPDATE evaluations SET hint_priority = NULL WHERE {QUEUED} AND hint_priority IS NOT NULL AND hint_broker = $1"""  # noqa: S608 - constants
# One look, so that nothing is counted on its way from one number to another.
_STANDING = f"""
SELECT hint_broker AS broker, count(*) FILTER (WHERE {UNHINTED} AND {DUE}) AS untold,
       count(*) FILTER (WHERE {QUEUED} AND hint_priority IS NOT NULL) AS waiting, count(*) FILTER (WHERE {HELD}) AS in_flight
  FROM evaluations WHERE {ACTIVE} GROUP BY 1"""  # noqa: S608 - constants
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('crucible.broker_route', 0))"


def broker_name(url: BrokerUrl) -> str:
    """Return what a broker is called in rows, metrics and logs: where it is, not who logs in."""
    scheme = "redis" if url.kind == "redis" else "amqp"
    return f"{scheme}://{','.join(node.address for node in url.members)}/{url.vhost}"


def _refused(why: str, hint: str) -> ProblemError:
    return ProblemError("conflict", f"{why}; {hint}")


class Route:
    """Says where the brokers stand, and takes the steps from one to the other."""

    def __init__(self, database: Database, lanes: Mapping[Role, Lane]) -> None:
        self._database = database
        self._lanes = lanes

    # -- what can be said

    @timed("broker_report")
    async def report(self, notes: tuple[str, ...] = ()) -> BrokerReport:
        """Say what each broker holds, and what is left to do of the way between them."""
        sides, untold = await self._sides()
        if len(sides) < 2:
            following = "nothing: there is one broker" if sides else "nothing: the database itself is the queue"
            return BrokerReport(brokers=sides, untold=untold, next=following, notes=list(notes))
        row = await self._database.fetchrow(_READ)
        phase = BrokerPhase(row["phase"]) if row else BrokerPhase.LEGACY
        new, legacy = sides
        return BrokerReport(
            brokers=sides,
            untold=untold,
            phase=phase,
            share=row["share"] if row else 0,
            changed_at=row["changed_at"] if row else None,
            changed_by=row["changed_by"] if row else None,
            drained=phase is BrokerPhase.FINISHED or (phase is BrokerPhase.DRAINING and not _left(legacy)),
            next=_next_step(phase, new, legacy),
            notes=list(notes),
        )

    async def _sides(self) -> tuple[list[BrokerSide], int]:
        """Return what each broker holds, and how many evaluations no broker was told of."""
        held = await asyncio.gather(*(self._held(lane) for lane in self._lanes.values()))
        rows = await self._database.fetch(_STANDING) if self._lanes else []
        of = {row["broker"]: row for row in rows}
        sides = []
        for (role, lane), (depths, problem) in zip(self._lanes.items(), held, strict=True):
            row = of.get(lane.name)
            consumers = {size: depth.consumers for size, depth in depths.items() if depth.consumers is not None}
            sides.append(
                BrokerSide(
                    role=role,
                    kind=lane.url.kind,
                    url=lane.url.safe,
                    up=problem is None,
                    problem=problem,
                    queued=None if problem else {size: depth.ready for size, depth in depths.items()},
                    consumers=consumers or None,
                    waiting=row["waiting"] if row else 0,
                    in_flight=row["in_flight"] if row else 0,
                )
            )
        return sides, sum(row["untold"] for row in rows)

    @staticmethod
    async def _held(lane: Lane) -> tuple[Mapping[SizeClass, QueueDepth], str | None]:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await lane.depths(), None
        except BrokerError as error:
            return {}, str(error)
        except TimeoutError:
            return {}, f"it did not say what it holds within {_ANSWER_S:g} s"

    # -- the steps

    @timed("broker_move")
    async def move(self, wanted: BrokerMove) -> BrokerReport:
        """Take one step; taking it again changes nothing.

        Raises:
            ProblemError: `conflict`, it is not this step's turn, or a broker is not in the state that it needs.
        """
        if len(self._lanes) < 2:
            raise _refused(
                "there are not two brokers to move between",
                "set CRUCIBLE_BROKER_URL to the new one and CRUCIBLE_LEGACY_BROKER_URL to the one to leave, then restart",
            )
        steps = {
            BrokerAction.START: self._start,
            BrokerAction.DRAIN: self._drain,
            BrokerAction.FINISH: self._finish,
            BrokerAction.ROLLBACK: self._rollback,
        }
        notes = await steps[wanted.action](wanted)
        report = await self.report(tuple(notes))
        log.info("the way between brokers", action=wanted.action, phase=report.phase, share=report.share)
        return report

    async def _start(self, wanted: BrokerMove) -> list[str]:
        if wanted.share is None:
            missing = Violation(field="share", message="is needed to start", accepted="1 to 100, percent of the work")
            raise ProblemError("invalid-request", "no share of the work was named", violations=[missing])
        async with self._database.transaction() as connection:
            phase = await self._phase(connection)
            if phase not in (BrokerPhase.LEGACY, BrokerPhase.SHARING):
                raise _refused(
                    f"the migration is {phase} already", "`rollback` first, or go on with `drain` and `finish`"
                )
            await connection.execute(_WRITE, BrokerPhase.SHARING, wanted.share, wanted.actor)
        return []

    async def _drain(self, wanted: BrokerMove) -> list[str]:
        async with self._database.transaction() as connection:
            phase = await self._phase(connection)
            if phase is BrokerPhase.LEGACY:
                raise _refused("nothing goes to the new broker yet", "`start` with a share first, and watch it work")
            if phase is BrokerPhase.FINISHED:
                raise _refused("the migration is finished already", "`rollback` is the way back")
            await connection.execute(_WRITE, BrokerPhase.DRAINING, 100, wanted.actor)
            await connection.execute(_FORGET, self._lanes[Role.LEGACY].name)
        return []

    async def _finish(self, wanted: BrokerMove) -> list[str]:
        async with self._database.transaction() as connection:
            phase = await self._phase(connection)
            if phase is BrokerPhase.FINISHED:
                return []
            if phase is not BrokerPhase.DRAINING:
                raise _refused(f"the migration is in its phase {phase}", "`drain` first, and wait until it has drained")
            (_, legacy), _ = await self._sides()
            if left := _left(legacy):
                raise _refused(f"the legacy broker is not drained: {left}", _how_to_drain(legacy))
            notes = await self._tried(
                self._lanes[Role.LEGACY].delete_queues(),
                "the empty queues of the legacy broker could not be deleted, which harms nothing",
            )
            await connection.execute(_WRITE, BrokerPhase.FINISHED, 100, wanted.actor)
        return notes

    async def _rollback(self, wanted: BrokerMove) -> list[str]:
        new, legacy = self._lanes[Role.NEW], self._lanes[Role.LEGACY]
        async with self._database.transaction() as connection:
            phase = await self._phase(connection)
            if phase is BrokerPhase.FINISHED:
                await self._bring_back(legacy)
            await connection.execute(_WRITE, BrokerPhase.LEGACY, 0, wanted.actor)
            await connection.execute(_FORGET, new.name)
        if phase is BrokerPhase.LEGACY:
            return []
        return await self._tried(
            new.purge(),
            "the queues of the new broker could not be emptied; its messages are void, and workers drop them as they find them",
        )

    async def _phase(self, connection: Connection) -> BrokerPhase:
        """Read the phase, alone: nobody else takes a step until this transaction ends."""
        await connection.execute(_LOCK)
        row: Row | None = await connection.fetchrow(_READ)
        return BrokerPhase(row["phase"]) if row else BrokerPhase.LEGACY

    @staticmethod
    async def _bring_back(legacy: Lane) -> None:
        """Make sure that the queues, which `finish` deleted, are there before anything is sent there."""
        try:
            await legacy.declare()
        except BrokerError:
            # Without the right to declare: an operator may have done so already.
            try:
                await legacy.depths()
            except BrokerError as error:
                raise _refused(
                    f"the legacy broker has no queues to go back to: {error.message}",
                    "`crucible broker apply` declares them there; then roll back again",
                ) from error

    @staticmethod
    async def _tried(work: Awaitable[object], otherwise: str) -> list[str]:
        try:
            await work
        except BrokerError as error:
            return [f"{otherwise}: {error.message}"]
        return []


def _left(legacy: BrokerSide) -> str:
    """Say what keeps the legacy broker from being left; empty if nothing does."""
    if legacy.queued is None:
        return f"it does not say what it holds ({legacy.problem})"
    messages = sum(legacy.queued.values())
    parts = {
        "messages": messages,
        "waiting evaluations that only it was told of": legacy.waiting,
        "in flight": legacy.in_flight,
    }
    return ", ".join(f"{count} {what}" for what, count in parts.items() if count)


def _how_to_drain(legacy: BrokerSide) -> str:
    if legacy.queued is None:
        return "if it is gone for good, unset CRUCIBLE_LEGACY_BROKER_URL and restart: all that waits is told to the new one"
    return "let its workers go on until it is empty; `status` shows what is left"


def _next_step(phase: BrokerPhase, new: BrokerSide, legacy: BrokerSide) -> str:
    match phase:
        case BrokerPhase.LEGACY if not new.up:
            return f"bring the new broker up: {new.problem}"
        case BrokerPhase.LEGACY:
            return "`start --share N` sends N percent of the work to the new broker"
        case BrokerPhase.SHARING:
            return "raise the share with `start --share N`, or `drain` to move all work; `rollback` goes back"
        case BrokerPhase.DRAINING if left := _left(legacy):
            return f"wait until the legacy broker is empty: {left}; then `finish`. `rollback` goes back"
        case BrokerPhase.DRAINING:
            return "`finish` deletes the legacy broker's queues; `rollback` goes back"
        case _:
            return "unset CRUCIBLE_LEGACY_BROKER_URL and restart, then stop the legacy broker; until then `rollback` goes back"
