"""The work itself: see one claimed evaluation through, from its claim to the end of its attempt.

This one function is what every queue calls: the local claim loop and the Celery task alike. It creates nothing itself; it asks
the dispatcher, waits in place while there is no room (asking the queue again would let lower priorities overtake), and returns when
the attempt has ended, whoever ended it. The result is recorded by whoever sees the sandbox; the worker records only what never became one.

A sandbox in a cluster outlives the dispatcher that made it. There a dispatcher or cluster that does not answer is no news of the attempt, which
stays the worker's for as long as the lease is. It outlives the worker too, which leaves it alone when it is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from crucible import contracts as c
from crucible import logs
from crucible.evaluation import Reason, terminal_state_of
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.clients import DispatcherClient, StorageClient

log = logs.get_logger("worker")
T = TypeVar("T")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0
_WAIT_SECONDS = 30.0
# Once the attempt is not the worker's any more, how long it tries to see a durable sandbox off; someone else settles the rest.
_LEAVE_SECONDS = 30.0
# No answer, or none from the service itself.
_PASSING_STATUSES = frozenset({None, 502, 503, 504})
_WAITING_SLUGS = frozenset({"no-capacity", "cluster-unavailable"})


class Held:
    """One evaluation in a worker's hands, and what the lease keeper has learned about it."""

    def __init__(self, claim: c.Claim) -> None:
        self.claim = claim
        # Whether it has a sandbox that someone else sees through, if need be.
        self.durable = False
        self.let_go: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()

    def release(self, reason: Reason) -> None:
        """Tell the holder to end the attempt: cancelled, lost to another worker, or given back."""
        if not self.let_go.done():
            self.let_go.set_result(reason)


