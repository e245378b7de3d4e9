"""The monitor: this replica's part in watching, for as long as the service lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible.kubernetes.api import KubernetesApi
from crucible.watching.watching import Watching

if TYPE_CHECKING:
    from crucible.clients import StorageClient
    from crucible.health import Health
    from crucible.settings import Settings


class Monitor:
    """Watches the cluster that the settings name. `start` it once; `aclose` hands over to the other replicas.

    Raises:
        KubernetesConfigError: the settings name no cluster.
    """

    def __init__(self, settings: Settings, storage: StorageClient, *, instance: str) -> None:
        self._api = KubernetesApi.from_settings(settings.kubernetes, "crucible-monitor")
        self._watching = Watching(settings, storage, self._api, instance)

    async def start(self) -> None:
        """Begin; returns once it does its part."""
        await self._watching.start()

    async def aclose(self) -> None:
        """Hand over."""
        await self._watching.aclose()
        await self._api.aclose()

    def watch(self, health: Health) -> None:
        """Register what tells whether it can do its work now."""
        self._watching.watch(health)
