"""The way to Redis: bounded in time, with TLS where the URL says so, and the one place that knows what its failures mean.

Nothing is tried again here: who asks knows best what to do meanwhile, and keeps its own pace (`outage`).
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import SecretStr
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from crucible.redis_tls import redis_tls
from crucible.settings import SettingsError
from crucible.streams.errors import StreamError, StreamFailure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from crucible.settings import BrokerSettings

# The library's own types are unions over every shape of answer that it can give, of which ours is one.
Client: TypeAlias = Any
T = TypeVar("T")

# One exchange with a Redis that is well takes about a millisecond.
ANSWER_SECONDS = 2.0

_CREDENTIALS = ("NOAUTH", "WRONGPASS", "invalid username-password", "invalid password", "without any password")


def connect(url: SecretStr | str, settings: BrokerSettings) -> Client:
    """Return a client that connects when first used. Every command to it goes through `answer`, or another limit in time.

    Args:
        url: redis://, rediss:// or unix://.
        settings: the certificates to trust and to present, and how long connecting may take.

    Raises:
        SettingsError: not such a URL.
    """
    text = url.get_secret_value() if isinstance(url, SecretStr) else url
    options: dict[str, Any] = {
        "decode_responses": True,
        # The same shape of answers from every version of the client that we allow.
        "protocol": 2,
        # With a limit of its own the client waits by `asyncio.wait_for`, which before Python 3.12 may swallow a cancellation.
        "socket_timeout": None,
        "socket_connect_timeout": settings.connect_timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "crucible",
    }
    if text.startswith("rediss://"):
        options |= redis_tls(settings)
    try:
        return Redis.from_url(text, **options)
    except ValueError as error:
        # Its text quotes no part of the URL but the port.
        raise SettingsError(f"CRUCIBLE_REDIS_URL: {error}") from None


async def answer(command: Awaitable[T], *, block_seconds: float = 0.0) -> T:
    """Return the answer to one command, which may block on purpose for `block_seconds`.

    Raises:
        TimeoutError: none came in time; the connection is closed then.
    """
    async with asyncio.timeout(ANSWER_SECONDS + block_seconds):
        return await command


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failure(error: Exception) -> StreamFailure:
    text = str(error)
    if isinstance(error, exceptions.AuthenticationError) or any(mark in text for mark in _CREDENTIALS):
        return StreamFailure.CREDENTIALS
    if _is_tls(error):
        return StreamFailure.TLS
    if isinstance(error, exceptions.BusyLoadingError):
        return StreamFailure.UNREACHABLE
    if isinstance(error, exceptions.ResponseError):
        return StreamFailure.TOO_OLD if "unknown command" in text else StreamFailure.REFUSED
    return StreamFailure.UNREACHABLE


@contextmanager
def stream_errors() -> Iterator[None]:
    """Turn whatever the client raises into `StreamError`."""
    try:
        yield
    except (exceptions.RedisError, OSError, TimeoutError) as error:
        raise StreamError(_failure(error), f"{type(error).__name__}: {error}") from error
