"""One real PostgreSQL for the whole test run, and a fresh database of it for each test that asks.

The server is the `local` profile's own (crucible.local.postgres), without crash safety. It starts when the first test needs it, in a
thread with an event loop of its own, since each test has its own loop; it ends with the test run. A fresh database is a copy of
one that was migrated once, which takes a few hundredths of a second.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
import signal
import tempfile
import threading
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil

from crucible.local.postgres import PostgresServer
from crucible.storage import migrate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

T = TypeVar("T")
_TEMPLATE = "crucible_template"
_START_SECONDS = 90


class SharedServer:
    """The server of this test run. Its methods are called from the tests' loops and work in its own."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="crucible-test-pg-"))
        self._folder.chmod(0o711)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-postgres", daemon=True)
        self._thread.start()
        self._server = PostgresServer(self._folder, durable=False)
        self.url = self._call(self._server.start())
        atexit.register(self.close)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_SECONDS)

    def close(self) -> None:
        """End the server and delete its data; at the interpreter's exit, where no thread pool takes work any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)
        if self._server.pid is not None:
            process = psutil.Process(self._server.pid)
            process.send_signal(signal.SIGQUIT)
            process.wait(_START_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def stop(self) -> None:
        """Stop the server, as an operator would."""
        await asyncio.to_thread(self._call, self._server.stop())

    async def start(self) -> None:
        """Start it again."""
        await asyncio.to_thread(self._call, self._server.start())

    async def start_if_stopped(self) -> None:
        """Leave it running, whatever a test did to it."""
        if self._server.pid is None:
            await self.start()

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{database}"))


_server: SharedServer | None = None


def shared_server() -> SharedServer:
    """Return the server, started by the first call."""
    global _server  # noqa: PLW0603 - one per test run
    if _server is None:
        _server = SharedServer()
    return _server


@asynccontextmanager
async def _administration(server: SharedServer) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(server.url_of("postgres"))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def empty_database() -> AsyncIterator[str]:
    """Give the URL of a database without any table, dropped afterwards."""
    async with _database("template0") as url:
        yield url


@asynccontextmanager
async def fresh_database() -> AsyncIterator[str]:
    """Give the URL of a migrated, empty database, dropped afterwards."""
    server = shared_server()
    async with _administration(server) as administration:
        if not await administration.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", _TEMPLATE):
            await administration.execute(f"CREATE DATABASE {_TEMPLATE} TEMPLATE template0")
    await migrate(server.url_of(_TEMPLATE))
    async with _database(_TEMPLATE) as url:
        yield url


@asynccontextmanager
async def _database(template: str) -> AsyncIterator[str]:
    server = shared_server()
    name = f"test_{uuid.uuid4().hex}"
    async with _administration(server) as administration:
        await administration.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield server.url_of(name)
    finally:
        async with _administration(server) as administration:
            await administration.execute(f"DROP DATABASE {name} WITH (FORCE)")
