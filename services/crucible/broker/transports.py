"""The two wire protocols as kombu speaks them, each with what it lacks for our use.

They have URL schemes of their own. kombu would go back to its own transports at the first switch to another node if it were only told of
these when a connection is made, and then neither look at the version nor at the host name in a certificate.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, pyamqp, redis

from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.topology import MINIMUM_VERSION, new_enough
from crucible.limits import PRIORITY_MAX

_PREFIX = "crucible-"
_SCHEMES = {
    "amqp": "RabbitTransport",
    "amqps": "RabbitTransport",
    "redis": "RedisTransport",
    "rediss": "RedisTransport",
}
TRANSPORT_ALIASES.update({_PREFIX + scheme: f"{__name__}:{name}" for scheme, name in _SCHEMES.items()})

# The lists that a queue is made of, one per priority, in the order in which they are read.
REDIS_PRIORITY_STEPS = tuple(range(PRIORITY_MAX + 1))


class RabbitTransport(pyamqp.SSLTransport):
    """AMQP 0-9-1 to a RabbitMQ that is new enough, the certificate's name always checked against the address in use."""

    def __init__(self, client: Any, **options: Any) -> None:
        # The parent turns encryption on where it is off, for its own scheme.
        pyamqp.Transport.__init__(self, client, **options)

    def establish_connection(self) -> Any:
        """Connect to the node that the client names.

        Raises:
            BrokerError: it is a RabbitMQ whose queues do not do what the platform needs.
        """
        client: Any = self.client
        if client.ssl:
            # kombu remembers the first node's name in the options that all nodes share, and takes localhost for an address.
            client.ssl = {**client.ssl, "server_hostname": client.hostname}
        connection: Any = super().establish_connection()  # type: ignore[no-untyped-call]
        try:
            check_version(connection.server_properties)
        except BrokerError:
            connection.collect()
            raise
        return connection


class RedisChannel(redis.Channel):
    """Eleven priorities where kombu has ten; it would mix the two lowest."""

    max_priority = PRIORITY_MAX


class RedisTransport(redis.Transport):
    """Redis lists, for the broker that is being left."""

    Channel = RedisChannel


def for_kombu(url: str) -> str:
    """Return a node's URL with the scheme of our transport."""
    return _PREFIX + url


def redis_priority(priority: int) -> int:
    """Return the priority as kombu's Redis transport reads it, where 0 comes first."""
    return PRIORITY_MAX - priority


def check_version(properties: dict[str, Any]) -> None:
    """Raise `BrokerError` unless the server is a RabbitMQ that orders replicated queues by priority."""
    product, version = str(properties.get("product")), str(properties.get("version"))
    if product != "RabbitMQ" or not new_enough(version):
        raise BrokerError(
            BrokerReason.TOO_OLD,
            f"the broker is {product} {version}, and RabbitMQ {MINIMUM_VERSION} or later is needed: "
            "earlier ones do not order replicated queues by priority",
            f"upgrade it to {MINIMUM_VERSION} or later (through each series in between), or name another in CRUCIBLE_BROKER_URL",
        )
