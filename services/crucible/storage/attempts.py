"""What becomes of an attempt: it runs, ends, is given back, is lost, or is cancelled.

Every report carries its attempt number and is held against the row: of an attempt that is no longer the row's own nothing is
recorded, and its reporter learns so (`stale-attempt`). Each decision is made on a row as read and then written by
compare-and-set; if the row changed in between, it is read and decided again.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from crucible import logs, metrics
from crucible.contracts import CancelResult, EvaluationRecord
from crucible.evaluation import HELD_STATES, RETRYABLE_REASONS, Reason, State, terminal_state_of
from crucible.events import EventType
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.queue import UNHELD
from crucible.storage.records import (
    evaluation_record,
    storable_int,
    storable_seconds,
    storable_size,
    storable_text,
)
from crucible.storage.tables import HELD
from crucible.storage.transitions import NOW, NULL, Chosen, Sql, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crucible.contracts import CancelRequest, Finish, Release, Running
    from crucible.limits import SizeClass
    from crucible.outcome import Outcome
    from crucible.settings import StorageSettings
    from crucible.storage.bell import Bell
    from crucible.storage.engine import Database, Row
    from crucible.storage.output import Digests, Outputs
    from crucible.storage.transitions import Lifecycle, Moves

log = logs.get_logger("storage.attempts")

_READ = "SELECT * FROM evaluations WHERE id = $1"
# As read: nothing has moved it, no output has come, and nobody has asked for a cancel since.
_AS_READ = """
SELECT id, seq FROM evaluations
 WHERE id = $1 AND seq = $2 AND output_frames = $3 AND (cancel_reason IS NOT NULL) = $4 FOR NO KEY UPDATE"""
# The same, for those who act because a lease has ended: it may have been renewed since.
_AS_READ_AND_EXPIRED = _AS_READ.replace(" FOR NO KEY", " AND lease_until < clock_timestamp() FOR NO KEY")
_STARTING = f"""
SELECT id, seq FROM evaluations
 WHERE id = $1 AND attempt = $2 AND state = '{State.PROVISIONING}' AND cancel_reason IS NULL FOR NO KEY UPDATE"""  # noqa: S608 - constants
_ASK_CANCEL = f"""
UPDATE evaluations SET cancel_reason = coalesce(cancel_reason, $3), cancel_actor = coalesce(cancel_actor, $4)
 WHERE id = $1 AND attempt = $2 AND {HELD} RETURNING *"""  # noqa: S608 - constants
_DEAD_LETTER = """
INSERT INTO dead_letters (evaluation_id, owner, reason, detail, attempts) VALUES ($1, $2, $3, $4, $5)"""
_TRIES = 20
_RETRY_MOST_S = 60
_NO_OUTPUT = {"output_frames": 0, "stdout_bytes": 0, "stderr_bytes": 0, "inline_bytes": 0}


def _as_read(row: Row, *, expired: bool = False) -> Chosen:
    sql = _AS_READ_AND_EXPIRED if expired else _AS_READ
    return Chosen(
        State(row["state"]), sql, (row["id"], row["seq"], row["output_frames"], row["cancel_reason"] is not None)
    )


def _stale(row: Row, attempt: int) -> ProblemError:
    if row["attempt"] != attempt:
        why = f"attempt {attempt} is void: the evaluation is at attempt {row['attempt']}"
    elif row["cancel_reason"] is not None and row["state"] in HELD_STATES:
        why = "a cancel was asked for"
    else:
        why = f"attempt {attempt} is void: the evaluation is {row['state']}"
    return ProblemError("stale-attempt", why)


def _changed_too_often(evaluation_id: str) -> ProblemError:
    return ProblemError("unavailable", f"{evaluation_id} changes faster than it can be read", retry_after=1)


class Attempts:
    """Records what happens to attempts."""

    def __init__(
        self, database: Database, lifecycle: Lifecycle, outputs: Outputs, bell: Bell, settings: StorageSettings
    ) -> None:
        self._database = database
        self._lifecycle = lifecycle
        self._outputs = outputs
        self._bell = bell
        self._max_attempts = settings.max_attempts
        self._retry_at = _retry_at(settings.retry_seconds)

    async def _read(self, evaluation_id: str) -> Row:
        row = await self._database.fetchrow(_READ, evaluation_id)
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        return row

    # -- reports

    @timed("running")
    async def running(self, evaluation_id: str, report: Running) -> EvaluationRecord:
        """Record that the code has started; saying so again changes nothing.

        Raises:
            ProblemError: `stale-attempt` if the attempt is void or a cancel was asked for, `not-found`.
        """
        rows = await self._lifecycle.move(
            Chosen(State.PROVISIONING, _STARTING, (evaluation_id, report.attempt)),
            [Step(State.RUNNING, actor=report.actor, data={"sandbox": report.sandbox})],
            {"started_at": NOW, "sandbox": storable_text(report.sandbox)},
        )
        if rows:
            return evaluation_record(rows[0])
        row = await self._read(evaluation_id)
        again = row["state"] == State.RUNNING and row["attempt"] == report.attempt and row["cancel_reason"] is None
        if not again:
            raise _stale(row, report.attempt)
        return evaluation_record(row)

    @timed("finish")
    async def finish(self, evaluation_id: str, report: Finish) -> EvaluationRecord:
        """Record the end of an attempt: the first report of its end counts, others are answered with what was recorded.

        A cause that lies with the platform makes the attempt void, and the evaluation is queued again while attempts are left.

        Raises:
            ProblemError: `stale-attempt` if the attempt is void, `not-found`.
        """
        for _ in range(_TRIES):
            row = await self._read(evaluation_id)
            if row["attempt"] == report.attempt and State(row["state"]).terminal:
                return evaluation_record(row)
            if row["attempt"] != report.attempt or row["state"] not in HELD_STATES:
                raise _stale(row, report.attempt)
            if report.outcome.reason in RETRYABLE_REASONS:
                moved = await self._lose_reported(row, report)
            else:
                steps, changes = self._steps(row, report), _measured(report.outcome)
                moved = await self._end(row, _as_read(row), steps, changes, collected=report.collected)
            if moved is not None:
                return evaluation_record(moved)
        raise _changed_too_often(evaluation_id)

    async def _lose_reported(self, row: Row, report: Finish) -> Row | None:
        outcome = report.outcome
        return await self.lose(
            row, outcome.reason, outcome.detail, report.actor, outcome=outcome, collected=report.collected
        )

    @staticmethod
    def _steps(row: Row, report: Finish) -> list[Step]:
        outcome = report.outcome
        end = Step(
            outcome.state,
            actor=report.actor,
            reason=outcome.reason,
            detail=outcome.detail,
            data={
                name: value
                for name, value in _measured(outcome).items()
                if value is not None and name in ("exit_code", "signal", "exception_type", "run_seconds")
            },
        )
        ran = report.started_at is not None or outcome.state is State.COMPLETED
        if row["state"] == State.RUNNING or not ran:
            return [end]
        # The report that it runs was lost, or overtaken by its end: both are recorded, in order, at once.
        told = _aware(report.started_at) or row["provisioning_at"]
        started = max(row["provisioning_at"], min(told, datetime.now(UTC)))
        return [Step(State.RUNNING, actor=report.actor, at=started), end]

    @timed("release")
    async def release(self, evaluation_id: str, release: Release) -> EvaluationRecord:
        """Take back an attempt that was not run: queued again at its old place, or cancelled if that was asked for.

        Raises:
            ProblemError: `stale-attempt` if the attempt is not the worker's own, `not-found`.
        """
        for _ in range(_TRIES):
            row = await self._read(evaluation_id)
            if row["attempt"] == release.attempt and row["state"] == State.QUEUED:
                return evaluation_record(row)
            own = row["attempt"] == release.attempt and row["worker"] == release.worker
            if not own or row["state"] not in HELD_STATES:
                raise _stale(row, release.attempt)
            if row["cancel_reason"] is not None:
                moved = await self._cancel_lost(row, _as_read(row), release.worker, release.detail)
            else:
                step = Step(State.QUEUED, actor=release.worker, detail=release.detail)
                moved = await self._requeue(row, _as_read(row), step, {})
            if moved is not None:
                return evaluation_record(moved)
        raise _changed_too_often(evaluation_id)

    async def give_back(self, evaluation_id: str, attempt: int, detail: str) -> None:
        """Queue an attempt again that was claimed but never reached its worker."""
        row = await self._read(evaluation_id)
        if row["attempt"] == attempt and row["state"] == State.PROVISIONING:
            await self._requeue(row, _as_read(row), Step(State.QUEUED, actor="storage", detail=detail), {})

    # -- cancel

    @timed("cancel")
    async def cancel(self, evaluation_id: str, request: CancelRequest) -> CancelResult:
        """Cancel what waits; have what is held remember that a cancel was asked for; leave alone what has ended."""
        for _ in range(_TRIES):
            row = await self._read(evaluation_id)
            if State(row["state"]).terminal:
                return CancelResult(evaluation=evaluation_record(row), sandbox=False)
            if row["state"] in HELD_STATES:
                asked = await self._database.fetchrow(
                    _ASK_CANCEL, evaluation_id, row["attempt"], request.reason, storable_text(request.actor)
                )
                if asked is not None:
                    return CancelResult(evaluation=evaluation_record(asked), sandbox=True)
                continue
            step = Step(State.CANCELLED, actor=request.actor, reason=request.reason, detail="cancelled while it waited")
            moved = await self._end(
                row,
                _as_read(row),
                [step],
                {"cancel_reason": request.reason, "cancel_actor": storable_text(request.actor)},
            )
            if moved is not None:
                return CancelResult(evaluation=evaluation_record(moved), sandbox=False)
        raise _changed_too_often(evaluation_id)

    # -- loss

    async def lose(
        self,
        row: Row,
        reason: Reason,
        detail: str,
        actor: str,
        *,
        outcome: Outcome | None = None,
        expired: bool = False,
        collected: bool = False,
    ) -> Row | None:
        """Settle an attempt that the platform lost. None if the row is no longer as read, or `expired` and its lease is not.

        A cancel that was asked for comes first; then another attempt, while any are left; then it has failed for good.
        """
        chosen = _as_read(row, expired=expired)
        if row["cancel_reason"] is not None:
            return await self._cancel_lost(row, chosen, actor, detail, collected=collected)
        # Giving way on purpose (a drain, an upgrade) says nothing about the evaluation, however often it happens.
        counts = reason is not Reason.PREEMPTED
        losses = row["losses"] + counts
        if losses < self._max_attempts:
            again = Step(State.QUEUED, actor=actor, reason=reason, detail=detail)
            return await self._requeue(
                row,
                chosen,
                again,
                {
                    "losses": losses,
                    # It waits anew; its place in the queue is by number and priority, which it keeps.
                    "queued_at": NOW,
                    "queue_deadline": Sql("picked.at + make_interval(secs => e.queue_timeout_seconds)"),
                    "retry_at": self._retry_at if counts else NULL,
                },
            )
        ended = f"{detail} (lost {losses} times; no attempt is left)"
        step = Step(terminal_state_of(reason), actor=actor, reason=reason, detail=ended)
        changes: dict[str, object] = _measured(outcome) if outcome else {}
        changes |= {"losses": losses}
        return await self._end(row, chosen, [step], changes, dead_letter_attempts=losses, collected=collected)

    async def _cancel_lost(
        self, row: Row, chosen: Chosen, actor: str, detail: str, *, collected: bool = False
    ) -> Row | None:
        step = Step(
            State.CANCELLED,
            actor=row["cancel_actor"] or actor,
            reason=Reason(row["cancel_reason"]),
            detail=f"cancelled on request; {detail}",
        )
        return await self._end(row, chosen, [step], {}, collected=collected)

    async def _requeue(self, row: Row, chosen: Chosen, step: Step, changes: Mapping[str, object]) -> Row | None:
        async with self._lifecycle.transaction() as moves:
            moved = await moves.move(chosen, [step], {**UNHELD, **_NO_OUTPUT, **changes})
            if moved and row["output_frames"]:
                await self._outputs.discard(moves.connection, [row["id"]])
        if not moved:
            return None
        self._ring_when_due(moved[0])
        return moved[0]

    def _ring_when_due(self, row: Row) -> None:
        rest = 0.0 if row["retry_at"] is None else (row["retry_at"] - row["queued_at"]).total_seconds()
        # If this process is gone by then, whoever claims finds it at the next look.
        asyncio.get_running_loop().call_later(rest, self._bell.ring, [_size_class(row)])

    async def _end(
        self,
        row: Row,
        chosen: Chosen,
        steps: list[Step],
        changes: Mapping[str, object],
        *,
        dead_letter_attempts: int | None = None,
        collected: bool = False,
    ) -> Row | None:
        digests = await self._outputs.seal(row)
        if digests is None:
            return None
        *_, end = steps
        everything: dict[str, object] = {
            **changes,
            **_digest_columns(digests),
            "reason": end.reason,
            "detail": storable_text(end.detail),
            "finished_at": NOW,
            "lease_until": NULL,
        }
        if len(steps) > 1:
            everything["started_at"] = steps[0].at
        if collected:
            steps = [*steps, Step(end.state, actor=end.actor, reason=end.reason, event=EventType.COLLECTED)]
        if dead_letter_attempts is None:
            moved = await self._lifecycle.move(chosen, steps, everything)
            return moved[0] if moved else None
        async with self._lifecycle.transaction() as moves:
            moved = await moves.move(chosen, steps, everything)
            if moved:
                await self._write_dead_letter(moves, moved[0], dead_letter_attempts)
        if moved:
            metrics.DLQ_SIZE.inc()
            metrics.DLQ_ADDITIONS.labels(end.reason).inc()
        return moved[0] if moved else None

    @staticmethod
    async def _write_dead_letter(moves: Moves, row: Row, attempts: int) -> None:
        await moves.connection.execute(_DEAD_LETTER, row["id"], row["owner"], row["reason"], row["detail"], attempts)
        log.warning(
            "an evaluation became a dead letter", evaluation_id=row["id"], reason=row["reason"], attempts=attempts
        )


def _retry_at(first_seconds: float) -> Sql:
    """Return when a lost attempt may be tried again; spread, so that what was lost together does not come back in step."""
    base = f"{float(first_seconds)!r} * 2 ^ e.losses"
    return Sql(f"picked.at + make_interval(secs => least({_RETRY_MOST_S}, {base} * (0.5 + random())))")


def _size_class(row: Row) -> SizeClass:
    size: SizeClass = row["size_class"]
    return size


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def _measured(outcome: Outcome) -> dict[str, object]:
    return {
        "exit_code": storable_int(outcome.exit_code),
        "signal": storable_int(outcome.signal),
        "exception_type": storable_text(outcome.exception_type),
        "peak_memory_bytes": storable_size(outcome.peak_memory_bytes),
        "cpu_seconds": storable_seconds(outcome.cpu_seconds),
        "run_seconds": storable_seconds(outcome.run_seconds),
    }


def _digest_columns(digests: Digests) -> dict[str, object]:
    return {
        "stdout_sha256": digests.stdout,
        "stderr_sha256": digests.stderr,
        "output_unsettled": digests.unsettled,
    }
