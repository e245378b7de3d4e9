"""Publishing to RabbitMQ: a whole batch is sent, then its confirms are awaited together.

A confirm says that a majority of the queue's members have the message on disk. One round trip per message, as kombu's
`confirm_publish` makes it, would wait for that each time.
"""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import amqp
from amqp import exceptions as amqp_errors

from crucible import logs
from crucible.broker import topology
from crucible.broker.celery_app import make_app
from crucible.broker.connection import close, connect, explain_loss
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.message import Hint, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kombu.connection import Connection

    from crucible.broker.urls import BrokerUrl
    from crucible.limits import SizeClass
    from crucible.settings import BrokerSettings

log = logs.get_logger("broker")

# Often enough for the broker to know that we live, at the shortest heartbeat that AMQP can say (1 s).
_BEAT_SECONDS = 0.5

_NO_ROUTE = (
    "the broker has no queue for what is published",
    "run `crucible broker apply`, which declares queues and bindings",
)
_FULL = (
    "the queue is at its length limit and refuses more",
    "let workers drain it, add workers, or raise CRUCIBLE_BROKER__QUEUE_LENGTH_MAX; storage keeps what waits",
)
_BLOCKED = (
    "the broker accepts no messages while an alarm is on (memory or disk)",
    "free memory or disk space on its nodes; `rabbitmq-diagnostics alarms` names the node",
)


class _Channel:
    """An open channel in confirm mode, and what the broker said about each message sent through it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.link: Any = connection.connection
        self.link.on_blocked = self._on_blocked
        self.link.on_unblocked = self._on_unblocked
        self.channel: Any = self.link.channel()
        self.blocked = False
        # An alarm shows only in answer to a message: until the broker has said yes or no to one, only one is risked.
        self.answered = False
        self._tag = 0
        # Delivery tags that wait for their confirm, in the order in which they were sent.
        self._waiting: dict[int, int] = {}
        self.confirmed: set[int] = set()
        self.refused: set[int] = set()
        self.returned: set[str] = set()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._on_ack)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)

    def begin(self) -> None:
        """Forget what was said about the last batch."""
        for outcome in (self._waiting, self.confirmed, self.refused, self.returned):
            outcome.clear()

    def send(self, index: int, message: amqp.Message, routing_key: str) -> None:
        self._tag += 1
        self._waiting[self._tag] = index
        self.channel.basic_publish(message, topology.EXCHANGE, routing_key, mandatory=True)

    def await_confirms(self, deadline: float) -> None:
        """Return when all is confirmed or refused, the time is over, or an alarm blocks the connection."""
        while self._waiting and not self.blocked and (left := deadline - time.monotonic()) > 0:
            self._read(min(left, _BEAT_SECONDS))
            self.link.heartbeat_tick()

    def take_news(self) -> None:
        """Read what arrived meanwhile, such as the end of an alarm or of the connection, and say that we live."""
        while self._read(0):
            pass
        self.link.heartbeat_tick()

    def _read(self, timeout: float) -> bool:
        """Read one frame; False if none came. amqp's `drain_events` would go on reading for as long as heartbeats come."""
        try:
            self.link.blocking_read(timeout)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        return True

    def _settle(self, delivery_tag: int, multiple: bool, into: set[int]) -> None:
        self.answered = True
        tags = [tag for tag in self._waiting if tag <= delivery_tag] if multiple else [delivery_tag]
        for tag in tags:
            index = self._waiting.pop(tag, None)
            if index is not None:
                into.add(index)

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, self.confirmed)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, self.refused)

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: amqp.Message) -> None:  # noqa: ARG002 - amqp's signature
        self.returned.add(message.properties["correlation_id"])

    def _on_blocked(self, _: str) -> None:
        self.blocked = True

    def _on_unblocked(self) -> None:
        self.blocked = False


