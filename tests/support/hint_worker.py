"""A worker of the simplest kind: takes one message at a time from a real broker, claims what it names, runs nothing, and reports an end.

It shows what storage's side of the queue does with any consumer that keeps to the contract. How the platform's own worker consumes
(slots, prefetch, reconnecting, draining) is shown where that is tested.
"""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crucible import contracts as c
from crucible.broker.connection import close, connect
from crucible.broker.topology import queue_name
from crucible.evaluation import Reason, State
from crucible.limits import SizeClass
from tests.support.storage import outcome_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crucible.broker.urls import BrokerUrl
    from crucible.clients import StorageClient
    from crucible.settings import BrokerSettings


@dataclass(frozen=True)
class Taken:
    """A message that was taken and not acknowledged yet."""

    evaluation_id: str
    tag: Any
    priority: int | None
    traceparent: str | None


class HintWorker:
    """One connection, one thread."""

    def __init__(self, url: BrokerUrl, settings: BrokerSettings, storage: StorageClient) -> None:
        self.name = f"hint-worker-{uuid.uuid4().hex[:6]}"
        self.ran: list[str] = []
        self.void = 0
        self._url = url
        self._settings = settings
        self._storage = storage
        self._connection: Any = None
        self._thread = ThreadPoolExecutor(1)

    async def _call(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _open(self) -> None:
        self._connection = connect(self._url, self._settings)
        self._channel = self._connection.channel()

    async def open(self) -> None:
        """Connect."""
        await self._call(self._open)

    async def close(self) -> None:
        """Leave; what was not acknowledged goes back."""
        if self._connection is not None:
            await self._call(close, self._connection)
        self._thread.shutdown()

    async def take(self, size: SizeClass = SizeClass.SMALL) -> Taken | None:
        """Take the first message of a queue, if there is one."""
        message = await self._call(self._channel.basic_get, queue_name(size))
        if message is None:
            return None
        priority = message.properties.get("priority") if message.properties else None
        headers = message.headers or {}
        return Taken(headers["id"], message.delivery_tag, priority, headers.get("traceparent"))

    async def ack(self, taken: Taken) -> None:
        """Be done with a message."""
        await self._call(self._channel.basic_ack, taken.tag)

    async def reject(self, taken: Taken) -> None:
        """Have the broker give a message up."""
        await self._call(lambda: self._channel.basic_reject(taken.tag, requeue=False))

    async def drop(self, count: int, size: SizeClass = SizeClass.SMALL) -> int:
        """Acknowledge messages without looking at them, as a worker does that dies before it claims."""
        for dropped in range(count):
            taken = await self.take(size)
            if taken is None:
                return dropped
            await self.ack(taken)
        return count

    async def claim(self, taken: Taken) -> c.ClaimAnswer:
        """Ask for what a message names."""
        request = c.ClaimOne(worker=self.name, key=uuid.uuid4().hex)
        return await self._storage.claim_one(taken.evaluation_id, request)

    async def work_one(self, size: SizeClass = SizeClass.SMALL) -> bool:
        """Take, claim, report the end, acknowledge. False if nothing was there."""
        taken = await self.take(size)
        if taken is None:
            return False
        answer = await self.claim(taken)
        if answer.claim is None:
            self.void += 1
        else:
            attempt = answer.claim.attempt
            await self._storage.running(
                taken.evaluation_id, c.Running(attempt=attempt, actor=self.name, sandbox="none")
            )
            finish = c.Finish(attempt=attempt, actor=self.name, outcome=outcome_of(Reason.EXIT_ZERO))
            record = await self._storage.finish(taken.evaluation_id, finish)
            assert record.state is State.COMPLETED
            self.ran.append(taken.evaluation_id)
        await self.ack(taken)
        return True

    async def work(self, enough: asyncio.Event, pause: float = 0.02) -> None:
        """Work on the queue of small ones until told that it is enough."""
        while not enough.is_set():
            if not await self.work_one():
                await asyncio.sleep(pause)


@asynccontextmanager
async def hint_worker(url: BrokerUrl, settings: BrokerSettings, storage: StorageClient) -> AsyncIterator[HintWorker]:
    """Run a worker's connection for as long as the block lasts."""
    worker = HintWorker(url, settings, storage)
    try:
        await worker.open()
        yield worker
    finally:
        await worker.close()
