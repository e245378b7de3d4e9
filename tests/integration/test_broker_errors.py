"""Every wrong configuration of a broker, against real brokers: told by its name, with what to do, and in bounded time."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from crucible.broker.celery_app import make_app
from crucible.broker.connection import close, connect
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import queue_name
from crucible.broker.urls import BrokerUrl
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings
from tests.servers.certificates import Authority
from tests.servers.rabbitmq import AMQP_PORT, AMQPS_PORT, RabbitCluster
from tests.servers.redis import RedisServer
from tests.support.broker import Installation
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.waits import wait_until

pytestmark = [pytest.mark.integration, needs("rabbitmq")]

QUICK = BrokerSettings(connect_timeout_seconds=1)
HASTY = BrokerSettings(connect_timeout_seconds=0.3)
HINT = Hint("evaluation-1", SizeClass.SMALL, 5)
# One node may take its time several times over: to connect, to speak TLS, to log in, and to be asked if it speaks TLS.
BOUND_SECONDS = 8.0


def refused(url: str, settings: BrokerSettings = QUICK) -> BrokerError:
    """What connecting says, which must come soon and without the password."""
    started = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        close(connect(BrokerUrl.parse(url), settings))
    assert time.monotonic() - started < BOUND_SECONDS
    password = BrokerUrl.parse(url).members[0].password
    assert password
    assert password not in str(caught.value)
    assert caught.value.hint in str(caught.value)
    return caught.value


@pytest.fixture
def installed(rabbitmq: RabbitCluster, rabbit_vhost: str) -> Iterator[Installation]:
    """A virtual host with the whole topology, and the users of the services."""
    found = Installation(rabbitmq, rabbit_vhost)
    found.apply()
    yield found
    found.forget()


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose connections are each handed to `answer` and kept open until the end."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = server.accept()
                except OSError:
                    return
                answer(stack.enter_context(accepted))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


# --- where it is and who may enter ----------------------------------------------------------------------------------------------


def test_a_wrong_password_and_a_wrong_user_are_told_as_such(installed: Installation) -> None:
    for user, password in (("crucible-storage", "wrong"), ("nobody", "wrong")):
        error = refused(installed.cluster.url(user=user, password=password, vhost=installed.vhost))
        assert error.reason is BrokerReason.CREDENTIALS
        assert repr(user) in error.message
        assert "CRUCIBLE_BROKER_URL" in error.hint


def test_a_password_of_any_characters_works_once_it_is_written_as_the_message_says(installed: Installation) -> None:
    installed.passwords["crucible-storage"] = "a/b?c#d@e:f,g%h i\\ü"
    installed.apply()
    url = installed.url("crucible-storage")
    close(connect(url, QUICK))
    with make_app(url, QUICK).connection_for_read() as connection:
        connection.connect()


def test_a_virtual_host_that_is_not_there_or_not_for_this_user_is_named(installed: Installation) -> None:
    missing = refused(installed.cluster.url(vhost="elsewhere"))
    assert (missing.reason, "'elsewhere'" in missing.message) == (BrokerReason.VHOST, True)
    login = {"user": "crucible-worker", "password": installed.passwords["crucible-worker"]}
    closed = refused(installed.cluster.url(vhost="/", nodes=None, **login))
    assert closed.reason is BrokerReason.VHOST
    assert "may not enter" in closed.message


def test_a_port_at_which_nobody_listens_and_a_host_that_does_not_exist_are_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    closed = refused(f"amqp://u:secret@127.0.0.1:{port}/crucible")
    assert (closed.reason, closed.passing) == (BrokerReason.UNREACHABLE, True)
    assert f"127.0.0.1:{port}" in closed.message
    assert "refused" in closed.message
    unknown = refused("amqp://u:secret@broker.invalid/crucible")
    assert unknown.reason is BrokerReason.UNREACHABLE
    assert "broker.invalid:5672" in unknown.message


def test_a_server_that_accepts_and_says_nothing_and_one_of_another_kind_are_left_in_time() -> None:
    with listener(lambda _: None) as silent:
        assert refused(f"amqp://u:secret@127.0.0.1:{silent}/crucible", HASTY).reason is BrokerReason.UNREACHABLE
        assert refused(f"amqps://u:secret@127.0.0.1:{silent}/crucible", HASTY).reason is BrokerReason.UNREACHABLE
    with listener(lambda link: link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as web:
        assert refused(f"amqp://u:secret@127.0.0.1:{web}/crucible", HASTY).reason is BrokerReason.UNREACHABLE


def test_the_nodes_that_live_are_found_among_those_that_do_not(installed: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    dead = ",".join(f"amqp://admin:{installed.cluster.password}@127.0.0.1:{port}/{installed.vhost}" for _ in range(4))
    living = installed.cluster.url(vhost=installed.vhost, nodes=installed.cluster.nodes[:1])
    close(connect(BrokerUrl.parse(f"{dead},{living}"), QUICK))


def test_a_node_that_is_cut_off_is_left_in_time_and_the_next_attempt_finds_another(installed: Installation) -> None:
    if not installed.cluster.can_be_cut:
        pytest.skip("nodes share this machine's network here; as root each has its own")
    node = installed.cluster.nodes[2]
    alone = BrokerUrl.parse(installed.cluster.url(vhost=installed.vhost, nodes=[node]))
    with Publisher(alone, QUICK) as publisher:
        assert publisher.publish([HINT], 10) == [True]
        installed.cluster.cut_off(node)
        started = time.monotonic()
        with pytest.raises(BrokerError) as caught:
            publisher.publish([HINT], 2)
        assert caught.value.reason is BrokerReason.UNREACHABLE
        assert time.monotonic() - started < BOUND_SECONDS
    with installed.publisher("crucible-storage") as publisher:
        assert publisher.publish([HINT], 10) == [True]


# --- too old --------------------------------------------------------------------------------------------------------------------


def test_a_broker_of_the_3_series_is_refused_with_its_version_and_the_one_that_is_needed() -> None:
    for folder in scratch_dir():
        with RabbitCluster(folder, nodes=1, root="old-broker") as old:
            error = refused(old.url())
            assert error.reason is BrokerReason.TOO_OLD
            assert "RabbitMQ 3." in error.message
            assert "4.3.3" in error.message
            assert "upgrade" in error.hint
            # Celery's own connections refuse it too.
            with pytest.raises(BrokerError, match=r"RabbitMQ 3\."):
                make_app(BrokerUrl.parse(old.url()), QUICK).connection_for_read().connect()


# --- TLS ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> Iterator[BrokerSettings]:
    """Settings that trust the authority and show a certificate of it."""
    for folder in scratch_dir():
        files = authority.issue_into(folder / "client", "client")
        yield BrokerSettings(
            connect_timeout_seconds=1, ca_file=files.authority, cert_file=files.certificate, key_file=files.key
        )


@pytest.fixture(scope="module")
def encrypted(authority: Authority) -> Iterator[RabbitCluster]:
    """A broker of one node that speaks TLS on 5671 and none on 5672."""
    for folder in scratch_dir():
        with RabbitCluster(folder, nodes=1, tls=authority) as cluster:
            yield cluster


@contextmanager
def forwarded(address: str, port: int) -> Iterator[int]:
    """A port of 127.0.0.1 that leads to another address, as a tunnel does."""
    pumps: list[threading.Thread] = []
    with ExitStack() as stack:

        def pump(source: socket.socket, target: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        def lead(accepted: socket.socket) -> None:
            onward = stack.enter_context(socket.create_connection((address, port)))
            for pair in ((accepted, onward), (onward, accepted)):
                pumps.append(threading.Thread(target=pump, args=pair, daemon=True))
                pumps[-1].start()

        with listener(lead) as entry:
            yield entry


def test_tls_works_with_the_certificates_checked_for_us_and_for_celery(
    encrypted: RabbitCluster, trusting: BrokerSettings
) -> None:
    url = BrokerUrl.parse(encrypted.url(tls=True))
    with Publisher(url, trusting) as publisher:
        publisher.declare()
        assert publisher.publish([HINT], 10) == [True]
    with make_app(url, trusting).connection_for_read() as connection:
        assert connection.connect().sock.version().startswith("TLS")


def test_plain_speech_to_a_port_with_tls_and_tls_to_a_port_without_it_are_told_apart(
    encrypted: RabbitCluster, trusting: BrokerSettings
) -> None:
    address, secret = encrypted.nodes[0].address, encrypted.password
    plain = refused(f"amqp://admin:{secret}@{address}:{AMQPS_PORT}/%2F", trusting)
    assert (plain.reason, "speaks TLS only" in plain.message) == (BrokerReason.TLS, True)
    assert "amqps://" in plain.hint
    tls = refused(f"amqps://admin:{secret}@{address}:{AMQP_PORT}/%2F", trusting)
    assert (tls.reason, "does not speak TLS" in tls.message) == (BrokerReason.TLS, True)
    assert "5671" in tls.hint


def test_a_certificate_of_another_signer_is_not_trusted(encrypted: RabbitCluster, tmp_path: Path) -> None:
    stranger = Authority().issue_into(tmp_path, "elsewhere")
    for settings in (QUICK, QUICK.model_copy(update={"ca_file": stranger.authority})):
        error = refused(encrypted.url(tls=True), settings)
        assert (error.reason, "is not trusted" in error.message) == (BrokerReason.TLS, True)
        assert "CRUCIBLE_BROKER__CA_FILE" in error.hint


def test_a_certificate_must_bear_the_name_that_the_url_has(encrypted: RabbitCluster, trusting: BrokerSettings) -> None:
    login = f"admin:{encrypted.password}"
    with forwarded(encrypted.nodes[0].address, AMQPS_PORT) as port:
        # The certificate has the name localhost and not its address.
        close(connect(BrokerUrl.parse(f"amqps://{login}@localhost:{port}/%2F"), trusting))
        error = refused(f"amqps://{login}@127.0.0.1:{port}/%2F", trusting)
        assert (error.reason, "for another host" in error.message) == (BrokerReason.TLS, True)
        # A node whose name fits is found behind one whose name does not.
        bad, good = (f"amqps://{login}@{host}:{port}/%2F" for host in ("127.0.0.1", "localhost"))
        close(connect(BrokerUrl.parse(f"{bad},{good}"), trusting))
        # Celery goes from node to node by itself, from a random one on; the check holds at every step.
        with (
            make_app(BrokerUrl.parse(f"{bad},{bad}"), trusting).connection_for_read() as connection,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            connection.ensure_connection(
                max_retries=3, interval_start=0, interval_step=0, reraise_as_library_errors=False
            )
        with make_app(BrokerUrl.parse(f"{bad},{bad},{good}"), trusting).connection_for_read() as connection:
            connection.ensure_connection(max_retries=4, interval_start=0, interval_step=0)


# --- what the broker holds and allows -------------------------------------------------------------------------------------------


def test_what_was_never_declared_is_told_with_the_command_that_declares_it(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    with Installation(rabbitmq, rabbit_vhost).publisher() as publisher:
        with pytest.raises(BrokerError) as published:
            publisher.publish([HINT], 5)
        with pytest.raises(BrokerError) as asked:
            publisher.depths()
        for caught in (published, asked):
            assert caught.value.reason is BrokerReason.NOT_DECLARED
            assert "crucible broker apply" in caught.value.hint
        publisher.declare()
        rabbitmq.manage("DELETE", f"queues/{rabbit_vhost}/{queue_name(SizeClass.SMALL)}")
        # The exchange is there, and leads nowhere.
        with pytest.raises(BrokerError) as unroutable:
            publisher.publish([HINT], 5)
        assert unroutable.value.reason is BrokerReason.NOT_DECLARED
        # The connection is as good as before.
        publisher.declare()
        assert publisher.publish([HINT], 5) == [True]


def test_a_queue_with_other_arguments_is_never_taken_for_ours(installed: Installation) -> None:
    with (
        Publisher(installed.url(), BrokerSettings(queue_length_max=5)) as publisher,
        pytest.raises(BrokerError) as caught,
    ):
        publisher.declare()
    assert caught.value.reason is BrokerReason.QUEUE_DIFFERS
    assert "x-max-length" in caught.value.message
    assert "crucible broker verify" in caught.value.hint


def test_a_user_without_the_permission_is_told_which_it_lacks(installed: Installation) -> None:
    with installed.publisher("crucible-worker") as publisher:
        with pytest.raises(BrokerError) as caught:
            publisher.publish([HINT], 5)
        assert caught.value.reason is BrokerReason.REFUSED
        assert "'crucible-worker'" in caught.value.message
        assert "crucible.evaluations" in caught.value.message
        # Asking is allowed, and works after the refusal.
        assert publisher.depths()[SizeClass.SMALL].ready == 0


def test_an_alarm_is_told_at_once_and_costs_one_message_at_most_however_often_it_is_tried(
    installed: Installation,
) -> None:
    batch = [HINT] * 50
    with installed.publisher("crucible-storage") as publisher:
        installed.cluster.set_alarm("memory")
        for _ in range(5):
            started = time.monotonic()
            with pytest.raises(BrokerError) as caught:
                publisher.publish(batch, 20)
            assert (caught.value.reason, caught.value.passing) == (BrokerReason.BLOCKED, True)
            assert time.monotonic() - started < 3
        # What waits there can still be counted.
        assert publisher.depths()[SizeClass.SMALL].ready == 0
        assert time.monotonic() - started < 3
        # Waiting in storage costs nothing; a wrong answer would be a flood once the alarm ends.
        installed.cluster.clear_alarms()
        wait_until(
            lambda: publisher.publish([HINT], 5), timeout=10, describe="the alarm to end", tolerate=(BrokerError,)
        )
        assert publisher.depths()[SizeClass.SMALL].ready <= 2


def test_a_connection_that_the_broker_closes_is_opened_again_by_the_next_call(installed: Installation) -> None:
    with installed.publisher("crucible-storage") as publisher:
        assert publisher.publish([HINT], 5) == [True]
        installed.cluster.manage("DELETE", "connections/username/crucible-storage")
        assert publisher.publish([HINT], 5) == [True]


# --- Redis ----------------------------------------------------------------------------------------------------------------------


@needs("redis")
def test_redis_says_the_same_things_of_itself(redis_server: RedisServer) -> None:
    port = redis_server.port
    good = f"redis://:{redis_server.password}@127.0.0.1:{port}"
    assert refused(f"redis://:wrong@127.0.0.1:{port}/0").reason is BrokerReason.CREDENTIALS
    assert refused(f"{good}/99").reason is BrokerReason.VHOST
    tls = refused(f"{good.replace('redis://', 'rediss://')}/0")
    assert (tls.reason, "does not speak TLS" in tls.message) == (BrokerReason.TLS, True)
    with socket.create_server(("127.0.0.1", 0)) as held:
        closed = held.getsockname()[1]
    assert refused(f"redis://:secret@127.0.0.1:{closed}/0").reason is BrokerReason.UNREACHABLE
    with listener(lambda _: None) as silent:
        assert refused(f"redis://:secret@127.0.0.1:{silent}/0", HASTY).reason is BrokerReason.UNREACHABLE
    with Publisher(BrokerUrl.parse(f"{good}/0"), QUICK) as publisher:
        assert publisher.publish([HINT], 5) == [True]
        redis_server.kill()
        with pytest.raises(BrokerError) as caught:
            publisher.publish([HINT], 5)
        assert (caught.value.reason, caught.value.passing) == (BrokerReason.UNREACHABLE, True)
        redis_server.start()
        assert publisher.publish([HINT], 5) == [True]
        assert publisher.purge() == 2


@needs("redis")
def test_redis_with_tls_is_checked_like_rabbitmq(
    authority: Authority, trusting: BrokerSettings, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis", tls=authority) as server:
        with Publisher(BrokerUrl.parse(f"{server.url}/0"), trusting) as publisher:
            assert publisher.publish([HINT], 5) == [True]
        distrust = refused(f"{server.url}/0")
        assert (distrust.reason, "is not trusted" in distrust.message) == (BrokerReason.TLS, True)
        plain = refused(server.url.replace("rediss://", "redis://") + "/0", trusting)
        assert (plain.reason, "speaks TLS only" in plain.message) == (BrokerReason.TLS, True)
