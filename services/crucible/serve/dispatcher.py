"""`crucible serve dispatcher`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.dispatcher.app import make_dispatcher_app
from crucible.dispatcher.dispatcher import Dispatcher
from crucible.serve.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


class DispatcherService(Service):
    """The only creator of sandboxes on this node."""

    name: ClassVar[str] = "dispatcher"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.dispatcher.host, settings.dispatcher.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        token = self.token()
        dispatcher = Dispatcher(
            self.settings.dispatcher,
            self.settings.limits,
            await self.storage_client(),
            instance=self.instance,
            tracing=self.tracing,
        )
        # Stopped last: whoever waits for a sandbox that is being ended learns so, where a closed connection would say nothing.
        stack.push_async_callback(self._server.aclose)
        await dispatcher.start()
        stack.push_async_callback(dispatcher.aclose)
        await self._server.start(self.tracing.wrap_app(make_dispatcher_app(dispatcher, token, self.health)))
