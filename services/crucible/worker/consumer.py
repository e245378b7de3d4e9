"""Celery's consumer, as the platform needs it: hints of three size classes, each within its own slots, from whichever node lives.

It differs from Celery's own in these ways, each for a reason that was measured or met:

- One channel and one prefetch count per size class. RabbitMQ 4.3 refuses a prefetch count for all consumers, and one for all classes
  would let large evaluations take the small ones' slots.
- No gossip, mingle, remote control or events: they need queues that RabbitMQ 4.3 refuses or that nobody reads. No native delayed delivery:
  it speaks to every node of the list, dead ones included, before it consumes again (17 s after a node was killed).
- A lost connection is replaced by one to another node at once, and only then with growing pauses.
- A node that is alive but cut off from the others keeps its connections and hands out nothing. So the consumer puts its node to the
  test every two seconds (`_Probe`).
- Nothing may hold the loop for ever: a watchdog in another thread closes the socket under it.

Runs in a thread of its own (`hub` is its event loop); what it shares with others is said at each place.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from amqp.exceptions import AMQPError, NotFound, RecoverableConnectionError
from celery import bootsteps
from celery.worker.consumer import Consumer
from celery.worker.consumer.connection import Connection
from celery.worker.consumer.consumer import Evloop
from celery.worker.state import maybe_shutdown
from kombu.common import QoS, ignore_errors
from kombu.messaging import Consumer as QueueConsumer

from crucible import logs, metrics
from crucible.broker.connection import connect, explain_refusal
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.topology import queue_name
from crucible.limits import SizeClass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings
    from crucible.worker.holding import Slots

log = logs.get_logger("worker.broker")

_PROBE_S = 2.0
_BEAT_S = 0.5
# One question to a node may take this long.
_PATIENCE_S = 4.0
# The first questions over a new connection may take this long, and twice as long each time that they took longer. RabbitMQ lets
# a consumer wait for seven seconds that asked while a queue chose its leader; asked again it answers at once.
_PATIENCE_FIRST_S = 1.0
_PATIENCE_MOST_S = 10.0
# A node that has just come back may not have heard of our consumers yet.
_PROBES_FAILED = 2
_PAUSE_FIRST_S = 0.25
_PAUSE_MOST_S = 5.0
# A node that was consumed from and then was of no use is not the first choice for so long.
_SHUN_S = 30.0
# A connection that lasted this long was a good one: the next attempt is made at once.
_GOOD_S = 10.0


class Link:
    """What the rest of the process knows of the connection, and what the consumer must be told. Used from several threads."""

    def __init__(
        self, url: BrokerUrl, settings: BrokerSettings, slots: Mapping[SizeClass, Slots], on_lost: Callable[[], None]
    ) -> None:
        self.url = url
        self.settings = settings
        self.on_lost = on_lost
        # The worker takes no further message / has settled all that it ever will.
        self.stopping = threading.Event()
        self.stopped = threading.Event()
        self._slots = slots
        self._problem: str | None = "not connected to the broker yet"
        self._watched: socket.socket | None = None
        self._patience = 0.0
        self._beaten = 0.0
        self._lock = threading.Lock()

    def prefetch(self, size_class: SizeClass) -> int:
        """Return how many messages of a size class may be held at a time."""
        return self._slots[size_class].size

    def has_room(self) -> bool:
        """Whether a small evaluation could begin now."""
        return self._slots[SizeClass.SMALL].free > 0

    def problem(self) -> str | None:
        """Return why nothing is consumed now, or None."""
        return self._problem

    def up(self) -> None:
        """Note that messages are consumed."""
        self._problem = None

    def down(self, problem: str) -> None:
        """Note that nothing is consumed, and why."""
        self._problem = problem

    def watch(self, link: socket.socket | None, seconds: float) -> None:
        """From now on, close this socket if no `beat` comes for so long; None: watch none."""
        with self._lock:
            self._watched, self._patience, self._beaten = link, seconds, time.monotonic()

    def beat(self) -> None:
        """Say that the consumer's loop turns."""
        self._beaten = time.monotonic()

    def guard(self) -> None:
        """Close the socket under a consumer that has waited too long for it. Called every now and then, from another thread."""
        with self._lock:
            if self._watched is None or time.monotonic() - self._beaten < self._patience:
                return
            link, self._watched = self._watched, None
        log.warning("the broker's node does not answer; leaving it", seconds=round(self._patience, 1))
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


