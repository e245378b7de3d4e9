"""Connections to a broker: each node tried once, in bounded time, and every failure told as what it is.

Nothing here tries again by itself: whoever calls decides when, so that no loop hides in a library.
"""

from __future__ import annotations

import math
import os
import random
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from amqp import exceptions as amqp_errors
from kombu.connection import Connection
from redis import exceptions as redis_errors

from crucible.broker import transports
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.topology import VHOST
from crucible.redis_tls import redis_tls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crucible.broker.urls import BrokerUrl, Node
    from crucible.settings import BrokerSettings

# How long an established connection may take to answer one question (a declaration, a channel). A quorum queue that is
# choosing a leader takes up to a few seconds.
ANSWER_SECONDS = 10.0
# A farewell is a courtesy; a broker that is blocked or gone never answers it.
_FAREWELL_SECONDS = 1.0

# What holds for the whole cluster, so that asking the next node is of no use.
_CLUSTER_WIDE = frozenset({BrokerReason.CREDENTIALS, BrokerReason.VHOST, BrokerReason.REFUSED})


def connect(url: BrokerUrl, settings: BrokerSettings) -> Connection:
    """Return an open connection to one of the broker's nodes, tried in random order.

    Takes at most a few times `connect_timeout_seconds` per node (name look-up, TCP, TLS, log-in).

    Raises:
        BrokerError: no node can be used.
    """
    failures: list[BrokerError] = []
    for index in random.sample(range(len(url.members)), len(url.members)):
        node = url.members[index]
        connection = Connection(transports.for_kombu(url.nodes[index]), **connection_options(url, settings))
        try:
            # With so short a time in all, kombu tries once and does not wait to try again.
            connection.ensure_connection(max_retries=1, timeout=1e-6, reraise_as_library_errors=False)
        except BrokerError as error:
            failures.append(error)
        except (OSError, amqp_errors.AMQPError, redis_errors.RedisError) as error:
            failures.append(_explain(error, node, url, settings))
        else:
            return connection
        if failures[-1].reason in _CLUSTER_WIDE:
            break
    raise _most_telling(failures)


def connection_options(url: BrokerUrl, settings: BrokerSettings) -> dict[str, Any]:
    """Return the arguments of every `kombu.Connection` to this broker, beside its URL."""
    rabbitmq = url.kind == "rabbitmq"
    return {
        "connect_timeout": settings.connect_timeout_seconds,
        "heartbeat": heartbeat(settings) if rabbitmq else 0,
        "ssl": (ssl_options(settings) if rabbitmq else redis_tls(settings)) if url.tls else False,
        "transport_options": transport_options(url, settings),
    }


def heartbeat(settings: BrokerSettings) -> int:
    """Return the heartbeat as AMQP can say it: whole seconds."""
    return max(1, math.ceil(settings.heartbeat_seconds))


def transport_options(url: BrokerUrl, settings: BrokerSettings) -> dict[str, Any]:
    """Return what kombu's transport must know, for our own connections and for Celery's."""
    if url.kind == "rabbitmq":
        return {
            "read_timeout": ANSWER_SECONDS,
            "write_timeout": ANSWER_SECONDS,
            # Shown in the management page's list of connections.
            "client_properties": {"connection_name": f"crucible {socket.gethostname()}/{os.getpid()}"},
        }
    return {
        "priority_steps": list(transports.REDIS_PRIORITY_STEPS),
        # Across queues too, the highest priority first.
        "queue_order_strategy": "priority",
        # Redis takes a message away from a worker that holds it for longer; twice the longest hold costs nothing.
        "visibility_timeout": 2 * settings.consumer_timeout_seconds,
        "socket_connect_timeout": settings.connect_timeout_seconds,
        # Redis answers from memory; only a worker waits for it on purpose, for a second each time.
        "socket_timeout": max(2.0, 2 * settings.connect_timeout_seconds),
        "socket_keepalive": True,
        "health_check_interval": heartbeat(settings),
    }


