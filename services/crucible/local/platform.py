"""The composition of the `local` profile: every service in this process, PostgreSQL and the sandboxes as its children.

The services call each other through the same clients as in a cluster, over an in-process transport. Nothing here decides anything:
it starts the parts in the order in which they need each other, and stops them in reverse.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import socket
import uuid
from contextlib import AsyncExitStack
from typing import IO, TYPE_CHECKING

from crucible import __version__, logs
from crucible import contracts as c
from crucible.api.app import Api, make_api_app
from crucible.auth import make_key, split_key
from crucible.clients import DispatcherClient, StorageClient, http_client
from crucible.dispatcher.app import make_dispatcher_app
from crucible.dispatcher.dispatcher import Dispatcher
from crucible.events import InProcessBus
from crucible.health import Health
from crucible.local.postgres import PostgresServer
from crucible.local.worker_process import WorkerProcess, worker_environment
from crucible.serve.http import HttpServer
from crucible.serve.storage import make_brokers
from crucible.storage.app import make_storage_app
from crucible.storage.storage import Storage
from crucible.streams.composition import make_event_log
from crucible.tracing import Tracing
from crucible.worker.holding import Holding
from crucible.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings, Settings
    from crucible.storage.hints import Brokers

log = logs.get_logger("platform")

LOCAL_OWNER = "local"


class AlreadyRunningError(RuntimeError):
    """Another platform holds the data folder; `server` is what it wrote about itself, if anything."""

    def __init__(self, data_dir: Path, server: dict[str, object]) -> None:
        where = f" at {server['url']} (pid {server['pid']})" if server else ""
        super().__init__(f"a platform already runs over {data_dir}{where}; stop it, or choose another --data-dir")
        self.server = server


class Platform:
    """The whole platform on one machine.

    Args:
        settings: everything that may be set; `api.port` 0 takes a free port.
        durable: False trades crash safety for speed, for tests that throw their data away.
    """

    def __init__(self, settings: Settings, *, durable: bool = True) -> None:
        self.settings = settings
        self.instance = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.url = ""
        self.api_key = ""
        self.runtime = ""
        self.limits_by = ""
        self.queue = "the database"
        self._durable = durable
        self._stack = AsyncExitStack()
        self._api: Api | None = None
        self._worker: Worker | None = None
        self._worker_processes: list[WorkerProcess] = []

    @property
    def server_file(self) -> Path:
        """Where the running platform says how to reach it (mode 0600)."""
        return self.settings.data_dir / "server.json"

    async def start(self) -> None:
        """Start every part; on any failure what was started is stopped again.

        Raises:
            AlreadyRunningError: the data folder is taken.
            PostgresError: the database does not start.
            BrokerError: the broker cannot be used; the message says why and what to do.
            SettingsError: settings that do not go together.
            RuntimeError: sandboxes cannot be made on this machine; the message says why.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def drain(self) -> None:
        """Take nothing new, finish what can finish in time, and give the rest back to the queue."""
        if self._api:
            self._api.drain()
        if self._worker:
            await self._worker.drain()
        await asyncio.gather(*(process.drain() for process in self._worker_processes))

    async def aclose(self) -> None:
        """Stop every part in the reverse of the order in which they need each other."""
        await self._stack.aclose()

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock()
        token = settings.internal_token.get_secret_value() if settings.internal_token else secrets.token_urlsafe(32)
        tracing = Tracing(settings.tracing, "crucible")
        stack.callback(tracing.shutdown)
        bus = InProcessBus()
        brokers = make_brokers(settings)
        for url in _urls(brokers):
            await asyncio.to_thread(_declare, url, settings.broker)
        event_log = make_event_log(settings)
        if event_log:
            stack.push_async_callback(event_log.aclose)

        storage = Storage(
            settings.storage,
            settings.limits,
            bus,
            database_url=await self._database(),
            data_dir=settings.data_dir,
            instance=self.instance,
            event_log=event_log,
            brokers=brokers,
        )
        await storage.start()
        stack.push_async_callback(storage.aclose)
        # One platform per data folder: whatever another instance holds, it died holding.
        await storage.reclaim_foreign(self.instance)
        storage_app = tracing.wrap_app(make_storage_app(storage, token, Health("storage", __version__)))
        storage_client = StorageClient(await self._client(storage_app, token, tracing))

        dispatcher = Dispatcher(
            settings.dispatcher, settings.limits, storage_client, instance=self.instance, tracing=tracing
        )
        await dispatcher.start()
        stack.push_async_callback(dispatcher.aclose)
        self.runtime, self.limits_by = dispatcher.runtime, dispatcher.limits_by
        dispatcher_app = tracing.wrap_app(make_dispatcher_app(dispatcher, token, Health("dispatcher", __version__)))
        dispatcher_client = DispatcherClient(await self._client(dispatcher_app, token, tracing))

        self.api_key = await self._ensure_key(storage_client)
        self._api = Api(settings, storage_client, dispatcher_client, bus, tracing=tracing)
        await self._api.start()
        stack.push_async_callback(self._api.aclose)

        if brokers:
            await self._start_worker_processes(brokers, token, storage_app, dispatcher_app)
        else:
            await self._start_worker(storage_client, dispatcher_client, tracing)
        await self._serve(tracing.wrap_app(make_api_app(self._api)))
        # Before the server stops: open streams end by themselves then, where it would wait for them.
        stack.callback(self._api.drain)
        self._announce()

    def _lock(self) -> None:
        lock = (self.settings.data_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            server = json.loads(self.server_file.read_text()) if self.server_file.exists() else {}
            raise AlreadyRunningError(self.settings.data_dir, server) from None
        self._stack.callback(self._unlock, lock)

    @staticmethod
    def _unlock(lock: IO[str]) -> None:
        lock.close()

    async def _database(self) -> str:
        url = self.settings.storage.database_url
        if url:
            return url.get_secret_value()
        postgres = PostgresServer(self.settings.data_dir, durable=self._durable)
        # Pushed first: a start that is interrupted half-way leaves no server behind.
        self._stack.push_async_callback(postgres.stop)
        return await postgres.start()

    async def _client(self, app: Callable[..., object], token: str, tracing: Tracing) -> httpx.AsyncClient:
        client = await self._stack.enter_async_context(http_client(app, token))
        tracing.watch_client(client)
        return client

    async def _ensure_key(self, storage: StorageClient) -> str:
        """Return the installation's own admin key, made at the first start and kept in a file of mode 0600."""
        path = self.settings.data_dir / "api-key"
        if path.exists():
            key = path.read_text().strip()
            parts = split_key(key)
            if parts and await storage.find_key(*parts):
                return key
        key, key_id, digest = make_key()
        await storage.add_key(
            c.NewApiKey(key_id=key_id, owner=LOCAL_OWNER, role=c.Role.ADMIN, name="local", secret_sha256=digest)
        )
        _write_private(path, key + "\n")
        return key

    async def _start_worker(self, storage: StorageClient, dispatcher: DispatcherClient, tracing: Tracing) -> None:
        holding = Holding(self.settings.worker, storage, dispatcher, instance=self.instance, tracing=tracing)
        self._worker = Worker(storage, holding)
        assert self._api is not None  # noqa: S101 - for the type checker
        self._api.health.add("worker", self._worker.heartbeat.check)
        await self._worker.start()
        self._stack.push_async_callback(self._worker.drain)

    async def _start_worker_processes(
        self, brokers: Brokers, token: str, storage_app: Callable[..., object], dispatcher_app: Callable[..., object]
    ) -> None:
        """Start a worker per broker, and serve it the two services that it calls, on loopback."""
        storage_url, dispatcher_url = await self._internal(storage_app), await self._internal(dispatcher_app)
        for url in _urls(brokers):
            environment = worker_environment(self.settings, ",".join(url.nodes), token, storage_url, dispatcher_url)
            process = WorkerProcess(environment, self.settings.worker.drain_seconds)
            self._worker_processes.append(process)
            await process.start()
            self._stack.push_async_callback(process.drain)
            assert self._api is not None  # noqa: S101 - for the type checker
            self._api.health.add("worker" if url is brokers.new else "legacy-worker", process.problem)
        self.queue = " and ".join(url.safe for url in _urls(brokers))

    async def _internal(self, app: Callable[..., object]) -> str:
        server = HttpServer("127.0.0.1", 0)
        self._stack.push_async_callback(server.aclose)
        await server.start(app)
        return server.url

    async def _serve(self, app: Callable[..., object]) -> None:
        server = HttpServer(self.settings.api.host, self.settings.api.port)
        self._stack.push_async_callback(server.aclose)
        await server.start(app)
        self.url = server.url

    def _announce(self) -> None:
        server: dict[str, object] = {"url": self.url, "api_key": self.api_key, "pid": os.getpid()}
        if self._worker_processes:
            server["workers"] = [process.pid for process in self._worker_processes]
        _write_private(self.server_file, json.dumps(server) + "\n")
        self._stack.callback(self.server_file.unlink, missing_ok=True)
        log.info("platform started", url=self.url, data_dir=str(self.settings.data_dir), sandbox=self.runtime)


def _urls(brokers: Brokers | None) -> list[BrokerUrl]:
    return [url for url in (brokers.new, brokers.legacy) if url] if brokers else []


def _declare(url: BrokerUrl, settings: BrokerSettings) -> None:
    from crucible.broker.publisher import Publisher  # noqa: PLC0415 - slow to import, and only for those with a broker

    with Publisher(url, settings) as publisher:
        publisher.declare()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    scratch.rename(path)
