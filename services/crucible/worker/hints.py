"""What a worker does with a broker's message: a hint that an evaluation waits, which may come late, twice, or for nothing.

A message stays unacknowledged for as long as its evaluation is held, so that the broker hands out no more than there are slots. When the
connection is lost, the broker hands out again what still runs here; such a message joins the run, and holds its slot's place as the
first one did. Whatever becomes of a message, storage has the truth: it hands an evaluation to one asker only.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from enum import StrEnum
from typing import TYPE_CHECKING

from crucible import contracts as c
from crucible import logs, metrics
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from crucible.clients import StorageClient
    from crucible.limits import SizeClass
    from crucible.worker.holding import Holding, Slots

log = logs.get_logger("worker.hints")

_PAUSE_FIRST_S = 0.1
_PAUSE_MOST_S = 10.0
# After this long without storage a message goes to the dead letter queue, from where storage takes it up when it is back.
_BUDGET_S = 300.0
# On shutdown, how long an answer of storage that is under way may take; what it would claim is then left to its lease.
_LAST_ANSWER_S = 5.0


class Verdict(StrEnum):
    """What is to become of a message."""

    DONE = "done"
    """Acknowledge it: its evaluation has been seen through here, or does not wait any more."""
    RETURNED = "returned"
    """Give it back for another worker: this one is stopping."""
    GIVEN_UP = "given_up"
    """Hand it to the dead letter queue: storage did not answer for too long."""
    LOST = "lost"
    """Nothing can become of it: its connection is gone, and the broker hands it out again."""


class Hints:
    """Follows hints up, each size class within its slots. Lives in one event loop; `lost_connection` and the rest are called there."""

    def __init__(self, storage: StorageClient, holding: Holding, *, budget_seconds: float = _BUDGET_S) -> None:
        self._storage = storage
        self._holding = holding
        self._budget = budget_seconds
        self._under_way: dict[str, asyncio.Task[Verdict]] = {}
        self._asking: set[asyncio.Task[Any]] = set()
        # Claims of a class one after the other, as the broker handed the messages out: side by side, a lower priority could win.
        self._turns: defaultdict[SizeClass, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._draining = asyncio.Event()
        self._connection: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._storage_answers = True

    async def follow(self, evaluation_id: str, size_class: SizeClass) -> Verdict:
        """Follow one hint up; returns once its message can be settled."""
        work = self._under_way.get(evaluation_id)
        if work is None:
            work = asyncio.create_task(self._work(evaluation_id, size_class), name=f"hint-{evaluation_id}")
            self._under_way[evaluation_id] = work
            work.add_done_callback(lambda _: self._under_way.pop(evaluation_id))
        await asyncio.wait((work, self._connection), return_when=asyncio.FIRST_COMPLETED)
        verdict = work.result() if work.done() else Verdict.LOST
        metrics.WORKER_HINTS.labels(verdict).inc()
        return verdict

    def lost_connection(self) -> None:
        """Let go of every message that has come so far; what runs goes on."""
        self._connection.set_result(None)
        self._connection = asyncio.get_running_loop().create_future()

    async def drain(self) -> None:
        """Follow no further hint up; let what runs finish for a while, then give the rest back to the queue."""
        self._draining.set()
        if self._asking:
            _, late = await asyncio.wait(self._asking, timeout=_LAST_ANSWER_S)
            for task in late:
                task.cancel()
        await self._holding.drain()
        if self._under_way:
            await asyncio.wait(self._under_way.values())

    async def _work(self, evaluation_id: str, size_class: SizeClass) -> Verdict:
        slots = self._holding.slots[size_class]
        if not await self._slot(slots):
            return Verdict.RETURNED
        try:
            async with self._turns[size_class]:
                answer = await self._claim(evaluation_id)
        except BaseException:
            slots.give_back()
            raise
        if isinstance(answer, Verdict) or answer.claim is None:
            slots.give_back()
            return answer if isinstance(answer, Verdict) else Verdict.DONE
        await self._holding.hold(answer.claim, slots)
        return Verdict.DONE

    async def _slot(self, slots: Slots) -> bool:
        """Take a slot. There is none to wait for but after a reconnection: the broker hands out as many messages as there are slots."""
        while not (slots.free or self._draining.is_set()):
            await self._unless_draining(slots.some_free())
        if self._draining.is_set():
            return False
        slots.take()
        return True

    async def _claim(self, evaluation_id: str) -> c.ClaimAnswer | Verdict:
        """Ask storage, again and again while it does not answer: giving the message back would let lower priorities overtake."""
        # The same for every message of this evaluation, so that a claim whose answer was lost is found again by the next.
        request = c.ClaimOne(worker=self._holding.instance, key=f"{self._holding.instance}/{evaluation_id}")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._budget
        longest = _PAUSE_FIRST_S
        while not self._draining.is_set():
            try:
                answer = await self._ask(evaluation_id, request)
            except CallFailedError as error:
                self._note_storage(error)
            else:
                self._note_storage(None)
                return answer
            # Full jitter, so that the slots do not ask in step.
            pause = random.uniform(0, longest)  # noqa: S311 - spreads load, no secret
            if loop.time() + pause > deadline:
                return Verdict.GIVEN_UP
            await self._unless_draining(asyncio.sleep(pause))
            longest = min(longest * 2, _PAUSE_MOST_S)
        return Verdict.RETURNED

    async def _ask(self, evaluation_id: str, request: c.ClaimOne) -> c.ClaimAnswer:
        asking = asyncio.create_task(self._storage.claim_one(evaluation_id, request))
        self._asking.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            if asking.cancelled():
                raise CallFailedError("storage", "it did not answer before the worker stopped") from None
            raise
        finally:
            self._asking.discard(asking)

    def _note_storage(self, error: CallFailedError | None) -> None:
        """Log the first failure of an outage and its end, not each of what may be hundreds."""
        if (error is None) == self._storage_answers:
            return
        self._storage_answers = error is None
        if error is None:
            log.info("storage answers again")
        else:
            log.warning("storage does not answer; holding the messages and asking again", error=str(error))

    async def _unless_draining(self, wait: Coroutine[Any, Any, None]) -> None:
        waiting = asyncio.ensure_future(wait)
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((waiting, draining), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            draining.cancel()
