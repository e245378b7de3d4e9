"""Dead letters: evaluations that the platform could not run within its attempts, for people to look at, replay or put away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible import metrics
from crucible.contracts import (
    DeadLetter,
    DeadLetterPage,
    EvaluationRecord,
    NewEvaluation,
    NewEvaluations,
    StoredStatus,
)
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.reading import make_cursor, read_cursor
from crucible.storage.records import evaluation_spec

if TYPE_CHECKING:
    from crucible.storage.engine import Database, Row
    from crucible.storage.submission import Submissions

_WITH_PAYLOAD = """
SELECT e.*, p.code, p.stdin FROM evaluations AS e JOIN payloads AS p ON p.evaluation_id = e.id WHERE e.id = $1"""


def _letter(row: Row) -> DeadLetter:
    return DeadLetter(**dict(row))


class DeadLetters:
    """The table of dead letters."""

    def __init__(self, database: Database, submissions: Submissions) -> None:
        self._database = database
        self._submissions = submissions

    @timed("dead_letters")
    async def page(self, *, limit: int, cursor: str | None) -> DeadLetterPage:
        """Return dead letters, newest first, and how many there are.

        Raises:
            ProblemError: `invalid-request`, not a cursor.
        """
        before = read_cursor(cursor)[0] if cursor is not None else None
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT * FROM dead_letters WHERE $1::bigint IS NULL OR id < $1 ORDER BY id DESC LIMIT $2",
                before,
                limit + 1,
            )
            total = await connection.fetchval("SELECT count(*) FROM dead_letters")
        items = [_letter(row) for row in rows[:limit]]
        following = make_cursor(items[-1].id, 0) if len(rows) > limit else None
        return DeadLetterPage(items=items, total=total, next_cursor=following)

    @timed("replay")
    async def replay(self, letter_id: int, new_id: str) -> EvaluationRecord:
        """Queue a dead letter's evaluation again, whole, under a new id. Repeating the call gives the same evaluation.

        Raises:
            ProblemError: `not-found`; `conflict`, it has been replayed under another id.
        """
        letter = await self._database.fetchrow("SELECT * FROM dead_letters WHERE id = $1", letter_id)
        if letter is None:
            raise ProblemError("not-found", f"there is no dead letter {letter_id}")
        # The name is taken first and by compare-and-set: of two replays one wins, and one that dies here can be repeated.
        taken = await self._database.fetchval(
            """UPDATE dead_letters SET replayed_as = coalesce(replayed_as, $2) WHERE id = $1 RETURNING replayed_as""",
            letter_id,
            new_id,
        )
        if taken != new_id:
            raise ProblemError("conflict", f"dead letter {letter_id} has been replayed as {taken}")
        source = await self._database.fetchrow(_WITH_PAYLOAD, letter["evaluation_id"])
        if source is None:
            raise ProblemError("not-found", f"the evaluation of dead letter {letter_id} has been deleted")
        stored = await self._submissions.create(
            NewEvaluations(
                items=[
                    NewEvaluation(
                        id=new_id,
                        owner=source["owner"],
                        spec=evaluation_spec(source),
                        request_sha256=source["request_sha256"],
                        replay_of=source["id"],
                    )
                ]
            )
        )
        await self.gauge()
        (result,) = stored.results
        if result.evaluation is None:
            raise ProblemError("internal", "a replay without a quota was refused for quota")
        if result.status is StoredStatus.CREATED:
            metrics.DLQ_RETRIES.inc()
        return result.evaluation

    @timed("delete_dead_letter")
    async def delete(self, letter_id: int) -> None:
        """Delete a dead letter; its evaluation stays readable.

        Raises:
            ProblemError: `not-found`.
        """
        if await self._database.execute("DELETE FROM dead_letters WHERE id = $1", letter_id) != "DELETE 1":
            raise ProblemError("not-found", f"there is no dead letter {letter_id}")
        await self.gauge()

    async def gauge(self) -> None:
        """Set the metric of letters that wait for someone."""
        metrics.DLQ_SIZE.set(
            await self._database.fetchval("SELECT count(*) FROM dead_letters WHERE replayed_as IS NULL")
        )
