"""`crucible serve monitor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.kubernetes.api import ApiError, KubernetesConfigError
from crucible.monitor.monitor import Monitor
from crucible.serve.service import Service
from crucible.service import make_app

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


class MonitorService(Service):
    """Watches Jobs and Pods together with its replicas."""

    name: ClassVar[str] = "monitor"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.monitor.host, settings.monitor.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        storage = await self.storage_client()
        try:
            monitor = Monitor(self.settings, storage, instance=self.instance)
        except KubernetesConfigError as error:
            raise RuntimeError(str(error)) from error
        monitor.watch(self.health)
        stack.push_async_callback(monitor.aclose)
        stack.push_async_callback(self._server.aclose)
        about = "Watches the sandboxes of a cluster; only its health and metrics are on HTTP."
        # Before it knows the cluster, so that an API server that is away is seen as such and not as a process that does not start.
        await self._server.start(make_app("monitor", self.health, title="Crucible monitor", description=about))
        try:
            await monitor.start()
        except ApiError as error:
            raise RuntimeError(f"the API server refuses the monitor: {error}") from error
