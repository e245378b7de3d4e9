"""`crucible serve storage`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.broker.urls import BrokerUrl
from crucible.events import InProcessBus
from crucible.serve.service import Service
from crucible.settings import SettingsError, env_name
from crucible.storage.app import make_storage_app
from crucible.storage.hints import Brokers
from crucible.storage.storage import Storage
from crucible.streams.composition import make_event_log

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.settings import Settings


def make_brokers(settings: Settings) -> Brokers | None:
    """Return the brokers that the settings name; None without one.

    Raises:
        SettingsError: only the one that is being left is named.
        BrokerError: a URL cannot be used.
    """
    if settings.broker_url is None:
        if settings.legacy_broker_url is not None:
            raise SettingsError(f"{env_name('legacy_broker_url')}: is set, and {env_name('broker_url')} is not")
        return None
    new, legacy = settings.broker_url, settings.legacy_broker_url
    return Brokers(
        BrokerUrl.parse(new.get_secret_value()),
        BrokerUrl.parse(legacy.get_secret_value()) if legacy else None,
        settings.broker,
    )


class StorageService(Service):
    """The owner of PostgreSQL and the object store; tells the broker what waits, and Redis what happened."""

    name: ClassVar[str] = "storage"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.storage.host, settings.storage.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        token = self.token()
        event_log = make_event_log(settings)
        if event_log:
            stack.push_async_callback(event_log.aclose)
        storage = Storage(
            settings.storage,
            settings.limits,
            # Nobody listens in this process; the event log tells the others.
            InProcessBus(),
            database_url=self._required("storage", "database_url", value=settings.storage.database_url),
            data_dir=settings.data_dir,
            instance=self.instance,
            event_log=event_log,
            brokers=make_brokers(settings),
        )
        await storage.start()
        stack.push_async_callback(storage.aclose)
        stack.push_async_callback(self._server.aclose)
        await self._server.start(self.tracing.wrap_app(make_storage_app(storage, token, self.health)))
