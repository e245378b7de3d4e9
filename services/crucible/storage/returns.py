"""What the broker gave up: taken out of its dead letter queue, told to the table, and only then acknowledged.

RabbitMQ gives a message up after its delivery limit, when a consumer rejects it, or when its queue is deleted. For the platform that is
no verdict: whether the evaluation still waits is the table's to say. Blocking, and used from one thread at a time.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amqp.exceptions import AMQPError

from crucible import logs
from crucible.broker.connection import close, connect, explain_loss
from crucible.broker.errors import BrokerError
from crucible.broker.topology import DEAD_QUEUE, TASK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kombu.connection import Connection

    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings

log = logs.get_logger("storage.returns")


@dataclass(frozen=True, slots=True)
class Returned:
    """A message that came back. `evaluation_id` is None for one that is not ours."""

    evaluation_id: str | None
    reason: str


class ReturnDesk:
    """Takes back what RabbitMQ's dead letter queue holds."""

    def __init__(self, url: BrokerUrl, settings: BrokerSettings) -> None:
        self._url = url
        self._settings = settings
        self._connection: Connection | None = None
        self._channel: Any = None
        self._last_tag: int | None = None

    def collect(self, most: int) -> tuple[list[Returned], int]:
        """Take up to `most` messages without acknowledging them; also says how many are left.

        Raises:
            BrokerError: the broker is gone or refuses; what was taken is in the queue again.
        """
        found: list[Returned] = []
        left = 0
        with self._explained():
            if self._channel is None:
                self._connection = connect(self._url, self._settings)
                self._channel = self._connection.channel()
            while len(found) < most and (message := self._channel.basic_get(DEAD_QUEUE)) is not None:
                self._last_tag = message.delivery_tag
                left = message.delivery_info.get("message_count", 0)
                found.append(_read(message))
        return found, left

    def settle(self) -> None:
        """Acknowledge everything that was collected.

        Raises:
            BrokerError: the broker is gone; what was collected comes again.
        """
        if self._last_tag is None:
            return
        with self._explained():
            self._channel.basic_ack(self._last_tag, multiple=True)
        self._last_tag = None

    def close(self) -> None:
        """Let go of the connection; what was collected and not settled is in the queue again."""
        connection, self._connection, self._channel, self._last_tag = self._connection, None, None, None
        if connection is not None:
            close(connection)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokerError:
            self.close()
            raise
        except (OSError, AMQPError) as error:
            self.close()
            raise explain_loss(error, self._url) from error


def _read(message: Any) -> Returned:
    headers = message.headers or {}
    deaths = headers.get("x-death") or [{}]
    reason = str(headers.get("x-first-death-reason") or deaths[0].get("reason") or "unknown")
    evaluation_id = headers.get("id")
    if headers.get("task") != TASK or not isinstance(evaluation_id, str):
        log.warning(
            "a message that is not ours came back from the broker and is dropped", task=str(headers.get("task"))
        )
        return Returned(None, reason)
    return Returned(evaluation_id, reason)
