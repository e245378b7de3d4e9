"""Broker URLs: read once, checked whole, and shown without their password.

Pure: nothing here opens a connection or imports a client library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, quote, unquote, urlsplit

from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.topology import VHOST

Kind = Literal["rabbitmq", "redis"]

_DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}
_EXAMPLES: dict[Kind, str] = {
    "rabbitmq": f"amqp://USER:PASSWORD@HOST:5672/{VHOST}",
    "redis": "redis://:PASSWORD@HOST:6379/0",
}


@dataclass(frozen=True)
class Node:
    """One address of a broker, with how to log in there."""

    host: str
    port: int
    user: str | None
    password: str | None = field(repr=False)
    path: str
    """The virtual host of RabbitMQ, or the number of Redis' database."""
    tls: bool

    @property
    def address(self) -> str:
        """Host and port, for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class BrokerUrl:
    """A broker: where its nodes are and how to log in. Nothing that is shown of it holds the password."""

    kind: Kind
    members: tuple[Node, ...]

    @classmethod
    def parse(cls, text: str) -> BrokerUrl:
        """Read `amqp(s)://user:password@host:port/vhost`, several nodes joined by commas, or one `redis(s)://...`.

        Raises:
            BrokerError: it cannot be used; the message says which part, and what to write instead.
        """
        parts = [part.strip() for part in text.split(",")]
        members = tuple(_read_node(part, _place(index, len(parts))) for index, part in enumerate(parts))
        schemes = {urlsplit(part).scheme for part in parts}
        kind: Kind = "redis" if schemes & {"redis", "rediss"} else "rabbitmq"
        if len(schemes) > 1:
            raise _wrong(f"its nodes mix {', '.join(sorted(schemes))}", "all nodes need the same scheme")
        if kind == "redis" and len(parts) > 1:
            raise _wrong("it names several Redis servers", f"name one: {_EXAMPLES['redis']}")
        logins = {(node.user, node.password, node.path) for node in members}
        if len(logins) > 1:
            raise _wrong(
                "its nodes differ in user, password or virtual host", "the nodes of one cluster share all of them"
            )
        return cls(kind, members)

    @property
    def nodes(self) -> tuple[str, ...]:
        """One URL per node, password included, as client libraries read them: for connecting only."""
        return tuple(_write(node, self.kind, node.password) for node in self.members)

    @property
    def safe(self) -> str:
        """The same without the password, for logs and messages."""
        return ",".join(_write(node, self.kind, None) for node in self.members)

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.members[0].tls

    @property
    def user(self) -> str | None:
        """Who logs in."""
        return self.members[0].user

    @property
    def vhost(self) -> str:
        """The virtual host of RabbitMQ, or the number of Redis' database."""
        return self.members[0].path


def _place(index: int, count: int) -> str:
    return f"node {index + 1} of {count}: " if count > 1 else ""


def _wrong(what: str, hint: str) -> BrokerError:
    return BrokerError(BrokerReason.URL, f"the broker's URL cannot be used: {what}", hint)


def _read_node(text: str, place: str) -> Node:
    """Read one URL. Messages quote only parts that cannot hold a password."""
    if not text:
        raise _wrong(f"{place}it is empty", f"write {_EXAMPLES['rabbitmq']}")
    try:
        split = urlsplit(text)
        port = split.port
    except ValueError:
        raise _wrong(
            f"{place}its port or address is not one",
            f"write {_EXAMPLES['rabbitmq']}; in a password, write each of / ? # @ : , as %XX",
        ) from None
    if split.scheme not in _DEFAULT_PORTS or "://" not in text:
        found = f"the scheme {split.scheme!r}" if "://" in text and split.scheme else "no scheme"
        raise _wrong(
            f"{place}it has {found}",
            f"write {_EXAMPLES['rabbitmq']} (amqps:// with TLS) or {_EXAMPLES['redis']} (rediss:// with TLS); "
            "in a password, write a comma as %2C",
        )
    kind: Kind = "redis" if split.scheme.startswith("redis") else "rabbitmq"
    if not split.hostname:
        raise _wrong(f"{place}it names no host", f"write {_EXAMPLES[kind]}")
    if split.query or split.fragment:
        raise _wrong(
            f"{place}it has options after ? or #",
            "leave them out: CRUCIBLE_BROKER__... has settings for them; in a password, write ? as %3F and # as %23",
        )
    path = _redis_database(split, place) if kind == "redis" else _virtual_host(split, place)
    return Node(
        host=split.hostname,
        port=port or _DEFAULT_PORTS[split.scheme],
        user=unquote(split.username) if split.username else None,
        password=unquote(split.password) if split.password else None,
        path=path,
        tls=split.scheme in {"amqps", "rediss"},
    )


def _virtual_host(split: SplitResult, place: str) -> str:
    if not split.username or not split.password:
        raise _wrong(f"{place}it names no user and password", f"write {_EXAMPLES['rabbitmq']}")
    name = split.path.removeprefix("/")
    if not name:
        raise _wrong(f"{place}it names no virtual host", f"end it with /{VHOST}")
    if "/" in name:
        raise _wrong(f"{place}its virtual host holds a /", f"end it with /{VHOST}; write / inside a name as %2F")
    return unquote(name)


def _redis_database(split: SplitResult, place: str) -> str:
    name = split.path.strip("/") or "0"
    if not (name.isascii() and name.isdigit()):
        raise _wrong(f"{place}its database is not a number", f"write {_EXAMPLES['redis']}")
    return name


def _write(node: Node, kind: Kind, password: str | None) -> str:
    scheme = ("amqp" if kind == "rabbitmq" else "redis") + ("s" if node.tls else "")
    secret = f":{quote(password, safe='')}" if password else ""
    login = f"{quote(node.user or '', safe='')}{secret}"
    return f"{scheme}://{login}{'@' if login else ''}{node.address}/{quote(node.path, safe='')}"
