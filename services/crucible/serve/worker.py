"""`crucible serve worker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.broker.urls import BrokerUrl
from crucible.serve.service import Service
from crucible.service import make_app
from crucible.worker.celery_worker import CeleryWorker
from crucible.worker.holding import Holding

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


class WorkerService(Service):
    """Takes evaluations from one broker and sees them through."""

    name: ClassVar[str] = "worker"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.worker.host, settings.worker.port)
        self._worker: CeleryWorker | None = None

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        url = BrokerUrl.parse(self._required("broker_url", value=settings.broker_url))
        storage, dispatcher = await self.storage_client(), await self.dispatcher_client()
        holding = Holding(settings.worker, storage, dispatcher, instance=self.instance, tracing=self.tracing)
        self._worker = CeleryWorker(url, settings.broker, storage, holding)
        self.health.add("broker", self._worker.problem)
        stack.push_async_callback(self._server.aclose)
        await self._worker.start()
        stack.push_async_callback(self._worker.drain)
        about = "Takes evaluations from the queue; only its health is on HTTP."
        await self._server.start(make_app("worker", self.health, title="Crucible worker", description=about))

    async def drain(self) -> None:
        """Take nothing new, finish what can finish in time, and give the rest back to the queue."""
        self.health.draining = True
        if self._worker:
            await self._worker.drain()

    async def ended(self) -> None:
        """Return if the consumer has ended by itself."""
        if self._worker:
            await self._worker.ended.wait()
