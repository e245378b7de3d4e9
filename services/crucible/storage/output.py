"""What evaluations print: taken in batches, kept whole, read by range or in order of arrival.

Frames are numbered from 0 within an attempt, and each is taken once, whoever ships it and however often: what overlaps with what is
here is cut off, and what would leave a gap is refused. So two who follow one sandbox for a moment harm nothing.

The two streams are kept apart, with an index of frame headers that says how they interleave. A batch first lies in the database; once
a few megabytes have gathered they move to the object store as one segment, so that neither a row nor this process ever holds a
large output. Nothing is cut off here: what an evaluation may print at most is the runner's business.

Only the present attempt's output exists: it is counted in the evaluation's own row, and a lost attempt's is deleted by the
transaction that voids it.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from crucible import logs
from crucible.contracts import OutputInfo
from crucible.evaluation import HELD_STATES, State
from crucible.events import Event, EventType
from crucible.frames import HEADER, Frame, FrameError, Kind, decode_all
from crucible.problems import ProblemError
from crucible.storage.engine import timed
from crucible.storage.objects import DamagedObjectError, ObjectStore
from crucible.storage.tables import HELD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from crucible.events import EventSink
    from crucible.limits import Limits
    from crucible.storage.engine import Connection, Database, Row

log = logs.get_logger("storage.output")

Stream = Literal["stdout", "stderr"]
# Large enough that an object store's cost per object is small, small enough to hold in memory without a thought.
SEGMENT_BYTES = 4 * 1024 * 1024
# One answer of frames carries about this much, and one frame at least.
_FRAMES_BYTES = 4 * 1024 * 1024
EMPTY_SHA256 = hashlib.sha256(b"").digest()

_APPEND = f"""
WITH counted AS (
    UPDATE evaluations
       SET output_frames = output_frames + $4,
           stdout_bytes = stdout_bytes + $5, stderr_bytes = stderr_bytes + $6, inline_bytes = inline_bytes + $5 + $6
     WHERE id = $1 AND attempt = $2 AND output_frames = $3 AND {HELD}
 RETURNING *
),
kept AS (
    INSERT INTO output_chunks (evaluation_id, attempt, first_frame, frames,
                               stdout_start, stdout_length, stderr_start, stderr_length, stdout, stderr, frame_index)
    SELECT id, attempt, $3, $4, stdout_bytes - $5, $5, stderr_bytes - $6, $6, $7, $8, $9 FROM counted
)
SELECT * FROM counted"""  # noqa: S608 - constants

_INLINE = """
SELECT * FROM output_chunks
 WHERE evaluation_id = $1 AND attempt = $2 AND object_id IS NULL ORDER BY first_frame LIMIT $3"""

_CHUNKS = """
SELECT first_frame, object_id, stdout_length, stderr_length, frames FROM output_chunks
 WHERE evaluation_id = $1 AND attempt = $2 ORDER BY first_frame"""

# Digests of what is small enough to be in the database whole.
_INLINE_DIGESTS = """
SELECT coalesce(sum(frames), 0) = $3 AS whole,
       sha256(coalesce(string_agg(stdout, ''::bytea ORDER BY first_frame), '')) AS stdout,
       sha256(coalesce(string_agg(stderr, ''::bytea ORDER BY first_frame), '')) AS stderr
  FROM output_chunks WHERE evaluation_id = $1 AND attempt = $2 AND object_id IS NULL"""


def _range_sql(stream: Stream) -> str:
    return f"""
SELECT c.object_id, c.stdout_length,
       greatest($2 - c.{stream}_start, 0) AS skip,
       least($3 - c.{stream}_start, c.{stream}_length) - greatest($2 - c.{stream}_start, 0) AS take,
       substring(c.{stream} FROM (greatest($2 - c.{stream}_start, 0) + 1)::int
                 FOR (least($3 - c.{stream}_start, c.{stream}_length) - greatest($2 - c.{stream}_start, 0))::int) AS piece
  FROM evaluations AS e JOIN output_chunks AS c ON c.evaluation_id = e.id AND c.attempt = e.attempt
 WHERE e.id = $1 AND c.{stream}_start < $3 AND c.{stream}_start + c.{stream}_length > $2
 ORDER BY c.first_frame"""  # noqa: S608 - one of two names


_RANGE: dict[Stream, str] = {"stdout": _range_sql("stdout"), "stderr": _range_sql("stderr")}

_FRAMES = """
SELECT * FROM (
    SELECT c.*, sum(c.stdout_length + c.stderr_length) OVER (ORDER BY c.first_frame) - c.stdout_length - c.stderr_length AS before
      FROM evaluations AS e JOIN output_chunks AS c ON c.evaluation_id = e.id AND c.attempt = e.attempt
     WHERE e.id = $1 AND c.first_frame + c.frames > $2) AS f
 WHERE f.before < $3 ORDER BY f.first_frame LIMIT $4"""


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 of both streams (None: what was stored is damaged), and whether output still has to move to the object store."""

    stdout: bytes | None
    stderr: bytes | None
    unsettled: bool = False


