"""Brings what one sandbox did into storage: that it runs, its output in batches, and how it ended; in that order, and nothing lost.

A run that is over in a moment is told as one: its end says when it began, and storage records both.

Output is placed by the number of its first frame, so that whoever takes over from another goes on where storage is.

A call that fails is made again until storage is back; meanwhile the sandbox's output waits, and the sandbox with it. Two
answers end the trying: that the attempt is not the evaluation's own any more, and that what was sent is not acceptable, which is a
mistake of the platform's and becomes the attempt's end, in plain sight.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, TypeVar

from crucible import contracts as c
from crucible import logs
from crucible.evaluation import Reason, State
from crucible.frames import HEADER, MAX_PAYLOAD, Frame
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from crucible.clients import StorageClient

log = logs.get_logger("shipping")
T = TypeVar("T")

# A run that ends sooner than this is not announced on its own, which spares half of the short ones' calls.
_ANNOUNCE_SECONDS = 0.02
# A follower sees output this late at most; a short run's whole output travels in one call.
_FLUSH_SECONDS = 0.03
_FLUSH_BYTES = 512 * 1024
_BATCH_BYTES = MAX_PAYLOAD
ROOM_BYTES = 4 * 1024 * 1024
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 5.0
# Answers of storage that no repetition can change: there is no such evaluation, or the attempt is void; and: the call is wrong.
_STALE_SLUGS = frozenset({"not-found", "stale-attempt"})
_REFUSED_STATUSES = frozenset({400, 404, 405, 409, 413, 415, 422})


class StaleAttemptError(Exception):
    """Storage refused: the attempt is void, or a cancel was asked for."""


class RefusedError(Exception):
    """Storage will never take this: the sender and it do not understand each other."""


async def until_taken(evaluation_id: str, call: Callable[[], Awaitable[T]]) -> T:
    """Make a call to storage until it has taken it, and return its answer.

    Raises:
        StaleAttemptError: it never will, since the attempt is void.
        RefusedError: it never will, since the call is wrong.
    """
    pause = _RETRY_FIRST_S
    while True:
        try:
            return await call()
        except CallFailedError as error:
            if error.slug in _STALE_SLUGS:
                raise StaleAttemptError from error
            if error.status in _REFUSED_STATUSES:
                raise RefusedError(f"storage refused the sandbox's report: {error}"[:500]) from error
            log.warning("storage did not take it; trying again", evaluation_id=evaluation_id, error=str(error))
        await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads load, no secret
        pause = min(pause * 2, _RETRY_MAX_S)


class Shipper:
    """Ships one attempt. `run` does the work; the rest is told to it as it happens.

    Args:
        storage: where to.
        evaluation_id: whose attempt.
        attempt: its number.
        actor: who tells it.
        sandbox: name of the sandbox.
        on_stale: called once when storage says that the attempt is void.
        first_frame: number of the first frame of output that will be told.
        room_bytes: output that may wait here before the sandbox is made to wait.
        collected: whether a cluster keeps something of the sandbox that may go once its end is recorded.
    """

    def __init__(
        self,
        storage: StorageClient,
        evaluation_id: str,
        attempt: int,
        *,
        actor: str,
        sandbox: str,
        on_stale: Callable[[], None],
        first_frame: int = 0,
        room_bytes: int = ROOM_BYTES,
        collected: bool = False,
    ) -> None:
        self._storage = storage
        self._id = evaluation_id
        self._attempt = attempt
        self._actor = actor
        self._sandbox = sandbox
        self._on_stale = on_stale
        self._started_at: datetime | None = None
        self._announced = False
        self._announce_due = False
        self._frames: list[Frame] = []
        self._bytes = 0
        # Number of the first frame that waits here.
        self._position = first_frame
        self._room_bytes = room_bytes
        self._collected = collected
        self._due = False
        self._outcome: Outcome | None = None
        self._refusal: str | None = None
        self._dropping = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def started(self, at: datetime) -> None:
        """Tell that the code runs."""
        self._started_at = at
        asyncio.get_running_loop().call_later(_ANNOUNCE_SECONDS, self._make_announcement_due)

    def _make_announcement_due(self) -> None:
        self._announce_due = True
        self._wake.set()

    def add(self, frame: Frame) -> None:
        """Tell a piece of output."""
        if self._dropping:
            return
        if not self._frames:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)
        self._frames.append(frame)
        self._bytes += HEADER.size + len(frame.payload)
        if self._bytes >= _FLUSH_BYTES:
            self._flush()
        if self._bytes >= self._room_bytes:
            self._room.clear()

    def _flush(self) -> None:
        self._due = True
        self._wake.set()

    async def room(self) -> None:
        """Wait while too much output is on its way already."""
        await self._room.wait()

    def finished(self, outcome: Outcome) -> None:
        """Tell the end; nothing may be told after it."""
        self._outcome = outcome
        self._wake.set()

    async def run(self) -> None:
        """Ship until the end is recorded, or the attempt has turned out to be void."""
        while True:
            try:
                if self._announce_due and not self._announced and not self._outcome:
                    await self._announce()
                elif self._frames and (self._due or self._outcome):
                    await self._ship_batch()
                elif self._outcome:
                    await self._finish(self._outcome)
                    return
                else:
                    await self._wake.wait()
                    self._wake.clear()
            except RefusedError as error:
                log.exception("storage refuses a report", evaluation_id=self._id)
                if self._dropping:
                    return
                self._refusal = str(error)
                self._drop_output()

    def _drop_output(self) -> None:
        self._dropping = True
        self._frames.clear()
        self._bytes = 0
        self._room.set()
        self._on_stale()

    async def _announce(self) -> None:
        running = c.Running(attempt=self._attempt, actor=self._actor, sandbox=self._sandbox)
        self._announced = True
        try:
            await until_taken(self._id, lambda: self._storage.running(self._id, running))
        except StaleAttemptError:
            # Void, or a cancel was recorded before the code began. Either way the end is still told: a recorded cancel waits for it.
            self._on_stale()

    async def _ship_batch(self) -> None:
        size, count = 0, 0
        for frame in self._frames:
            size += HEADER.size + len(frame.payload)
            if count and size > _BATCH_BYTES:
                break
            count += 1
        batch = self._frames[:count]
        try:
            await until_taken(
                self._id,
                lambda: self._storage.append_output(self._id, batch, attempt=self._attempt, frame=self._position),
            )
        except StaleAttemptError:
            self._drop_output()
            return
        self._position += count
        del self._frames[:count]
        self._bytes -= sum(HEADER.size + len(frame.payload) for frame in batch)
        self._due = self._bytes >= _FLUSH_BYTES
        if self._frames and not self._due:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)
        if self._bytes < self._room_bytes:
            self._room.set()

    async def _finish(self, outcome: Outcome) -> None:
        if self._refusal:
            outcome = Outcome(state=State.FAILED, reason=Reason.SANDBOX_ERROR, detail=self._refusal)
        finish = c.Finish(
            attempt=self._attempt,
            actor=self._actor,
            outcome=outcome,
            started_at=self._started_at,
            collected=self._collected,
        )
        with contextlib.suppress(StaleAttemptError):
            await until_taken(self._id, lambda: self._storage.finish(self._id, finish))