class RabbitLink:
    """One connection with one channel, opened when needed."""

    def __init__(self, url: BrokerUrl, settings: BrokerSettings) -> None:
        self._url = url
        self._settings = settings
        self._writer = Writer(make_app(url, settings))
        self._channel: _Channel | None = None
        # The node that failed last: it may be alive and cut off from the others, and is tried last.
        self._failed: tuple[str | None, int | None] | None = None

    def publish(self, hints: Sequence[Hint], timeout: float) -> list[bool]:
        """Publish in order; return which were confirmed. Raises if none was."""
        deadline = time.monotonic() + timeout
        channel = self._open()
        if channel.blocked:
            raise BrokerError(BrokerReason.BLOCKED, *_BLOCKED)
        channel.begin()
        failure = self._send_all(channel, hints, deadline)
        # A message that no queue takes is returned, and confirmed all the same.
        results = [
            index in channel.confirmed and hint.evaluation_id not in channel.returned
            for index, hint in enumerate(hints)
        ]
        failure = failure or self._judge(channel, results)
        if failure is not None:
            if not any(results):
                raise failure
            log.warning(
                "broker confirmed only some messages",
                broker=self._url.safe,
                confirmed=sum(results),
                published=len(hints),
                reason=failure.reason,
                detail=failure.message,
                hint=failure.hint,
            )
        return results

    def _send_all(self, channel: _Channel, hints: Sequence[Hint], deadline: float) -> BrokerError | None:
        """Send all and await what the broker says; return what went wrong with the connection."""
        try:
            for index, hint in enumerate(hints):
                if index == 1 and not channel.answered:
                    channel.await_confirms(deadline)
                    if not channel.answered:
                        break
                wire = self._writer.write(hint).on(channel.channel, hint.priority)
                channel.send(index, wire, topology.routing_key(hint.size_class))
            channel.await_confirms(deadline)
        except (OSError, amqp_errors.AMQPError) as error:
            return self._lost(error)
        return None

    def _judge(self, channel: _Channel, results: list[bool]) -> BrokerError | None:
        """Return why some were not confirmed, or None if all were."""
        if all(results):
            return None
        if channel.blocked:
            return BrokerError(BrokerReason.BLOCKED, *_BLOCKED)
        if channel.returned:
            return BrokerError(BrokerReason.NOT_DECLARED, *_NO_ROUTE)
        if channel.refused:
            return BrokerError(BrokerReason.FULL, *_FULL)
        self._leave_node()
        return BrokerError(
            BrokerReason.UNREACHABLE,
            "the broker does not confirm in time what is published",
            "check that a majority of its nodes runs: `rabbitmq-diagnostics check_if_node_is_quorum_critical`",
        )

    def depth(self, size_class: SizeClass) -> tuple[int, int | None]:
        """Return how many messages no consumer holds, and how many consumers there are."""
        found = self._ask(lambda channel: channel.queue_declare(topology.queue_name(size_class), passive=True))
        return found.message_count, found.consumer_count

    def purge(self, size_class: SizeClass) -> int:
        """Remove what no consumer holds; return how many that were."""
        return int(self._ask(lambda channel: channel.queue_purge(topology.queue_name(size_class))))

    def delete(self, size_class: SizeClass) -> None:
        """Delete the queue if it is there."""
        self._ask(lambda channel: channel.queue_delete(topology.queue_name(size_class)))

    def declare(self) -> None:
        """Declare exchanges, queues and bindings."""
        wanted = topology.topology(self._settings)
        self._ask(lambda channel: _declare(channel, wanted))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._channel is not None:
            close(self._channel.connection)
            self._channel = None

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        channel = self._open()
        if channel.blocked:
            return self._ask_beside(question)
        try:
            return question(channel.channel)
        except (OSError, amqp_errors.AMQPError) as error:
            raise self._lost(error) from None

    def _ask_beside(self, question: Callable[[Any], Any]) -> Any:
        """Ask over a connection that has never published: during an alarm the broker reads no other."""
        connection = self._connect()
        try:
            return question(connection.channel())
        except (OSError, amqp_errors.AMQPError) as error:
            raise explain_loss(error, self._url) from None
        finally:
            close(connection)

    def _open(self) -> _Channel:
        """Return the channel, newly opened if there is none or its connection was lost since."""
        if self._channel is not None:
            try:
                self._channel.take_news()
            except (OSError, amqp_errors.AMQPError) as error:
                log.info("broker connection was lost", broker=self._url.safe, error=str(error))
                self.close()
        if self._channel is None:
            connection = self._connect()
            try:
                self._channel = _Channel(connection)
            except (OSError, amqp_errors.AMQPError) as error:
                close(connection)
                raise self._lost(error) from None
        return self._channel

    def _connect(self) -> Connection:
        others = tuple(node for node in self._url.members if (node.host, node.port) != self._failed)
        if others and len(others) < len(self._url.members):
            with suppress(BrokerError):
                return connect(replace(self._url, members=others), self._settings)
        return connect(self._url, self._settings)

    def _leave_node(self) -> None:
        """Leave a node that does not answer: a queue whose majority is elsewhere never confirms there."""
        if self._channel is not None:
            self._failed = self._channel.connection.hostname, self._channel.connection.port
            # No farewell to whom does not answer.
            self._channel.connection.collect()
            self._channel = None

    def _lost(self, error: Exception) -> BrokerError:
        """Drop a connection that failed, and return what that means."""
        if isinstance(error, OSError):
            self._leave_node()
        self.close()
        return explain_loss(error, self._url)


def _declare(channel: Any, wanted: topology.Topology) -> None:
    for exchange in wanted.exchanges:
        channel.exchange_declare(exchange.name, exchange.type, durable=True, auto_delete=False)
    for queue in wanted.queues:
        channel.queue_declare(queue.name, durable=True, auto_delete=False, arguments=dict(queue.arguments))
    for binding in wanted.bindings:
        channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)