@dataclass(frozen=True, slots=True)
class _Split:
    """Frames taken apart: the two streams, and the headers that merge them again."""

    stdout: bytes
    stderr: bytes
    index: bytes

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> _Split:
        return cls(
            b"".join(frame.payload for frame in frames if frame.kind is Kind.STDOUT),
            b"".join(frame.payload for frame in frames if frame.kind is Kind.STDERR),
            b"".join(HEADER.pack(frame.kind, frame.at_ms, len(frame.payload)) for frame in frames),
        )

    @classmethod
    def of_chunk(cls, row: Row) -> _Split:
        return cls(row["stdout"], row["stderr"], row["frame_index"])

    @classmethod
    def of_object(cls, body: bytes, row: Row) -> _Split:
        middle, end = row["stdout_length"], row["stdout_length"] + row["stderr_length"]
        return cls(body[:middle], body[middle:end], body[end:])

    def frames(self) -> list[Frame]:
        frames = []
        places = {Kind.STDOUT: 0, Kind.STDERR: 0}
        streams = {Kind.STDOUT: self.stdout, Kind.STDERR: self.stderr}
        for number, at_ms, length in HEADER.iter_unpack(self.index):
            kind = Kind(number)
            start = places[kind]
            places[kind] = start + length
            frames.append(Frame(kind, at_ms, streams[kind][start : start + length]))
        return frames


def _decode(body: bytes) -> list[Frame]:
    try:
        frames = decode_all(body)
    except FrameError as error:
        raise ProblemError("invalid-request", str(error)) from error
    if any(frame.kind not in (Kind.STDOUT, Kind.STDERR) for frame in frames):
        raise ProblemError("invalid-request", "only frames of standard output and standard error are output")
    return frames


