"""What the broker holds, as data: exchanges, queues, bindings, users. Definitions, declarations and verification all read this.

Nothing here does I/O or imports a client library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crucible.limits import SizeClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crucible.settings import BrokerSettings

VHOST = "crucible"
# Topic exchanges: a consumer that wants all classes, or a tap for debugging, binds with a pattern and disturbs nobody.
EXCHANGE = "crucible.evaluations"
DEAD_EXCHANGE = "crucible.dead"
DEAD_QUEUE = "evaluations.dead"

TASK = "crucible.evaluate"

# Names that begin so are ours: what is found there and not here is a difference.
NAMESPACES = ("crucible.", "evaluations.")

# Before it, quorum queues order by two levels of priority only, or their priorities have known faults.
_MINIMUM_VERSION = (4, 3, 3)
MINIMUM_VERSION = ".".join(map(str, _MINIMUM_VERSION))
# One node may be lost, and one more taken down on purpose afterwards, only with three copies or more.
MEMBERS = 3

Argument = str | int


@dataclass(frozen=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: str = "topic"


@dataclass(frozen=True)
class Queue:
    """A durable quorum queue."""

    name: str
    arguments: Mapping[str, Argument]


@dataclass(frozen=True)
class Binding:
    """Sends what an exchange gets under matching routing keys to a queue."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True)
class User:
    """Who may do what in the virtual host. The three permissions are regular expressions over names, as RabbitMQ reads them."""

    name: str
    write: str = "^$"
    read: str = "^$"
    # Nobody but the operator may change the topology.
    configure: str = "^$"
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topology:
    """Everything that the virtual host must hold for us."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]


def new_enough(version: str) -> bool:
    """Whether a RabbitMQ that calls itself so orders replicated queues by priority."""
    release = re.match(r"\d+(\.\d+)*", version)
    return release is not None and tuple(map(int, release.group().split("."))) >= _MINIMUM_VERSION


def queue_name(size_class: SizeClass) -> str:
    """Return the queue in which evaluations of this size class wait."""
    return f"evaluations.{size_class}"


def routing_key(size_class: SizeClass) -> str:
    """Return the routing key of a size class, on `EXCHANGE` and, for what was given up, on `DEAD_EXCHANGE`."""
    return f"evaluation.{size_class}"


def evaluation_queue(size_class: SizeClass, settings: BrokerSettings) -> Queue:
    """Return the queue of a size class.

    No `x-max-priority`: quorum queues order by priority without it, and RabbitMQ 4.3 refuses it with 406.
    """
    return Queue(
        queue_name(size_class),
        {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": DEAD_EXCHANGE,
            # At least once needs reject-publish: what the dead letter queue has not taken stays where it was.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-max-length": settings.queue_length_max,
            "x-delivery-limit": settings.delivery_limit,
            "x-consumer-timeout": _milliseconds(settings.consumer_timeout_seconds),
        },
    )


def dead_queue() -> Queue:
    """Return the queue of what was given up. Nothing is ever dropped from it: it has no limit of length or deliveries."""
    return Queue(DEAD_QUEUE, {"x-queue-type": "quorum", "x-delivery-limit": -1})


def topology(settings: BrokerSettings) -> Topology:
    """Return everything that the virtual host must hold."""
    return Topology(
        exchanges=(Exchange(EXCHANGE), Exchange(DEAD_EXCHANGE)),
        queues=(*(evaluation_queue(size_class, settings) for size_class in SizeClass), dead_queue()),
        bindings=(
            *(Binding(EXCHANGE, queue_name(size_class), routing_key(size_class)) for size_class in SizeClass),
            Binding(DEAD_EXCHANGE, DEAD_QUEUE, "#"),
        ),
    )


def _exactly(*names: str) -> str:
    """Return the expression that these names match and no other."""
    inner = "|".join(map(re.escape, names))
    return f"^({inner})$"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


# Each service logs in as a user of its own, which may do what the service does and nothing else.
USERS = (
    # To ask how many messages a queue holds takes one permission on it, whichever; writing to a queue itself allows nothing
    # more, since messages enter through exchanges.
    User("crucible-storage", write=_exactly(EXCHANGE, *map(queue_name, SizeClass)), read=_exactly(DEAD_QUEUE)),
    User("crucible-worker", read=_exactly(*map(queue_name, SizeClass))),
    User("crucible-monitor", tags=("monitoring",)),
)
PLUGINS = ("rabbitmq_management", "rabbitmq_prometheus")
