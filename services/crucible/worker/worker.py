"""The worker of the `local` profile: claims from the store for as long as a slot is free, and keeps the leases of what it holds.

A slot is held for an evaluation's whole life, so what waits, waits in the table in strict order. Each size class has slots of its own:
large evaluations never block small ones. The worker never touches a sandbox or the database itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import structlog

from crucible import contracts as c
from crucible import logs, metrics
from crucible.evaluation import Reason
from crucible.health import Heartbeat
from crucible.limits import SizeClass
from crucible.resilience import CallFailedError
from crucible.worker.run import EvaluationRunner, Held

if TYPE_CHECKING:
    from crucible.clients import DispatcherClient, StorageClient
    from crucible.settings import WorkerSettings
    from crucible.tracing import Tracing

log = logs.get_logger("worker")

_CLAIM_WAIT_S = 20.0
_RETRY_S = 0.5
# A claim loop turns at least once per long-poll; three missed turns mean that it hangs.
_HEARTBEAT_LIMIT_S = 3 * _CLAIM_WAIT_S
# Of the small slots: what medium and large ones may hold besides. A large one weighs as much as four small ones.
_SHARE = {SizeClass.SMALL: 1, SizeClass.MEDIUM: 2, SizeClass.LARGE: 4}


def slots_per_class(settings: WorkerSettings) -> dict[SizeClass, int]:
    """Return how many evaluations of each size class run at a time."""
    base = settings.slots or 2 * (os.cpu_count() or 1)
    return {size_class: max(1, base // share) for size_class, share in _SHARE.items()}


class _Pool:
    """The slots of one size class."""

    def __init__(self, size_class: SizeClass, size: int) -> None:
        self.size_class = size_class
        self.free = size
        self._size = size
        self._freed = asyncio.Event()
        self._show()

    def take(self) -> None:
        self.free -= 1
        self._show()

    def give_back(self) -> None:
        self.free += 1
        self._freed.set()
        self._show()

    async def some_free(self) -> None:
        while not self.free:
            self._freed.clear()
            await self._freed.wait()

    def _show(self) -> None:
        metrics.SLOTS.labels(self.size_class, "used").set(self._size - self.free)
        metrics.SLOTS.labels(self.size_class, "free").set(self.free)


class Worker:
    """Claims and sees evaluations through until it is drained.

    Args:
        settings: slots and drain time.
        storage: where to claim.
        dispatcher: who makes sandboxes.
        instance: name under which leases are held; unique per start.
        tracing: continues each submission's trace.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        storage: StorageClient,
        dispatcher: DispatcherClient,
        *,
        instance: str,
        tracing: Tracing,
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._instance = instance
        self._tracing = tracing
        self._runner = EvaluationRunner(storage, dispatcher, instance)
        self._held: dict[str, Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._lease_seconds = 30.0
        self.heartbeat = Heartbeat(_HEARTBEAT_LIMIT_S)

    async def start(self) -> None:
        """Begin to claim."""
        slots = slots_per_class(self._settings)
        for size_class, size in slots.items():
            loop = self._claim_loop(_Pool(size_class, size))
            self._loops.append(asyncio.create_task(loop, name=f"claim-{size_class}"))
        self._loops.append(asyncio.create_task(self._keep_leases(), name="leases"))
        log.info("worker started", slots={str(name): size for name, size in slots.items()})

    async def drain(self) -> None:
        """Claim nothing more; let what runs finish for a while, then give the rest back to the queue."""
        claiming, leases = self._loops[:-1], self._loops[-1:]
        await _cancel(claiming)
        if self._tasks:
            log.info("draining", running=len(self._tasks), seconds=self._settings.drain_seconds)
            await asyncio.wait(self._tasks, timeout=self._settings.drain_seconds)
        for held in self._held.values():
            held.release(Reason.PREEMPTED)
        if self._tasks:
            await asyncio.wait(self._tasks)
        await _cancel(leases)
        self._loops.clear()

    async def _claim_loop(self, pool: _Pool) -> None:
        while True:
            await pool.some_free()
            self.heartbeat.beat()
            request = c.ClaimRequest(
                worker=self._instance, wanted={pool.size_class: pool.free}, wait_seconds=_CLAIM_WAIT_S
            )
            try:
                answer = await self._storage.claim(request)
            except CallFailedError as error:
                log.warning("claiming failed; trying again", size_class=pool.size_class, error=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            for claim in answer.claims:
                self._lease_seconds = claim.lease_seconds
                pool.take()
                task = asyncio.create_task(self._hold(claim, pool), name=f"hold-{claim.evaluation_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _hold(self, claim: c.Claim, pool: _Pool) -> None:
        held = self._held[claim.evaluation_id] = Held(claim)
        try:
            with (
                structlog.contextvars.bound_contextvars(evaluation_id=claim.evaluation_id),
                self._tracing.span(
                    "evaluation.run",
                    traceparent=claim.traceparent,
                    evaluation_id=claim.evaluation_id,
                    attempt=claim.attempt,
                ),
            ):
                await self._see_through(held)
        finally:
            if self._held.get(claim.evaluation_id) is held:
                del self._held[claim.evaluation_id]
            pool.give_back()

    async def _see_through(self, held: Held) -> None:
        try:
            await self._runner.see_through(held)
        except CallFailedError as error:
            # Not renewed any more, so the lease ends and the evaluation is queued again: nothing is lost.
            log.warning("gave up on an attempt; it will be queued again", attempt=held.claim.attempt, error=str(error))

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            if not self._held:
                continue
            held = [c.Held(evaluation_id=name, attempt=one.claim.attempt) for name, one in self._held.items()]
            try:
                answer = await self._storage.renew(c.LeaseRenewal(worker=self._instance, held=held))
            except CallFailedError as error:
                log.warning("renewing leases failed; trying again", error=str(error))
                continue
            for name in answer.lost:
                self._let_go(name, Reason.NODE_LOST)
            for name in answer.cancelled:
                self._let_go(name, Reason.CANCELLED_BY_USER)

    def _let_go(self, name: str, reason: Reason) -> None:
        if held := self._held.get(name):
            held.release(reason)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
