"""`crucible serve api`."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from crucible.api.app import Api, make_api_app
from crucible.events import Event, Lagged
from crucible.serve.service import Service
from crucible.streams.composition import make_bus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AsyncExitStack

    from crucible.settings import Settings

_POLL_S = 1.0


class PollingBus:
    """Stands where no events come from other processes: has every subscriber read the table again once a second."""

    @contextmanager
    def subscribe(self, wants: Callable[[Event], bool]) -> Iterator[asyncio.Queue[Event | Lagged]]:  # noqa: ARG002 - the bus's signature
        """Wake the subscriber again and again for as long as the context is open."""
        queue: asyncio.Queue[Event | Lagged] = asyncio.Queue(1)
        waking = asyncio.create_task(_wake(queue))
        try:
            yield queue
        finally:
            waking.cancel()


async def _wake(queue: asyncio.Queue[Event | Lagged]) -> None:
    while True:
        await asyncio.sleep(_POLL_S)
        await queue.put(Lagged())


class ApiService(Service):
    """The public HTTP service."""

    name: ClassVar[str] = "api"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.api.host, settings.api.port)
        self._api: Api | None = None

    async def _start(self, stack: AsyncExitStack) -> None:
        storage, dispatcher = await self.storage_client(), await self.dispatcher_client()
        stream_bus = make_bus(self.settings)
        if stream_bus:
            stack.push_async_callback(stream_bus.aclose)
            await stream_bus.start()
        self._api = Api(self.settings, storage, dispatcher, stream_bus or PollingBus(), tracing=self.tracing)
        self.health = self._api.health
        if stream_bus:
            stream_bus.watch(self.health)
        await self._api.start()
        stack.push_async_callback(self._api.aclose)
        stack.push_async_callback(self._server.aclose)
        await self._server.start(self.tracing.wrap_app(make_api_app(self._api)))
        # Before the server stops: open streams end by themselves then, where it would wait for them.
        stack.callback(self._api.drain)

    async def drain(self) -> None:
        """Take no new submissions, and have streams end so that their readers resume elsewhere."""
        if self._api:
            self._api.drain()
