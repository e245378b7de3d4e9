"""`crucible serve cleanup`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.cleanup.cleanup import Cleanup
from crucible.kubernetes.api import KubernetesApi
from crucible.serve.service import Service
from crucible.service import make_app

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


class CleanupService(Service):
    """Removes from the cluster what is recorded, and what nobody owns."""

    name: ClassVar[str] = "cleanup"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.cleanup.host, settings.cleanup.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        storage = await self.storage_client()
        api = await stack.enter_async_context(KubernetesApi.from_settings(settings.kubernetes, "crucible-cleanup"))
        cleanup = Cleanup(api, storage, settings.cleanup, settings.kubernetes)
        cleanup.watch(self.health)
        stack.push_async_callback(self._server.aclose)
        await cleanup.start()
        stack.push_async_callback(cleanup.aclose)
        about = "Removes what is recorded from the cluster; only its health is on HTTP."
        await self._server.start(make_app("cleanup", self.health, title="Crucible cleanup", description=about))