def ssl_options(settings: BrokerSettings) -> dict[str, Any]:
    """Return the TLS options of py-amqp: the server's certificate must be trusted and bear its host's name."""
    options: dict[str, Any] = {"cert_reqs": ssl.CERT_REQUIRED, "tls_minimum_version": ssl.TLSVersion.TLSv1_2}
    if settings.ca_file:
        options["ca_certs"] = str(settings.ca_file)
    if settings.cert_file:
        options |= {
            "certfile": str(settings.cert_file),
            "keyfile": str(settings.key_file) if settings.key_file else None,
        }
    return options


def close(connection: Connection) -> None:
    """Close a connection, whatever state it is in, within a second."""
    link = connection.connection if connection.connected else None
    with suppress(OSError, amqp_errors.AMQPError, redis_errors.RedisError):
        if link is not None and hasattr(link, "transport") and hasattr(link.transport, "having_timeout"):
            with link.transport.having_timeout(_FAREWELL_SECONDS):
                link.close()
    connection.collect()


def _most_telling(failures: Sequence[BrokerError]) -> BrokerError:
    """Return the failure that a person must see: a mistake in the set-up rather than a node that is down."""
    return min(failures, key=lambda failure: failure.passing)


def _explain(error: Exception, node: Node, url: BrokerUrl, settings: BrokerSettings) -> BrokerError:
    """Return what a failed attempt to connect means."""
    if isinstance(error, redis_errors.RedisError):
        return _explain_redis(error, node, settings)
    if isinstance(error, amqp_errors.AMQPError) and error.reply_code in {403, 530}:
        return explain_refusal(error, url)
    if isinstance(error, ssl.SSLError):
        return _explain_tls(error, node)
    if not node.tls and _speaks_tls(node, settings.connect_timeout_seconds):
        return BrokerError(
            BrokerReason.TLS,
            f"{node.address} speaks TLS only, and the URL says amqp://",
            f"write amqps:// (and CRUCIBLE_BROKER__CA_FILE), or the port without TLS, usually {node.host}:5672",
        )
    return _unreachable(node, _why(error))


def _unreachable(node: Node, why: str) -> BrokerError:
    return BrokerError(
        BrokerReason.UNREACHABLE,
        f"the broker at {node.address} cannot be reached: {why}",
        "check that it runs, and the host and port in CRUCIBLE_BROKER_URL",
    )


