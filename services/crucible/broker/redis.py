"""Publishing to Redis, the broker that is being left, as Celery and kombu lay out their queues there.

Redis has no confirm: a message counts as confirmed when the command that stores it was answered.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.exceptions import KombuError
from redis import exceptions as redis_errors

from crucible.broker import topology
from crucible.broker.celery_app import make_app
from crucible.broker.connection import close, connect
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.message import Hint, Writer
from crucible.broker.transports import redis_priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kombu.connection import Connection

    from crucible.broker.urls import BrokerUrl
    from crucible.limits import SizeClass
    from crucible.settings import BrokerSettings


class RedisLink:
    """One connection, opened when needed."""

    def __init__(self, url: BrokerUrl, settings: BrokerSettings) -> None:
        self._url = url
        self._settings = settings
        self._writer = Writer(make_app(url, settings))
        self._connection: Connection | None = None

    def publish(self, hints: Sequence[Hint], timeout: float) -> list[bool]:
        """Store in order; return which were stored. Raises if none was."""
        deadline = time.monotonic() + timeout
        results: list[bool] = []
        try:
            for hint in hints:
                if time.monotonic() > deadline:
                    break
                self._ask(partial(self._put, hint))
                results.append(True)
        except BrokerError:
            if not results:
                raise
        return results + [False] * (len(hints) - len(results))

    def _put(self, hint: Hint, channel: Any) -> None:
        wire = self._writer.write(hint).on(channel, redis_priority(hint.priority))
        channel.basic_publish(wire, exchange="", routing_key=topology.queue_name(hint.size_class))

    def depth(self, size_class: SizeClass) -> tuple[int, int | None]:
        """Return how many messages no consumer holds; Redis does not know of consumers."""
        ready: int = self._ask(lambda channel: channel._size(topology.queue_name(size_class)))  # noqa: SLF001
        return ready, None

    def purge(self, size_class: SizeClass) -> int:
        """Remove what no consumer holds; return how many that were."""
        return int(self._ask(lambda channel: channel.queue_purge(topology.queue_name(size_class))))

    def delete(self, size_class: SizeClass) -> None:
        """Empty the queue: it is its lists, and an empty list does not exist."""
        self.purge(size_class)

    def declare(self) -> None:
        """Do nothing: Redis makes a list when something is put into it."""

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            close(self._connection)
            self._connection = None

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if self._connection is None:
            self._connection = connect(self._url, self._settings)
        try:
            return question(self._connection.default_channel)
        except (OSError, redis_errors.RedisError, KombuError) as error:
            self.close()
            raise BrokerError(
                BrokerReason.UNREACHABLE,
                f"the connection to Redis was lost ({error})",
                "nothing to do if it comes back: the next attempt connects again",
            ) from None
