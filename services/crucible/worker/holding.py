"""What a worker holds: its slots, the evaluations in them, and the leases that say so to storage.

Every kind of worker is this and a way to come by claims: the local one asks storage for the next, the broker's one for what it is told
of. A slot is held for an evaluation's whole life, so that what waits, waits where it is ordered. Each size class has slots of its own:
large evaluations never block small ones.
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
from crucible.limits import SizeClass
from crucible.resilience import CallFailedError
from crucible.worker.run import EvaluationRunner, Held

if TYPE_CHECKING:
    from crucible.clients import DispatcherClient, StorageClient
    from crucible.settings import WorkerSettings
    from crucible.tracing import Tracing

log = logs.get_logger("worker")

# Of the small slots: what medium and large ones may hold besides. A large one weighs as much as four small ones.
_SHARE = {SizeClass.SMALL: 1, SizeClass.MEDIUM: 2, SizeClass.LARGE: 4}
_LEASE_SECONDS = 30.0
# Once a renewal has failed, which itself may take a third of a lease, the next one cannot wait for its turn.
_RENEWALS_PER_LEASE, _TRIES_PER_LEASE = 3, 30


def slots_per_class(settings: WorkerSettings) -> dict[SizeClass, int]:
    """Return how many evaluations of each size class run at a time."""
    base = settings.slots or 2 * (os.cpu_count() or 1)
    return {size_class: max(1, base // share) for size_class, share in _SHARE.items()}


class Slots:
    """The slots of one size class."""

    def __init__(self, size_class: SizeClass, size: int) -> None:
        self.size_class = size_class
        self.size = size
        self.free = size
        self._freed = asyncio.Event()
        self._show()

    def take(self) -> None:
        """Take a slot; there must be a free one."""
        self.free -= 1
        self._show()

    def give_back(self) -> None:
        """Give a slot back that was taken."""
        self.free += 1
        self._freed.set()
        self._show()

    async def some_free(self) -> None:
        """Return once a slot is free; whoever comes first has it."""
        while not self.free:
            self._freed.clear()
            await self._freed.wait()

    def _show(self) -> None:
        metrics.SLOTS.labels(self.size_class, "used").set(self.size - self.free)
        metrics.SLOTS.labels(self.size_class, "free").set(self.free)


class Holding:
    """Sees claimed evaluations through, each in a slot that was taken for it, and keeps their leases meanwhile.

    Args:
        settings: slots and drain time.
        storage: where the leases are kept.
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
        self.instance = instance
        self.slots = {name: Slots(name, size) for name, size in slots_per_class(settings).items()}
        self._drain_seconds = settings.drain_seconds
        self._storage = storage
        self._tracing = tracing
        self._runner = EvaluationRunner(storage, dispatcher, instance)
        self._held: dict[str, Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lease_seconds = _LEASE_SECONDS
        self._some_held = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to keep leases."""
        self._keeper = asyncio.create_task(self._keep_leases(), name="leases")
        log.info("worker started", slots={str(name): slots.size for name, slots in self.slots.items()})

    def hold(self, claim: c.Claim, slots: Slots) -> asyncio.Task[None]:
        """See a claim through in a slot that the caller has taken, and give the slot back; the task ends with the attempt."""
        self._lease_seconds = claim.lease_seconds
        task = asyncio.create_task(self._hold(claim, slots), name=f"hold-{claim.evaluation_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Let what runs finish for a while, then give the rest back to the queue. Nothing may be added any more.

        What runs in a sandbox that outlives its worker is left to run: whoever watches it keeps its lease and records its end.
        """
        for held in self._held.values():
            if held.durable:
                held.release(Reason.PREEMPTED)
        if self._tasks:
            log.info("draining", running=len(self._tasks), seconds=self._drain_seconds)
            await asyncio.wait(self._tasks, timeout=self._drain_seconds)
        for held in self._held.values():
            held.release(Reason.PREEMPTED)
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._keeper:
            await cancelled(self._keeper)

    async def _hold(self, claim: c.Claim, slots: Slots) -> None:
        held = self._held[claim.evaluation_id] = Held(claim)
        self._some_held.set()
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
            slots.give_back()

    async def _see_through(self, held: Held) -> None:
        try:
            await self._runner.see_through(held)
        except CallFailedError as error:
            # Not renewed any more, so the lease ends and the evaluation is queued again: nothing is lost.
            log.warning("gave up on an attempt; it will be queued again", attempt=held.claim.attempt, error=str(error))

    async def _keep_leases(self) -> None:
        failed = False
        while True:
            await self._some_held.wait()
            await asyncio.sleep(self._lease_seconds / (_TRIES_PER_LEASE if failed else _RENEWALS_PER_LEASE))
            held = [c.Held(evaluation_id=name, attempt=one.claim.attempt) for name, one in self._held.items()]
            if not held:
                self._some_held.clear()
                continue
            try:
                answer = await self._storage.renew(c.LeaseRenewal(worker=self.instance, held=held))
            except CallFailedError as error:
                failed = True
                log.warning("renewing leases failed; trying again", error=str(error))
                continue
            failed = False
            for name in answer.lost:
                self._let_go(name, Reason.NODE_LOST)
            for name in answer.cancelled:
                self._let_go(name, Reason.CANCELLED_BY_USER)

    def _let_go(self, name: str, reason: Reason) -> None:
        if held := self._held.get(name):
            held.release(reason)


async def cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