def _why(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "its host name is not known here"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def explain_loss(error: Exception, url: BrokerUrl) -> BrokerError:
    """Return what it means that an operation on an open connection failed: a refusal, or that the connection was lost."""
    if isinstance(error, amqp_errors.AMQPError) and error.reply_code in {403, 404, 405, 406, 530}:
        return explain_refusal(error, url)
    return BrokerError(
        BrokerReason.UNREACHABLE,
        f"the connection to the broker was lost ({str(error) or type(error).__name__})",
        "nothing to do if it comes back: the next attempt connects again, to another node if need be",
    )


def explain_refusal(error: amqp_errors.AMQPError, url: BrokerUrl) -> BrokerError:
    """Return what RabbitMQ's refusal of a connection, a channel or an operation means."""
    code, text = error.reply_code, str(error.reply_text)
    said = f"RabbitMQ said: {code} {text}"
    if code == 403 and "login was refused" in text.lower():
        reason, what, hint = (
            BrokerReason.CREDENTIALS,
            f"the broker refuses user {url.user!r} or its password",
            "correct them in CRUCIBLE_BROKER_URL (/ ? # @ : , in a password as %XX); `crucible broker apply` makes users",
        )
    elif code == 530 and "vhost" in text and "not found" in text:
        reason, what, hint = (
            BrokerReason.VHOST,
            f"the broker has no virtual host {url.vhost!r}",
            f"`crucible broker apply` makes it; else end the URL with /{VHOST}",
        )
    elif code == 530 and "access to vhost" in text:
        reason, what, hint = (
            BrokerReason.VHOST,
            f"user {url.user!r} may not enter virtual host {url.vhost!r}",
            f"`crucible broker apply` gives the permissions; else end the URL with /{VHOST}",
        )
    elif code == 404:
        reason, what, hint = (
            BrokerReason.NOT_DECLARED,
            f"the broker lacks a queue or exchange in virtual host {url.vhost!r} ({said})",
            "run `crucible broker apply`, which declares what is missing",
        )
    elif code in {405, 406}:
        reason, what, hint = (
            BrokerReason.QUEUE_DIFFERS,
            f"the broker has a queue or exchange with other arguments than ours ({said})",
            "`crucible broker verify` names every difference and how to resolve it",
        )
    elif code == 403:
        reason, what, hint = (
            BrokerReason.REFUSED,
            f"user {url.user!r} lacks a permission ({said})",
            "run `crucible broker apply`, which sets the permissions, or use the user of this service",
        )
    else:
        reason, what, hint = (BrokerReason.REFUSED, f"the broker refuses ({said})", "the broker's log says more")
    return BrokerError(reason, what, hint)


def _explain_tls(error: ssl.SSLError, node: Node) -> BrokerError:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.rstrip(".")
        # X509_V_ERR_HOSTNAME_MISMATCH and ..._IP_ADDRESS_MISMATCH in OpenSSL's x509_vfy.h.
        if error.verify_code in {62, 64}:
            what = f"the certificate of {node.address} is for another host ({why})"
            hint = "use in the URL a name that is in the certificate, or have one issued for this name"
        else:
            what = f"the certificate of {node.address} is not trusted ({why})"
            hint = "name in CRUCIBLE_BROKER__CA_FILE the file with the certificates that sign it"
        return BrokerError(BrokerReason.TLS, what, hint)
    if error.reason in {"WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"}:
        return _no_tls(node)
    return BrokerError(
        BrokerReason.TLS,
        f"TLS to {node.address} fails ({error.reason or error})",
        "check CRUCIBLE_BROKER__CERT_FILE and __KEY_FILE: the server may ask for a certificate of a signer it trusts",
    )


def _no_tls(node: Node) -> BrokerError:
    return BrokerError(
        BrokerReason.TLS,
        f"{node.address} does not speak TLS, and the URL asks for it",
        f"write the port with TLS (of RabbitMQ usually {node.host}:5671), or amqp:// (redis://) without TLS",
    )


def _speaks_tls(node: Node, timeout: float) -> bool:
    """Whether a TLS handshake gets an answer in TLS. Only asked to explain a failure: nothing is sent or believed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((node.host, node.port), timeout=timeout) as plain,
            context.wrap_socket(plain) as encrypted,
        ):
            return encrypted.version() is not None
    except ssl.SSLError as error:
        # An alert, such as "certificate required", is an answer in TLS.
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _speaks_plain_redis(node: Node, timeout: float) -> bool:
    """Whether Redis answers without TLS. It waits in silence for the end of what it takes for a line when it is spoken to in TLS."""
    try:
        with socket.create_connection((node.host, node.port), timeout=timeout) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in {b"+", b"-"}
    except OSError:
        return False


def _explain_redis(error: redis_errors.RedisError, node: Node, settings: BrokerSettings) -> BrokerError:
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and len(chain) < 10:
        chain.append(step)
        step = step.__cause__ or step.__context__
    for found in chain:
        if isinstance(found, ssl.SSLError):
            return _explain_tls(found, node)
    if isinstance(error, redis_errors.AuthenticationError) or "NOAUTH" in str(error) or "WRONGPASS" in str(error):
        return BrokerError(
            BrokerReason.CREDENTIALS,
            f"the Redis at {node.address} refuses the user or the password",
            "correct them in the URL: redis://USER:PASSWORD@HOST:6379/0, or redis://:PASSWORD@HOST:6379/0",
        )
    if "DB index" in str(error):
        return BrokerError(
            BrokerReason.VHOST,
            f"the Redis at {node.address} has no database {node.path}",
            "end the URL with /0, or raise `databases` in Redis' configuration",
        )
    if node.tls and _speaks_plain_redis(node, settings.connect_timeout_seconds):
        return _no_tls(node)
    if not node.tls and _speaks_tls(node, settings.connect_timeout_seconds):
        return BrokerError(
            BrokerReason.TLS,
            f"{node.address} speaks TLS only, and the URL says redis://",
            "write rediss:// (and CRUCIBLE_BROKER__CA_FILE), or the port without TLS",
        )
    why = next((_why(found) for found in chain if isinstance(found, OSError)), str(error))
    return _unreachable(node, why)
