"""What the processes have in common: settings that must be there, an order of starting and stopping, health from the first moment."""

from __future__ import annotations

import asyncio
import socket
import uuid
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, ClassVar

from crucible import __version__, logs
from crucible.clients import DispatcherClient, StorageClient, http_client
from crucible.health import Health
from crucible.serve.http import HttpServer
from crucible.settings import SettingsError, env_name
from crucible.tracing import Tracing

if TYPE_CHECKING:
    import httpx
    from pydantic import SecretStr

    from crucible.settings import Settings

log = logs.get_logger("serve")

# What each setting is for, where a process cannot do without it.
_PURPOSE = {
    "internal_token": "the same secret in all services, by which they know each other",
    "database_url": "postgresql://USER:PASSWORD@HOST:5432/DATABASE",
    "storage_url": "where `crucible serve storage` listens",
    "dispatcher_url": "where `crucible serve dispatcher` listens",
    "broker_url": "amqp://USER:PASSWORD@HOST:5672/VHOST, or redis://...",
}


class Service(ABC):
    """One service in a process of its own. `start` it, `drain` it when told to stop, `aclose` it at the end."""

    name: ClassVar[str]

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self.settings = settings
        self.instance = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.health = Health(self.name, __version__)
        self._server = HttpServer(host, port)
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """Where it listens; known once started."""
        return self._server.url

    async def start(self) -> None:
        """Start every part; on any failure what was started is stopped again.

        Raises:
            SettingsError: a setting is missing that it cannot do without.
            OSError, RuntimeError, ProblemError, BrokerError: what it needs cannot be had; the message says why.
        """
        try:
            self.tracing = Tracing(self.settings.tracing, f"crucible-{self.name}")
            self._stack.callback(self.tracing.shutdown)
            await self._start(self._stack)
        except BaseException:
            await self._stack.aclose()
            raise
        log.info("serving", url=self.url, instance=self.instance)

    @abstractmethod
    async def _start(self, stack: AsyncExitStack) -> None:
        """Start what the service consists of, and serve it."""

    async def drain(self) -> None:
        """Take nothing new, and finish what is under way."""
        self.health.draining = True

    async def ended(self) -> None:
        """Return if it has ended by itself, which it should not."""
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Stop every part in the reverse of the order in which they need each other."""
        await self._stack.aclose()

    # -- settings

    def _required(self, *location: str, value: str | SecretStr | None) -> str:
        if not value:
            variable = env_name(*location)
            raise SettingsError(f"{variable}: `crucible serve {self.name}` needs it: {_PURPOSE[location[-1]]}")
        return value if isinstance(value, str) else value.get_secret_value()

    def token(self) -> str:
        """Return the services' common secret."""
        return self._required("internal_token", value=self.settings.internal_token)

    async def _client(self, url: str) -> httpx.AsyncClient:
        client = await self._stack.enter_async_context(http_client(url, self.token()))
        self.tracing.watch_client(client)
        return client

    async def storage_client(self) -> StorageClient:
        """Return a client of the storage service that the settings name."""
        return StorageClient(await self._client(self._required("storage_url", value=self.settings.storage_url)))

    async def dispatcher_client(self) -> DispatcherClient:
        """Return a client of the dispatcher service that the settings name."""
        url = self._required("dispatcher_url", value=self.settings.dispatcher_url)
        return DispatcherClient(await self._client(url))
