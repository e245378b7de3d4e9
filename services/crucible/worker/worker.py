"""The worker of the `local` profile: claims from the store for as long as a slot is free. What waits, waits in the table in strict order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from crucible import contracts as c
from crucible import logs
from crucible.health import Heartbeat
from crucible.resilience import CallFailedError
from crucible.worker.holding import Holding, Slots, cancelled

if TYPE_CHECKING:
    from crucible.clients import StorageClient

log = logs.get_logger("worker")

_CLAIM_WAIT_S = 20.0
_RETRY_S = 0.5
# A claim loop turns at least once per long-poll; three missed turns mean that it hangs.
_HEARTBEAT_LIMIT_S = 3 * _CLAIM_WAIT_S


class Worker:
    """Claims and sees evaluations through until it is drained.

    Args:
        storage: where to claim.
        holding: slots, and what is done with a claim.
    """

    def __init__(self, storage: StorageClient, holding: Holding) -> None:
        self._storage = storage
        self._holding = holding
        self._loops: list[asyncio.Task[None]] = []
        self.heartbeat = Heartbeat(_HEARTBEAT_LIMIT_S)

    async def start(self) -> None:
        """Begin to claim."""
        self._holding.start()
        for slots in self._holding.slots.values():
            self._loops.append(asyncio.create_task(self._claim_loop(slots), name=f"claim-{slots.size_class}"))

    async def drain(self) -> None:
        """Claim nothing more; let what runs finish for a while, then give the rest back to the queue."""
        await cancelled(*self._loops)
        self._loops.clear()
        await self._holding.drain()

    async def _claim_loop(self, slots: Slots) -> None:
        while True:
            await slots.some_free()
            self.heartbeat.beat()
            request = c.ClaimRequest(
                worker=self._holding.instance, wanted={slots.size_class: slots.free}, wait_seconds=_CLAIM_WAIT_S
            )
            try:
                answer = await self._storage.claim(request)
            except CallFailedError as error:
                log.warning("claiming failed; trying again", size_class=slots.size_class, error=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            for claim in answer.claims:
                slots.take()
                self._holding.hold(claim, slots)