class EvaluationRunner:
    """Sees claims through with one storage, one dispatcher and one worker name."""

    def __init__(self, storage: StorageClient, dispatcher: DispatcherClient, worker: str) -> None:
        self._storage = storage
        self._dispatcher = dispatcher
        self._worker = worker

    async def see_through(self, held: Held) -> None:
        """Run one claimed evaluation; returns when its attempt has ended and nothing of it is left running.

        Raises:
            CallFailedError: storage or dispatcher stayed unreachable; the lease ends and the evaluation is queued again.
        """
        sandbox = await self._create(held)
        if sandbox:
            held.durable = sandbox.durable
            await self._await_end(held)

    async def _create(self, held: Held) -> c.SandboxStatus | None:
        """Have the sandbox made, waiting for room and for an answer as long as it takes. None if the attempt ended without one.

        Asking again is harmless: a sandbox that was made already is found. To give up would cost the evaluation one of its attempts for
        nothing but a dispatcher that was replaced.
        """
        claim = held.claim
        request = c.SandboxRequest(
            attempt=claim.attempt,
            worker=self._worker,
            owner=claim.owner,
            spec=claim.spec,
            traceparent=claim.traceparent,
        )
        pause = _BACKOFF_FIRST_S
        perhaps_made = False
        while not held.let_go.done():
            try:
                return await self._dispatcher.create(claim.evaluation_id, request)
            except CallFailedError as error:
                if not _passes(error):
                    await self._take_refusal(held, error)
                    return None
                if error.slug not in _WAITING_SLUGS:
                    perhaps_made = True
                    log.info("no word of a new sandbox; asking again", error=str(error))
            await _pause(held, pause)
            pause = min(pause * 2, _BACKOFF_MAX_S)
        if perhaps_made:
            await self._patiently(held, self._stopping(held), perhaps_made=True)
        await self._end_without_sandbox(held)
        return None

    def _stopping(self, held: Held) -> Callable[[], Awaitable[object]]:
        """Return the call that ends the sandbox, if there is one, of an attempt that is to be let go, for the reason that it is."""
        return partial(
            self._dispatcher.stop, held.claim.evaluation_id, held.let_go.result(), attempt=held.claim.attempt
        )

    async def _take_refusal(self, held: Held, error: CallFailedError) -> None:
        """Record that there will be no sandbox, if that is what the dispatcher said."""
        detail = str(error.problem.get("detail", error))
        match error.slug:
            case "never-fits":
                await self._finish(held, Reason.SCHEDULING, detail)
            case "sandbox-refused":
                await self._finish(held, Reason(error.problem.get("reason", Reason.SANDBOX_ERROR)), detail)
            case "stale-attempt":
                return
            case _:
                raise error

    async def _end_without_sandbox(self, held: Held) -> None:
        match held.let_go.result():
            case Reason.NODE_LOST:
                return
            case Reason.PREEMPTED:
                release = c.Release(worker=self._worker, attempt=held.claim.attempt, detail="the worker is stopping")
                await _unless_stale(self._storage.release(held.claim.evaluation_id, release))
            case reason:
                await self._finish(held, reason, "cancelled on request while it waited for room")

    async def _await_end(self, held: Held) -> None:
        waiting = asyncio.ensure_future(self._wait(held))
        try:
            either: list[asyncio.Future[Any]] = [waiting, held.let_go]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                if held.durable and held.let_go.result() is Reason.PREEMPTED:
                    return
                await self._patiently(held, self._stopping(held))
            await waiting
        except CallFailedError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            # The dispatcher was replaced while the sandbox ran, or the sandbox was removed: its result will never come.
            await self._finish(held, Reason.NODE_LOST, "the dispatcher no longer knows the sandbox")
        finally:
            waiting.cancel()

    async def _wait(self, held: Held) -> None:
        claim = held.claim
        ask = partial(self._dispatcher.wait, claim.evaluation_id, attempt=claim.attempt, wait_seconds=_WAIT_SECONDS)
        phase = c.SandboxPhase.STARTING
        while phase is not c.SandboxPhase.FINISHED:
            phase = (await self._patiently(held, ask)).phase

    async def _patiently(self, held: Held, call: Callable[[], Awaitable[T]], *, perhaps_made: bool = False) -> T:
        """Make a call about a sandbox.

        About one that is durable, or that may be there without anybody's having said so, until it is answered, or the attempt has not
        been ours for a while.
        """
        pause, leave = _BACKOFF_FIRST_S, math.inf
        while True:
            try:
                return await call()
            except CallFailedError as error:
                now = asyncio.get_running_loop().time()
                if held.let_go.done():
                    leave = min(leave, now + _LEAVE_SECONDS)
                if not (held.durable or perhaps_made) or not _passes(error) or now >= leave:
                    raise
                log.info(
                    "no word of the sandbox; asking again", evaluation_id=held.claim.evaluation_id, error=str(error)
                )
            await asyncio.sleep(_jittered(pause))
            pause = min(pause * 2, _BACKOFF_MAX_S)

    async def _finish(self, held: Held, reason: Reason, detail: str) -> None:
        outcome = Outcome(state=terminal_state_of(reason), reason=reason, detail=detail)
        finish = c.Finish(attempt=held.claim.attempt, actor=self._worker, outcome=outcome)
        await _unless_stale(self._storage.finish(held.claim.evaluation_id, finish))


def _passes(error: CallFailedError) -> bool:
    """Whether a call failed for a reason that is over by itself, and says nothing about the sandbox."""
    return error.status in _PASSING_STATUSES or error.slug in _WAITING_SLUGS


def _jittered(pause: float) -> float:
    """Spread what many slots do at once."""
    return pause * (0.5 + random.random())  # noqa: S311 - spreads load, no secret


async def _pause(held: Held, seconds: float) -> None:
    """Wait about so long, or until the attempt is to be let go."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_jittered(seconds)):
            await asyncio.shield(held.let_go)


async def _unless_stale(call: Awaitable[c.EvaluationRecord]) -> None:
    """Await a storage call whose refusal as stale only means that someone else has settled the attempt."""
    try:
        await call
    except CallFailedError as error:
        if error.slug != "stale-attempt":
            raise
