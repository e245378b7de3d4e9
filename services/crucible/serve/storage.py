"""`crucible serve storage`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.events import InProcessBus
from crucible.serve.service import Service
from crucible.storage.app import make_storage_app
from crucible.storage.storage import Storage

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


class StorageService(Service):
    """The owner of PostgreSQL and the object store; tells the broker what waits, and Redis what happened."""

    name: ClassVar[str] = "storage"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.storage.host, settings.storage.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        token = self.token()
        storage = Storage(
            settings.storage,
            settings.limits,
            InProcessBus(),
            database_url=self._required("storage", "database_url", value=settings.storage.database_url),
            data_dir=settings.data_dir,
            instance=self.instance,
        )
        await storage.start()
        stack.push_async_callback(storage.aclose)
        stack.push_async_callback(self._server.aclose)
        await self._server.start(self.tracing.wrap_app(make_storage_app(storage, token, self.health)))