class Outputs:
    """Takes in, keeps, and gives back output."""

    def __init__(self, database: Database, store: ObjectStore, bus: EventSink, limits: Limits) -> None:
        self._database = database
        self._store = store
        self._bus = bus
        self._inline_limit = limits.inline_output_bytes

    # -- taking in

    @timed("append_output")
    async def append(self, evaluation_id: str, *, attempt: int, frame: int, body: bytes) -> int:
        """Add frames, the first of which is number `frame` of its attempt, and return how many there are now.

        Those that are here already are left out; no frames at all only ask how many there are.

        Raises:
            ProblemError: `stale-attempt`, the attempt is void; `conflict`, a frame before these is missing;
                `invalid-request`, the body is not frames of output; `not-found`.
        """
        frames = _decode(body)
        while True:
            row = await self._add(evaluation_id, attempt, frame, frames) if frames else None
            if row is not None:
                break
            present, state = await self._frames_present(evaluation_id, attempt)
            if frames and frame + len(frames) <= present:
                return present
            if state not in HELD_STATES:
                raise ProblemError("stale-attempt", f"attempt {attempt} is void: the evaluation is {state}")
            if not frames:
                return present
            if frame > present:
                raise ProblemError("conflict", f"frame {frame} came before frame {present}")
            # Their beginning is here, or came in between.
            frames, frame = frames[present - frame :], present
        self._bus.publish(_output_event(row))
        if row["inline_bytes"] >= SEGMENT_BYTES:
            try:
                await self._flush(row)
            except ProblemError as error:
                # The output is safe where it is; the next batch, or the end, tries again.
                log.warning("output stays in the database for now", evaluation_id=evaluation_id, error=error.detail)
        return frame + len(frames)

    async def _add(self, evaluation_id: str, attempt: int, frame: int, frames: Sequence[Frame]) -> Row | None:
        """Put frames behind what is there. None if they do not begin where that ends, or the attempt is void."""
        split = _Split.of(frames)
        return await self._database.fetchrow(
            _APPEND,
            evaluation_id,
            attempt,
            frame,
            len(frames),
            len(split.stdout),
            len(split.stderr),
            split.stdout,
            split.stderr,
            split.index,
        )

    async def _frames_present(self, evaluation_id: str, attempt: int) -> tuple[int, State]:
        row = await self._database.fetchrow(
            "SELECT state, attempt, output_frames FROM evaluations WHERE id = $1", evaluation_id
        )
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        if row["attempt"] != attempt:
            raise ProblemError("stale-attempt", f"attempt {attempt} is void: it is at attempt {row['attempt']}")
        return row["output_frames"], State(row["state"])

    async def _flush(self, row: Row, *, everything: bool = False) -> None:
        """Move what lies in the database to the object store, a segment at a time; it stays where there is no such store."""
        if not self._store.in_use:
            return
        while True:
            chunks = await self._next_segment(row, everything=everything)
            if not chunks:
                return
            parts = [_Split.of_chunk(chunk) for chunk in chunks]
            body = b"".join(
                [*(part.stdout for part in parts), *(part.stderr for part in parts), *(part.index for part in parts)]
            )
            del parts
            first = chunks[0]
            name = f"output/{row['id']}/{row['attempt']}/{first['first_frame']:010}"
            stored = await self._store.write(name, body)
            async with self._database.transaction() as connection:
                object_id = await self._store.adopt(connection, stored)
                if not await self._replace(connection, chunks, object_id):
                    # The attempt became void, or another call did the same; the transaction is undone and the copy is swept.
                    raise ProblemError("unavailable", "the output changed while it was moved", retry_after=1)

    async def _next_segment(self, row: Row, *, everything: bool) -> list[Row]:
        chunks: list[Row] = []
        size = 0
        found = await self._database.fetch(
            """SELECT first_frame, stdout_length + stderr_length AS size FROM output_chunks
                WHERE evaluation_id = $1 AND attempt = $2 AND object_id IS NULL ORDER BY first_frame""",
            row["id"],
            row["attempt"],
        )
        for chunk in found:
            chunks.append(chunk)
            size += chunk["size"]
            if size >= SEGMENT_BYTES:
                break
        if not chunks or (size < SEGMENT_BYTES and not everything):
            return []
        return await self._database.fetch(_INLINE, row["id"], row["attempt"], len(chunks))

    @staticmethod
    async def _replace(connection: Connection, chunks: Sequence[Row], object_id: int) -> bool:
        first, last = chunks[0], chunks[-1]
        stdout, stderr = (sum(chunk[f"{name}_length"] for chunk in chunks) for name in ("stdout", "stderr"))
        present = await connection.fetchval(
            "UPDATE evaluations SET inline_bytes = inline_bytes - $3 WHERE id = $1 AND attempt = $2 RETURNING 1",
            first["evaluation_id"],
            first["attempt"],
            stdout + stderr,
        )
        removed = await connection.execute(
            """DELETE FROM output_chunks WHERE evaluation_id = $1 AND attempt = $2
                  AND first_frame BETWEEN $3 AND $4 AND object_id IS NULL""",
            first["evaluation_id"],
            first["attempt"],
            first["first_frame"],
            last["first_frame"],
        )
        if present is None or removed != f"DELETE {len(chunks)}":
            return False
        await connection.execute(
            """INSERT INTO output_chunks (evaluation_id, attempt, first_frame, frames, stdout_start,
                                          stdout_length, stderr_start, stderr_length, object_id)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
            first["evaluation_id"],
            first["attempt"],
            first["first_frame"],
            sum(chunk["frames"] for chunk in chunks),
            first["stdout_start"],
            stdout,
            first["stderr_start"],
            stderr,
            object_id,
        )
        return True

    # -- the end

    async def seal(self, row: Row) -> Digests | None:
        """Put an ending evaluation's output where it will stay, and hash what is stored there. None if the row is outdated.

        Raises:
            ProblemError: `unavailable`, part of a large output cannot be read back now.
        """
        if row["output_frames"] == 0:
            return Digests(EMPTY_SHA256, EMPTY_SHA256)
        size = row["stdout_bytes"] + row["stderr_bytes"]
        unsettled = False
        if size > self._inline_limit:
            try:
                await self._flush(row, everything=True)
            except ProblemError as error:
                # The result must not wait for the object store: upkeep moves the rest once it is back.
                log.warning("output stays in the database for now", evaluation_id=row["id"], error=error.detail)
                unsettled = True
        try:
            digests = await self._inline_digests(row) or await self._long_digests(row)
        except DamagedObjectError as error:
            # The outcome is true all the same. No hash is told, rather than one that vouches for the wrong bytes.
            log.error("output is damaged in the object store", evaluation_id=row["id"], object=str(error))  # noqa: TRY400
            digests = Digests(None, None)
        return Digests(digests.stdout, digests.stderr, unsettled) if digests else None

    async def _inline_digests(self, row: Row) -> Digests | None:
        if row["stdout_bytes"] + row["stderr_bytes"] > SEGMENT_BYTES:
            return None
        found = await self._database.fetchrow(_INLINE_DIGESTS, row["id"], row["attempt"], row["output_frames"])
        return Digests(found["stdout"], found["stderr"]) if found is not None and found["whole"] else None

    async def _long_digests(self, row: Row) -> Digests | None:
        stdout, stderr = hashlib.sha256(), hashlib.sha256()
        seen = 0
        async for split in self._splits(row):
            await asyncio.to_thread(stdout.update, split.stdout)
            await asyncio.to_thread(stderr.update, split.stderr)
            seen += len(split.stdout) + len(split.stderr)
        complete = seen == row["stdout_bytes"] + row["stderr_bytes"]
        return Digests(stdout.digest(), stderr.digest()) if complete else None

    async def _splits(self, row: Row) -> AsyncIterator[_Split]:
        for chunk in await self._database.fetch(_CHUNKS, row["id"], row["attempt"]):
            if chunk["object_id"] is not None:
                yield _Split.of_object(await self._store.read(chunk["object_id"]), chunk)
                continue
            inline = await self._database.fetchrow(
                "SELECT stdout, stderr, frame_index FROM output_chunks WHERE evaluation_id = $1 AND attempt = $2 AND first_frame = $3",
                row["id"],
                row["attempt"],
                chunk["first_frame"],
            )
            if inline is not None:
                yield _Split.of_chunk(inline)

    async def settle(self) -> int:
        """Move outputs that stayed in the database while the object store was away. Returns how many."""
        rows = await self._database.fetch("SELECT * FROM evaluations WHERE output_unsettled ORDER BY id LIMIT 20")
        for row in rows:
            await self._flush(row, everything=True)
            await self._database.execute("UPDATE evaluations SET output_unsettled = false WHERE id = $1", row["id"])
        return len(rows)

    # -- giving back

    async def _sizes(self, evaluation_id: str) -> Row:
        row = await self._database.fetchrow(
            "SELECT stdout_bytes AS stdout, stderr_bytes AS stderr, output_frames FROM evaluations WHERE id = $1",
            evaluation_id,
        )
        if row is None:
            raise ProblemError("not-found", f"there is no evaluation {evaluation_id}")
        return row

    @timed("read_output")
    async def read(
        self, evaluation_id: str, stream: Stream, start: int, length: int | None
    ) -> tuple[bytes, OutputInfo]:
        """Return bytes of a stream from offset `start`, at most `length` of them, and the stream's size so far.

        What lies beyond the end is empty. Without `length` the whole rest is returned, in memory: ask for pieces of what may be large.
        """
        size: int = (await self._sizes(evaluation_id))[stream]
        end = size if length is None else min(size, start + length)
        if start >= end:
            return b"", OutputInfo(size=size)
        pieces = []
        for row in await self._database.fetch(_RANGE[stream], evaluation_id, start, end):
            if row["object_id"] is None:
                pieces.append(row["piece"])
                continue
            offset = row["skip"] + (0 if stream == "stdout" else row["stdout_length"])
            pieces.append(await self._from_object(row["object_id"], offset, row["take"]))
        return b"".join(pieces), OutputInfo(size=size)

    @timed("read_frames")
    async def frames(self, evaluation_id: str, *, after: int, limit: int) -> tuple[list[Frame], int]:
        """Return output of both streams in order from frame number `after`, and the number of the next frame.

        At most `limit` frames and about 4 MiB; no frames means that there are no more yet.
        """
        rows = await self._database.fetch(_FRAMES, evaluation_id, after, _FRAMES_BYTES, limit)
        if not rows:
            await self._sizes(evaluation_id)
            return [], after
        frames: list[Frame] = []
        for row in rows:
            if len(frames) >= limit:
                break
            split = (
                _Split.of_chunk(row)
                if row["object_id"] is None
                else _Split.of_object(await self._from_object(row["object_id"]), row)
            )
            skip = max(0, after - row["first_frame"])
            frames += split.frames()[skip : skip + limit - len(frames)]
        return frames, max(after, rows[0]["first_frame"]) + len(frames)

    async def _from_object(self, object_id: int, start: int = 0, length: int | None = None) -> bytes:
        try:
            return await self._store.read(object_id, start, length)
        except DamagedObjectError as error:
            raise ProblemError("unavailable", "this part of the output is damaged in the object store") from error

    # -- deleting

    @staticmethod
    async def discard(connection: Connection, ids: Sequence[str]) -> tuple[int, int]:
        """Delete all output of evaluations, within the caller's transaction. Returns the objects' count and bytes."""
        rows = await connection.fetch(
            "DELETE FROM output_chunks WHERE evaluation_id = ANY($1) RETURNING object_id", list(ids)
        )
        return await ObjectStore.discard(connection, [row["object_id"] for row in rows if row["object_id"] is not None])


def _output_event(row: Row) -> Event:
    return Event(
        type=EventType.OUTPUT,
        evaluation_id=row["id"],
        seq=row["seq"],
        at=datetime.now(UTC),
        owner=row["owner"],
        actor="storage",
        state=State(row["state"]),
        attempt=row["attempt"],
        data={
            "stdout_bytes": row["stdout_bytes"],
            "stderr_bytes": row["stderr_bytes"],
            "frames": row["output_frames"],
        },
    )
