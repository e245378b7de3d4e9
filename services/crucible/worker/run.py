"""The work itself: see one claimed evaluation through, from its claim to the end of its attempt.

This one function is what every queue calls: the local claim loop and the Celery task alike. It creates nothing itself; it asks
the dispatcher, waits in place while there is no room (asking the queue again would let lower priorities overtake), and returns when
the attempt has ended, whoever ended it. The dispatcher records the result; the worker records only what never became a sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from crucible import contracts as c
from crucible import logs
from crucible.evaluation import Reason, terminal_state_of
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from crucible.clients import DispatcherClient, StorageClient

log = logs.get_logger("worker")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0
_WAIT_SECONDS = 30.0


class Held:
    """One evaluation in a worker's hands, and what the lease keeper has learned about it."""

    def __init__(self, claim: c.Claim) -> None:
        self.claim = claim
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
        if await self._create(held):
            await self._await_end(held)

    async def _create(self, held: Held) -> bool:
        """Have the sandbox made, waiting for room for as long as it takes. False if the attempt ended without one."""
        claim = held.claim
        request = c.SandboxRequest(
            attempt=claim.attempt,
            worker=self._worker,
            owner=claim.owner,
            spec=claim.spec,
            traceparent=claim.traceparent,
        )
        pause = _BACKOFF_FIRST_S
        while not held.let_go.done():
            try:
                await self._dispatcher.create(claim.evaluation_id, request)
            except CallFailedError as error:
                match error.slug:
                    case "no-capacity":
                        with contextlib.suppress(TimeoutError):
                            # Full jitter, so that waiting slots do not ask in step.
                            async with asyncio.timeout(pause * (0.5 + random.random())):  # noqa: S311 - spreads load, no secret
                                await asyncio.shield(held.let_go)
                        pause = min(pause * 2, _BACKOFF_MAX_S)
                    case "never-fits":
                        await self._finish(held, Reason.SCHEDULING, str(error.problem.get("detail", error)))
                        return False
                    case "stale-attempt":
                        return False
                    case _:
                        raise
            else:
                return True
        await self._end_without_sandbox(held)
        return False

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
        claim = held.claim
        waiting = asyncio.ensure_future(self._wait(claim))
        try:
            either: list[asyncio.Future[Any]] = [waiting, held.let_go]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                await self._dispatcher.stop(claim.evaluation_id, held.let_go.result())
            await waiting
        except CallFailedError as error:
            if error.status != 404:
                raise
            # The dispatcher was replaced while the sandbox ran: whatever it was, its result will never come.
            await self._finish(held, Reason.NODE_LOST, "the dispatcher no longer knows the sandbox")
        finally:
            waiting.cancel()

    async def _wait(self, claim: c.Claim) -> None:
        phase = c.SandboxPhase.STARTING
        while phase is not c.SandboxPhase.FINISHED:
            status = await self._dispatcher.wait(claim.evaluation_id, attempt=claim.attempt, wait_seconds=_WAIT_SECONDS)
            phase = status.phase

    async def _finish(self, held: Held, reason: Reason, detail: str) -> None:
        outcome = Outcome(state=terminal_state_of(reason), reason=reason, detail=detail)
        finish = c.Finish(attempt=held.claim.attempt, actor=self._worker, outcome=outcome)
        await _unless_stale(self._storage.finish(held.claim.evaluation_id, finish))


async def _unless_stale(call: Awaitable[c.EvaluationRecord]) -> None:
    """Await a storage call whose refusal as stale only means that someone else has settled the attempt."""
    try:
        await call
    except CallFailedError as error:
        if error.slug != "stale-attempt":
            raise
