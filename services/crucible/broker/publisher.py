"""Publishes hints, and asks how many wait: RabbitMQ and Redis through one interface.

Blocking, and for one thread at a time. It tries once, in bounded time; when to try again is the caller's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crucible.broker.message import Hint
from crucible.broker.rabbitmq import RabbitLink
from crucible.broker.redis import RedisLink
from crucible.limits import SizeClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings

__all__ = ["Hint", "Publisher", "QueueDepth"]

_CLASSES = tuple(SizeClass)


@dataclass(frozen=True)
class QueueDepth:
    """What a queue holds."""

    ready: int
    """Messages that no consumer holds."""
    consumers: int | None
    """How many consume from it; None where the broker cannot say (Redis)."""


class _Link(Protocol):
    """What each kind of broker does in its own way."""

    def publish(self, hints: Sequence[Hint], timeout: float) -> list[bool]: ...
    def depth(self, size_class: SizeClass) -> tuple[int, int | None]: ...
    def purge(self, size_class: SizeClass) -> int: ...
    def delete(self, size_class: SizeClass) -> None: ...
    def declare(self) -> None: ...
    def close(self) -> None: ...


class Publisher:
    """A connection to one broker, opened when first needed and again after it was lost."""

    def __init__(self, url: BrokerUrl, settings: BrokerSettings) -> None:
        self.url = url
        self._link: _Link = RabbitLink(url, settings) if url.kind == "rabbitmq" else RedisLink(url, settings)

    def publish(self, hints: Sequence[Hint], timeout: float) -> list[bool]:
        """Publish hints in this order; return for each whether the broker has confirmed that it keeps it.

        What is not confirmed may have arrived all the same: publish it again.

        Args:
            hints: what to publish, together; some hundreds at a time are fast.
            timeout: seconds until what is not yet confirmed counts as unconfirmed.

        Raises:
            BrokerError: none was confirmed; its reason says why.
        """
        return self._link.publish(hints, timeout) if hints else []

    def depths(self) -> dict[SizeClass, QueueDepth]:
        """Return what each queue holds.

        Raises:
            BrokerError: the broker does not answer, or lacks a queue.
        """
        return {size_class: QueueDepth(*self._link.depth(size_class)) for size_class in _CLASSES}

    def purge(self) -> int:
        """Empty the queues; return how many messages went. Needs an administrator's URL on RabbitMQ.

        Raises:
            BrokerError: the broker does not answer, or refuses.
        """
        return sum(self._link.purge(size_class) for size_class in _CLASSES)

    def delete_queues(self) -> None:
        """Delete the queues with what is in them; none there is no error. Needs an administrator's URL on RabbitMQ.

        Raises:
            BrokerError: the broker does not answer, or refuses.
        """
        for size_class in _CLASSES:
            self._link.delete(size_class)

    def declare(self) -> None:
        """Make sure that exchanges, queues and bindings are there. Needs an administrator's URL on RabbitMQ.

        Raises:
            BrokerError: the broker does not answer, refuses, or has a queue with other arguments.
        """
        self._link.declare()

    def close(self) -> None:
        """Close the connection; the next call would open one again."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
