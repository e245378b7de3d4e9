"""The services as a cluster runs them: each a `crucible serve` process on loopback, which a test may kill and start again.

    with ServiceProcesses(folder, database_url, broker_url=cluster.url(vhost=vhost)) as services:
        async with services.client() as client:
            services.worker.kill()
            services.worker.start()

Each keeps its port over its lives, so that the others find it again.
"""

from __future__ import annotations

import os
import secrets
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

import httpx

from crucible import contracts as c
from crucible.auth import make_key
from crucible.clients import StorageClient, http_client
from tests.support.platform import Client, connect
from tests.support.ports import free_port
from tests.support.preloaded import PreloadedProcess, start_crucible
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path
    from types import TracebackType

_START_SECONDS = 40
_STOP_SECONDS = 40


class ServiceProcess:
    """One service: its present process, and what all its lives wrote."""

    def __init__(self, kind: str, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._kind = kind
        self._log = folder / f"{name}.log"
        self._environment = {**os.environ, **environment}
        self._process: PreloadedProcess | None = None

    @property
    def pid(self) -> int:
        """Of the present process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What all its lives wrote to standard error."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def alive(self) -> bool:
        """Whether it has a process."""
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start its process where it has none, and return at once."""
        if self.alive():
            return
        with self._log.open("ab") as log:
            self._process = start_crucible(
                "serve", self._kind, "--port", str(self.port), "--json", environment=self._environment, stderr=log
            )

    def ready(self) -> bool:
        """Whether it can do its work now."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def await_ready(self, seconds: float = _START_SECONDS) -> None:
        """Wait until it can do its work."""

        def ready() -> bool:
            assert self.alive(), f"{self.name} ended:\n{self.log[-4000:]}"
            return self.ready()

        wait_until(ready, timeout=seconds, describe=f"{self.name} to be ready")

    def start(self) -> None:
        """Start it, and wait until it can do its work."""
        self.launch()
        self.await_ready()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = _STOP_SECONDS) -> int:
        """Wait for its end; returns the exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> int:
        """Stop it as a cluster does, with SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def metric(self, series: str) -> float:
        """Return the value of one series as `/metrics` shows it, such as `broker_redelivered_total{size_class="small"}`; 0 if absent."""
        lines = httpx.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == series), 0.0)


class ServiceProcesses:
    """Storage, dispatcher, API and a worker per broker, for as long as the block lasts."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        *,
        broker_url: str,
        legacy_broker_url: str = "",
        redis_url: str = "",
        worker_broker_url: str = "",
        **environment: str,
    ) -> None:
        """Describe the services; the block's beginning starts them.

        Args:
            folder: where data and logs go.
            database_url: a migrated or an empty database.
            broker_url: the broker.
            legacy_broker_url: the one that is being left; has a worker of its own.
            redis_url: where events go.
            worker_broker_url: the broker as the worker is to reach it, if otherwise than storage.
            **environment: variables for all of them.
        """
        self.token = secrets.token_hex(16)
        (folder / "data").mkdir(mode=0o711, exist_ok=True)
        common = {
            "CRUCIBLE_INTERNAL_TOKEN": self.token,
            "CRUCIBLE_DATA_DIR": str(folder / "data"),
            "CRUCIBLE_REDIS_URL": redis_url,
            "CRUCIBLE_WORKER__SLOTS": "4",
            "CRUCIBLE_WORKER__DRAIN_SECONDS": "2",
            "CRUCIBLE_LOG__LEVEL": "info",
            **environment,
        }
        brokers = {"CRUCIBLE_BROKER_URL": broker_url, "CRUCIBLE_LEGACY_BROKER_URL": legacy_broker_url}
        database = {"CRUCIBLE_STORAGE__DATABASE_URL": database_url}
        self.storage = ServiceProcess("storage", "storage", folder, common | brokers | database)
        common["CRUCIBLE_STORAGE_URL"] = self.storage.url
        self.dispatcher = ServiceProcess("dispatcher", "dispatcher", folder, common)
        common["CRUCIBLE_DISPATCHER_URL"] = self.dispatcher.url
        self.api = ServiceProcess("api", "api", folder, common)
        own = {"CRUCIBLE_BROKER_URL": worker_broker_url or broker_url}
        self.worker = ServiceProcess("worker", "worker", folder, common | own)
        self.legacy_worker: ServiceProcess | None = None
        if legacy_broker_url:
            own = {"CRUCIBLE_BROKER_URL": legacy_broker_url}
            self.legacy_worker = ServiceProcess("worker", "legacy-worker", folder, common | own)
        self._key = ""

    @property
    def all(self) -> list[ServiceProcess]:
        """Every service, in the order in which they need each other."""
        every = [self.storage, self.dispatcher, self.api, self.worker]
        return every + ([self.legacy_worker] if self.legacy_worker else [])

    def __enter__(self) -> Self:
        try:
            for service in self.all:
                service.launch()
            for service in self.all:
                service.await_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End every process at once."""
        for service in reversed(self.all):
            service.kill()

    @asynccontextmanager
    async def internal(self) -> AsyncIterator[StorageClient]:
        """Open a client of storage itself."""
        async with http_client(self.storage.url, self.token) as http:
            yield StorageClient(http)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Open a client of the public API, with an administrator's key."""
        if not self._key:
            self._key, key_id, digest = make_key()
            async with self.internal() as storage:
                await storage.add_key(
                    c.NewApiKey(key_id=key_id, owner="tests", role=c.Role.ADMIN, secret_sha256=digest)
                )
        async with connect(self.api.url, self._key) as client:
            yield client