class _Consumers:
    """One consumer per size class, as Celery's loop sees them: one."""

    def __init__(self, consumers: Mapping[SizeClass, QueueConsumer], link: Link) -> None:
        self._consumers = consumers
        self._link = link
        self.on_message: Callable[[Any], None] | None = None
        self.received = 0

    def consume(self) -> None:
        for size_class, consumer in self._consumers.items():
            consumer.on_message = partial(self.receive, size_class)
            consumer.qos(prefetch_count=self._link.prefetch(size_class), apply_global=False)
            consumer.consume()

    def receive(self, size_class: SizeClass, message: Any) -> None:
        self.received += size_class is SizeClass.SMALL
        if message.delivery_info.get("redelivered"):
            metrics.BROKER_REDELIVERED.labels(size_class).inc()
        if isinstance(message.headers, dict):
            # The task finds it on its request.
            message.headers["size_class"] = size_class
        if self.on_message is not None:
            self.on_message(message)

    def cancel(self) -> None:
        for consumer in self._consumers.values():
            consumer.cancel()

    def close(self) -> None:
        for consumer in self._consumers.values():
            if consumer.channel:
                consumer.channel.close()


class _Deliveries(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Opens a channel per size class, and keeps asking the node whether it still is of any use."""

    requires = (Connection,)

    def __init__(self, consumer: HintConsumer, **_: Any) -> None:
        consumer.task_consumer = None
        # Celery's loop wants one to look at; the consumers' own never change.
        consumer.qos = QoS(lambda **_: None, 0)

    def start(self, consumer: HintConsumer) -> None:
        consumer.update_strategies()
        queues = consumer.app.amqp.queues
        consumers = {
            size_class: QueueConsumer(
                consumer.connection.channel(),
                [queues[queue_name(size_class)]],
                auto_declare=False,
                accept=consumer.app.conf.accept_content,
                on_decode_error=consumer.on_decode_error,
            )
            for size_class in SizeClass
        }
        consumer.task_consumer = _Consumers(consumers, consumer.link)

    def stop(self, consumer: HintConsumer) -> None:
        if consumer.task_consumer:
            ignore_errors(consumer, consumer.task_consumer.cancel)

    def shutdown(self, consumer: HintConsumer) -> None:
        self.stop(consumer)
        if consumer.task_consumer:
            ignore_errors(consumer, consumer.task_consumer.close)
            consumer.task_consumer = None

    def register_with_event_loop(self, consumer: HintConsumer, hub: Any) -> None:
        hub.call_repeatedly(_BEAT_S, consumer.link.beat)
        if consumer.is_rabbitmq and consumer.task_consumer:
            hub.call_repeatedly(_PROBE_S, _Probe(consumer.connection.channel(), consumer.task_consumer, consumer.link))


class _Probe:
    """Finds out whether the node is one of a majority, through the queue of small evaluations.

    On the wrong side of a partition the queue's leader may be out of the node's reach: it then says that nobody consumes, though we do. Or
    the node leads the queue itself, and does not know that the others have chosen another leader: then it has messages and does not
    hand them out, or believes the queue empty. Only what needs the others' consent shows the last: asking for a message. If one comes it
    is as welcome as any.
    """

    def __init__(self, channel: Any, consumers: _Consumers, link: Link) -> None:
        self._channel = channel
        self._consumers = consumers
        self._link = link
        self._received = 0
        self._failed = 0

    def __call__(self) -> None:
        queue = queue_name(SizeClass.SMALL)
        answer = self._channel.queue_declare(queue, passive=True)
        quiet, self._received = self._consumers.received == self._received, self._consumers.received
        idle = quiet and self._link.has_room()
        if not answer.consumer_count or (idle and answer.message_count):
            self._failed += 1
            if self._failed >= _PROBES_FAILED:
                raise RecoverableConnectionError("the node has lost touch with the others")
            return
        self._failed = 0
        if idle and (message := self._channel.basic_get(queue)) is not None:
            self._consumers.receive(SizeClass.SMALL, self._channel.message_to_python(message))


class HintConsumer(Consumer):  # type: ignore[misc] # Celery has no types
    """Consumes hints for as long as its process lives."""

    class Blueprint(bootsteps.Blueprint):  # type: ignore[misc] # Celery has no types
        """Connection, deliveries and the loop; none of Celery's other steps."""

        name = "Consumer"
        default_steps: ClassVar = [Connection, _Deliveries, Evloop]

        def shutdown(self, parent: Any) -> None:
            """Shut every step down."""
            self.send_all(parent, "shutdown")

    # Set by `bound_to` on a class of its own, since Celery makes the instance.
    link: ClassVar[Link]
    event_dispatcher = None
    connection: Any = None
    task_consumer: _Consumers | None = None
    qos: Any = None

    @classmethod
    def bound_to(cls, link: Link) -> type[HintConsumer]:
        """Return the class of a consumer that uses this link."""
        return type("HintConsumer", (cls,), {"link": link})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._node: str | None = None
        self._connected_at = 0.0
        self._pause = 0.0
        self._patience = _PATIENCE_FIRST_S
        self._shunned: dict[str, float] = {}
        self._told: BrokerReason | None = None
        super().__init__(*args, **kwargs)

    @property
    def is_rabbitmq(self) -> bool:
        """Whether the broker is RabbitMQ."""
        return self.link.url.kind == "rabbitmq"

    def start(self) -> None:
        """Consume until told to stop."""
        try:
            super().start()
        except Exception:
            # A mistake, here or in a library. Celery now waits for its threads, which wait for what runs.
            self.link.down("the consumer failed")
            self.link.on_lost()
            raise

    def connect(self) -> Any:
        """Return a connection over which consuming can begin; tries for ever, every node, with bounded pauses."""
        self._after_last()
        while True:
            if self.link.stopping.is_set():
                # What was held over the lost connection is not ours any more, so there is nothing left to settle.
                self.link.stopped.wait()
            maybe_shutdown()
            if self._pause:
                # Jittered, so that the workers of a broker that comes back do not come in step.
                self.link.stopping.wait(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, no secret
                if self.link.stopping.is_set():
                    continue
            self._pause = min(max(self._pause * 2, _PAUSE_FIRST_S), _PAUSE_MOST_S)
            try:
                connection = self._try_nodes()
            except BrokerError as error:
                if error.reason is not self._told:
                    log.warning("no broker to consume from; trying again", reason=error.reason, error=str(error))
                self._told = error.reason
                self.link.down(str(error))
                continue
            if self.hub:
                connection.transport.register_with_event_loop(connection.connection, self.hub)
            return connection

    def _after_last(self) -> None:
        """Pause longer before the next attempt only if the last connection was of no use."""
        if time.monotonic() - self._connected_at > _GOOD_S:
            self._pause = 0.0

    def _try_nodes(self) -> Any:
        """Connect, to a node that has not failed us lately if there is one, and see that the queues are there.

        Raises:
            BrokerError: no node can be used now.
        """
        url = self.link.url
        now = time.monotonic()
        others = tuple(node for node in url.members if self._shunned.get(node.address, now) <= now)
        if others and len(others) < len(url.members):
            with suppress(BrokerError):
                return self._usable(connect(replace(url, members=others), self.link.settings))
        return self._usable(connect(url, self.link.settings))

    def _usable(self, connection: Any) -> Any:
        if self.is_rabbitmq:
            self._node = f"{connection.hostname}:{connection.port}"
            self.link.watch(connection.connection.sock, self._patience)
            self._patience = min(2 * self._patience, _PATIENCE_MOST_S)
            try:
                with connection.channel() as channel:
                    for size_class in SizeClass:
                        channel.queue_declare(queue_name(size_class), passive=True)
            except (OSError, AMQPError) as error:
                self.link.watch(None, 0.0)
                connection.collect()
                if isinstance(error, NotFound):
                    raise explain_refusal(error, self.link.url) from error
                raise BrokerError(
                    BrokerReason.UNREACHABLE, f"the node {self._node} does not answer ({error})", "see that it runs"
                ) from error
        return connection

    def on_ready(self) -> None:
        """Note that messages come in from now on."""
        super().on_ready()
        self._connected_at = time.monotonic()
        metrics.WORKER_CONNECTIONS.inc()
        self._told = None
        if self.is_rabbitmq:
            self._patience = _PATIENCE_FIRST_S
            self.link.watch(self.connection.connection.sock, _PATIENCE_S)
        self.link.up()
        log.info("consuming", broker=self._node or self.link.url.safe)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Leave a connection that is of no use any more. What runs goes on; its messages come again."""
        why = str(exc) or type(exc).__name__
        self.link.watch(None, 0.0)
        if self._node and self.link.problem() is None:
            self._shunned[self._node] = time.monotonic() + _SHUN_S
        self.link.down(f"the connection to the broker was lost: {why}")
        log.warning("the connection to the broker was lost", node=self._node, error=why)
        connection, self.connection = self.connection, None
        ignore_errors(self, connection.collect)
        self.link.on_lost()

    def call_soon_ack(self, settle: Any, *args: Any) -> Any:
        """Acknowledge or reject in the loop's thread. Too late is not critical: the message comes again, and storage knows better."""
        _, *rest = args
        return super().call_soon_ack(settle, _TooLate, *rest)


class _AfterTheConnection(logging.Filter):
    """Leaves out what Celery's loop says, with a traceback, of calls that were still to be made over a connection that is lost.

    Its loss has been told; what those calls would have said (acknowledgements) the broker knows by it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, (OSError, AMQPError)) and "cleaning up after event loop" in record.msg)


logging.getLogger("celery.worker.loops").addFilter(_AfterTheConnection())


class _TooLate:
    """Stands for the logger that kombu tells of a message that can no longer be settled."""

    @staticmethod
    def critical(_text: str, _tag: object, reason: object, **_: object) -> None:
        log.info("a message came to its end after its connection; the broker hands it out again", reason=str(reason))
