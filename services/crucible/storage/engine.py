"""The way to PostgreSQL: a pool of asyncpg connections, and the one place that knows what its failures mean.

A database that is away is a passing condition and never a mistake of the platform: every connection error leaves here as the
problem `unavailable`, and the pool connects again by itself once the server is back. Statements go straight to asyncpg, which keeps
them prepared per connection; SQLAlchemy composes the few whose shape depends on the request (`select`).
"""

from __future__ import annotations

import functools
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import asyncpg
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg

from crucible import logs, metrics
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from sqlalchemy import Select

    Row = asyncpg.Record
    Connection = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    _BaseConnection = asyncpg.Connection[asyncpg.Record]
else:
    _BaseConnection = asyncpg.Connection  # generic in its stubs only

log = logs.get_logger("storage.database")
P = ParamSpec("P")
R = TypeVar("R")

_DIALECT = sqlalchemy_asyncpg.dialect()  # type: ignore[no-untyped-call]
RETRY_AFTER_S = 1.0
_CONNECT_TIMEOUT_S = 5.0
# No statement here takes long on a healthy server; these bound what a sick one can hold up. Milliseconds, as PostgreSQL reads them.
_SERVER_SETTINGS = {
    "application_name": "crucible-storage",
    "statement_timeout": "60000",
    "lock_timeout": "15000",
    "idle_in_transaction_session_timeout": "60000",
    # Compiling pays only for statements that run for seconds.
    "jit": "off",
    # A session whose machine has gone without a word would keep its locks, and with them the relay, for two hours.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
_CLIENT_TIMEOUT_S = 75.0

# Server side: going down or starting up (57P0x), out of connections, memory or disk (53xxx), read-only after a fail-over.
# Deadlocks and lock time-outs belong here too: the caller may simply try again.
_PASSING = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.DeadlockDetectedError,
    asyncpg.exceptions.LockNotAvailableError,
    asyncpg.exceptions.InternalClientError,
)


def _is_unstorable(error: Exception) -> bool:
    # asyncpg raises ValueErrors of its own before sending, and the server raises class 22; NUL and lone surrogates end up here.
    return isinstance(error, (asyncpg.exceptions.DataError, UnicodeEncodeError)) or (
        isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)
    )


@contextmanager
def unavailable_if_down(on_loss: Callable[[Exception], None] | None = None) -> Iterator[None]:
    """Turn the database's absence into the problem `unavailable`, and a value that it cannot hold into `invalid-request`."""
    try:
        yield
    except _PASSING as error:
        if on_loss is not None:
            on_loss(error)
        raise ProblemError(
            "unavailable", "the database does not answer now; nothing was lost", retry_after=RETRY_AFTER_S
        ) from error
    except (asyncpg.InterfaceError, asyncpg.PostgresError, UnicodeEncodeError) as error:
        if _is_unstorable(error):
            raise ProblemError("invalid-request", "a value cannot be stored as text or number") from error
        if isinstance(error, asyncpg.InterfaceError) and "clos" in str(error):
            if on_loss is not None:
                on_loss(error)
            raise ProblemError(
                "unavailable", "the connection to the database was lost", retry_after=RETRY_AFTER_S
            ) from error
        raise


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Open one connection outside the pool, for what must keep its session (LISTEN, session locks)."""
    with unavailable_if_down():
        connection = await asyncpg.connect(
            url, timeout=_CONNECT_TIMEOUT_S, command_timeout=_CLIENT_TIMEOUT_S, server_settings=_SERVER_SETTINGS
        )
    try:
        yield connection
    finally:
        connection.terminate()


class _PooledConnection(_BaseConnection):
    def get_reset_query(self) -> str:
        # Nothing here leaves state in a session, so a round trip per use to reset it would buy nothing.
        return ""


class Database:
    """The pool. It opens lazily, survives restarts of the server, and remembers whether the server answered last."""

    def __init__(self, url: str, pool_size: int) -> None:
        self.url = url
        self._pool_size = pool_size
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._down_since: float | None = time.monotonic()
        self._up_since = time.monotonic()
        self._loss = "not connected yet"

    async def open(self) -> None:
        """Connect.

        Raises:
            ProblemError: `unavailable`.
        """
        with unavailable_if_down(self._lost):
            self._pool = await asyncpg.create_pool(
                self.url,
                min_size=0,  # a floor would be rebuilt in the background while the server is away, with a traceback per try
                max_size=self._pool_size,
                max_inactive_connection_lifetime=0,
                connection_class=_PooledConnection,
                timeout=_CONNECT_TIMEOUT_S,
                command_timeout=_CLIENT_TIMEOUT_S,
                server_settings=_SERVER_SETTINGS,
            )
        await self.fetchval("SELECT 1")

    async def close(self) -> None:
        """Close every connection."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.terminate()

    # -- what is known of the server, without asking it

    def _lost(self, error: Exception) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning("the database does not answer", error=f"{type(error).__name__}: {error}")
        self._loss = type(error).__name__

    def _answered(self) -> None:
        if self._down_since is not None:
            self._up_since = time.monotonic()
            log.info("the database answers", away_seconds=round(self._up_since - self._down_since, 1))
            self._down_since = None

    def problem(self) -> str | None:
        """Return what is wrong, as of the last statement."""
        if self._down_since is None:
            return None
        return f"no answer for {time.monotonic() - self._down_since:.0f} s ({self._loss})"

    @property
    def answering_for(self) -> float:
        """Seconds for which the database has answered without a break; 0 while it does not."""
        return 0.0 if self._down_since is not None else time.monotonic() - self._up_since

    # -- statements

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection on which every statement is its own transaction."""
        with unavailable_if_down(self._lost):
            if self._pool is None:
                raise asyncpg.InterfaceError("the pool is closed")
            async with self._pool.acquire(timeout=_CONNECT_TIMEOUT_S * 2) as connection:
                yield connection
            self._answered()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lend a connection in a transaction: committed at the end, rolled back on any error."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def fetch(self, sql: str, *args: Any) -> list[Row]:
        """Run one statement in a transaction of its own and return its rows."""
        async with self.connection() as connection:
            return await connection.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any) -> Row | None:
        """Run one statement and return its first row."""
        async with self.connection() as connection:
            return await connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """Run one statement and return the first column of its first row."""
        async with self.connection() as connection:
            return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any) -> str:
        """Run one statement and return its tag, such as `DELETE 3`."""
        async with self.connection() as connection:
            return await connection.execute(sql, *args)

    async def select(self, statement: Select[Any]) -> list[Row]:
        """Run a composed SELECT. Values travel apart from the text, always."""
        sql, args = compile_select(statement)
        return await self.fetch(sql, *args)


def changed(tag: str) -> int:
    """Return how many rows a statement changed, from what PostgreSQL says of it: `UPDATE 3`, `INSERT 0 3`."""
    return int(tag.rsplit(" ", 1)[1])


def compile_select(statement: Select[Any]) -> tuple[str, list[Any]]:
    """Return a composed SELECT as asyncpg takes it: the text with `$1...`, and the values."""
    compiled = statement.compile(
        dialect=_DIALECT,
        compile_kwargs={"render_postcompile": True},
    )
    return compiled.string, [compiled.params[name] for name in compiled.positiontup or ()]


def timed(
    op: str, backend: str = "postgres"
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Return a decorator that measures a storage operation under `op`."""
    histogram = metrics.STORAGE_SECONDS.labels(backend, op)

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        @functools.wraps(function)
        async def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.perf_counter()
            try:
                return await function(*args, **kwargs)
            finally:
                histogram.observe(time.perf_counter() - started)

        return measured

    return decorate
