"""A virtual host with the platform's topology in a real cluster, and the users of its services."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from crucible.broker import verify
from crucible.broker.connection import close, connect
from crucible.broker.management import Management
from crucible.broker.publisher import Publisher
from crucible.broker.topology import USERS
from crucible.broker.urls import BrokerUrl
from crucible.settings import BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers.rabbitmq import RabbitCluster


@dataclass
class Installation:
    """What an operator has: a cluster, a virtual host in it, settings, and passwords for the services' users."""

    cluster: RabbitCluster
    vhost: str
    options: dict[str, Any] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=lambda: {user.name: secrets.token_hex(8) for user in USERS})

    @property
    def settings(self) -> BrokerSettings:
        """The broker's settings, with the administrator's way in."""
        return BrokerSettings(management_url=SecretStr(self.cluster.management_url), **self.options)

    def url(self, user: str | None = None) -> BrokerUrl:
        """The broker as a service's user sees it, or as the administrator does."""
        if user is None:
            return BrokerUrl.parse(self.cluster.url(vhost=self.vhost))
        return BrokerUrl.parse(self.cluster.url(vhost=self.vhost, user=user, password=self.passwords[user]))

    def publisher(self, user: str | None = None) -> Publisher:
        """A publisher that logs in as this user."""
        return Publisher(self.url(user), self.settings)

    def apply(self) -> verify.Applied:
        """Do what `crucible broker apply` does."""
        with Management(self.settings) as api:
            return verify.apply(api, self.settings, self.vhost, self.passwords)

    def differences(self) -> list[verify.Difference]:
        """Do what `crucible broker verify` does."""
        with Management(self.settings) as api:
            return verify.differences(verify.observe(api, self.vhost), self.settings, self.vhost)

    def statistics_are_there(self) -> bool:
        """Whether the nodes know of each other's plugins, which they do some seconds after their start."""
        return all("enabled_plugins" in node for node in self.cluster.manage("GET", "nodes"))

    @contextmanager
    def channel(self, user: str | None = None) -> Iterator[Any]:
        """A bare AMQP channel of this user."""
        connection = connect(self.url(user), self.settings)
        try:
            yield connection.channel()
        finally:
            close(connection)

    def forget(self) -> None:
        """Delete the users, which belong to the whole cluster."""
        for user in USERS:
            if any(found["name"] == user.name for found in self.cluster.manage("GET", "users")):
                self.cluster.manage("DELETE", f"users/{user.name}")


def declare(url: BrokerUrl | str, settings: BrokerSettings | None = None) -> BrokerUrl:
    """Make the topology in the virtual host of this URL, as an operator does once."""
    parsed = BrokerUrl.parse(url) if isinstance(url, str) else url
    with Publisher(parsed, settings or BrokerSettings()) as publisher:
        publisher.declare()
    return parsed


def take(channel: Any, queue: str, count: int, *, then: Callable[[Any], None] | None = None) -> list[Any]:
    """Consume so many messages one at a time, each settled before the next comes; return them in order.

    The last one is settled after the consumer is gone: the broker would hand it another one in between.
    """
    taken: list[Any] = []

    def settle(message: Any) -> None:
        if then is None:
            channel.basic_ack(message.delivery_tag)
        else:
            then(message)

    def received(message: Any) -> None:
        taken.append(message)
        if len(taken) < count:
            settle(message)

    channel.basic_qos(0, 1, False)
    tag = channel.basic_consume(queue, callback=received)
    while len(taken) < count:
        channel.connection.drain_events(timeout=10)
    channel.basic_cancel(tag)
    settle(taken[-1])
    return taken
