"""The servers that other tests rely on do to a client what real ones do: they die, are cut off, fill up and come back."""

from __future__ import annotations

import re
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import amqp
import psutil
import pytest
import redis

from tests.servers.certificates import Authority
from tests.servers.network import LoopbackNetwork, NamespaceNetwork, own_links
from tests.servers.rabbitmq import ADMIN, AMQP_PORT, AMQPS_PORT, RabbitCluster
from tests.servers.redis import RedisServer
from tests.support.capabilities import needs
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.rabbitmq import RabbitNode

ROOT = Path(__file__).parents[2]
QUEUE = "kept"


@contextmanager
def channel_of(cluster: RabbitCluster, node: RabbitNode, vhost: str) -> Iterator[Any]:
    """Give a channel whose publishing waits until the broker has it."""
    connection = amqp.Connection(
        f"{node.address}:{AMQP_PORT}",
        ADMIN,
        cluster.password,
        virtual_host=vhost,
        connect_timeout=5,
        confirm_publish=True,
    )
    connection.connect()
    # A node that was killed cannot say goodbye.
    with closing(connection), connection.channel() as channel:
        yield channel


def publish(channel: Any, count: int, *, timeout: float = 10) -> None:
    """Publish persistent messages, and return when the broker answers for them."""
    for number in range(count):
        message = amqp.Message(str(number), delivery_mode=2)
        channel.basic_publish(message, routing_key=QUEUE, timeout=timeout, confirm_timeout=timeout)


def fill(cluster: RabbitCluster, vhost: str, count: int) -> None:
    """Declare a quorum queue and put messages in it."""
    with channel_of(cluster, cluster.nodes[0], vhost) as channel:
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        publish(channel, count)


def held(cluster: RabbitCluster, node: RabbitNode, vhost: str) -> int:
    """Ask a node how many messages wait."""
    with channel_of(cluster, node, vhost) as channel:
        return int(channel.queue_declare(QUEUE, passive=True).message_count)


def await_held(count: int, cluster: RabbitCluster, node: RabbitNode, vhost: str) -> None:
    """Wait for these many; until a queue has a leader again, asking fails or finds none."""
    wait_until(
        lambda: held(cluster, node, vhost) == count,
        timeout=20,
        describe=f"{node.name} to show {count} messages",
        tolerate=(amqp.AMQPError, OSError),
    )


def answers(node: RabbitNode) -> bool:
    """Tell whether a client reaches a node."""
    try:
        socket.create_connection((node.address, AMQP_PORT), timeout=0.5).close()
    except OSError:
        return False
    return True


@needs("rabbitmq")
def test_a_queue_survives_its_leader_killed_and_then_the_power_cut_of_every_node(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    fill(rabbitmq, rabbit_vhost, 20)
    rabbitmq.await_on_disk(QUEUE, rabbit_vhost)
    leader = rabbitmq.leader_of(QUEUE, rabbit_vhost)
    leader.kill()
    others = [node for node in rabbitmq.nodes if node is not leader]
    await_held(20, rabbitmq, others[0], rabbit_vhost)
    assert rabbitmq.leader_of(QUEUE, rabbit_vhost) in others
    for node in others:
        node.kill()
    assert not any(answers(node) for node in rabbitmq.nodes)
    rabbitmq.restore()
    await_held(20, rabbitmq, leader, rabbit_vhost)


@needs("rabbitmq", "network namespaces")
def test_a_node_that_is_cut_off_is_gone_for_the_others_and_for_clients_until_it_is_connected_again(
    rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    fill(rabbitmq, rabbit_vhost, 5)
    first, second, third = rabbitmq.nodes

    def seen_by(node: RabbitNode) -> set[str]:
        listed = rabbitmq.ask(node, "GET", "nodes")
        return {peer["name"] for peer in listed if peer["running"]}

    rabbitmq.cut_off(third, clients=False)
    wait_until(lambda: seen_by(first) == {first.name, second.name}, timeout=20, describe="the others to miss the third")
    assert seen_by(second) == {first.name, second.name}
    wait_until(lambda: seen_by(third) == {third.name}, timeout=20, describe="the third to miss the others")
    assert answers(third)
    rabbitmq.cut_off(third, clients=True)
    assert not answers(third)
    assert held(rabbitmq, first, rabbit_vhost) == 5
    assert third.alive()
    rabbitmq.heal()
    rabbitmq.await_healthy()
    assert answers(third)
    assert seen_by(third) == {node.name for node in rabbitmq.nodes}


@needs("rabbitmq")
@pytest.mark.parametrize("alarm", ["disk", "memory"])
def test_an_alarm_blocks_publishers_until_it_is_cleared(rabbitmq: RabbitCluster, rabbit_vhost: str, alarm: Any) -> None:
    fill(rabbitmq, rabbit_vhost, 1)
    rabbitmq.set_alarm(alarm)
    assert rabbitmq.why_unhealthy() is not None
    with channel_of(rabbitmq, rabbitmq.nodes[2], rabbit_vhost) as channel:
        with pytest.raises((TimeoutError, amqp.AMQPError)):
            publish(channel, 1, timeout=0.5)
        rabbitmq.clear_alarms()
    rabbitmq.await_healthy()
    with channel_of(rabbitmq, rabbitmq.nodes[2], rabbit_vhost) as channel:
        publish(channel, 1)


def tls_to(node: RabbitNode, authority: Path, name: str) -> str | None:
    """Shake hands with a node that should have this name; returns the protocol."""
    context = ssl.create_default_context(cafile=str(authority))
    with (
        socket.create_connection((node.address, AMQPS_PORT), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return secure.version()


@needs("rabbitmq")
def test_nodes_and_clients_talk_by_tls_and_both_refuse_another_name_and_another_authority(folder: Path) -> None:
    ours, other = Authority(), Authority()
    elsewhere = other.issue_into(folder / "other", "elsewhere").authority
    with RabbitCluster(folder / "cluster", nodes=2, tls=ours) as cluster:
        first, second = cluster.nodes
        ours_file = first.certificates / "authority.pem"
        assert first.ctl("eval", "init:get_argument(proto_dist).") == '{ok,[["inet_tls"]]}'
        assert tls_to(first, ours_file, first.address) in ("TLSv1.2", "TLSv1.3")
        with pytest.raises(ssl.SSLCertVerificationError, match=r"doesn't match|not valid for"):
            tls_to(first, ours_file, "elsewhere")
        with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|self.signed"):
            tls_to(first, elsewhere, first.address)

        def restart_with(*certificates: tuple[Authority, str]) -> None:
            for node, (authority, name) in zip(cluster.nodes, certificates, strict=True):
                node.kill()
                authority.issue_into(node.certificates, name)
            for node in cluster.nodes:
                node.launch()

        def first_says(complaint: str) -> None:
            before = len(first.log)
            wait_until(lambda: complaint in first.log[before:], timeout=30, describe=f"the first to say {complaint}")

        # The one that dials checks the name, so a pair is apart only if both have a wrong one.
        restart_with((ours, "elsewhere"), (ours, "elsewhere"))
        first_says("hostname_check_failed")
        restart_with((ours, first.hostname), (other, second.hostname))
        first_says("Unknown CA")
        restart_with((ours, first.hostname), (ours, second.hostname))
        cluster.await_healthy()


@needs("rabbitmq")
def test_nodes_that_share_the_machines_network_make_a_cluster_too(folder: Path) -> None:
    with RabbitCluster(folder, nodes=2, network=LoopbackNetwork()) as cluster:
        first, second = cluster.nodes
        assert not cluster.can_be_cut
        assert first.address.startswith("127.")
        second.kill()
        cluster.restore()
        assert {node["name"] for node in cluster.manage("GET", "nodes")} == {first.name, second.name}
    assert not answers(first)


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that a test starts; those that still run at its end are killed."""
    programs: list[subprocess.Popen[str]] = []
    yield programs
    for program in programs:
        program.kill()
        program.communicate()


def servers_for_people(running: list[subprocess.Popen[str]], *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Run `python -m tests.servers` until it says that it runs; returns what it printed."""
    command = [sys.executable, "-m", "tests.servers", *arguments]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    running.append(program)
    assert program.stdout is not None
    lines = []
    for line in program.stdout:
        if line.startswith("# Running"):
            break
        lines.append(line)
    return program, "".join(lines)


def exported(text: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)='(.*)'$", text, flags=re.MULTILINE))


@needs("rabbitmq", "redis")
def test_servers_for_people_say_where_they_are_and_leave_nothing_behind(
    running: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program, said = servers_for_people(running, "all", "--nodes", "1")
    urls = exported(said)
    assert set(urls) == {"CRUCIBLE_BROKER_URL", "CRUCIBLE_BROKER__MANAGEMENT_URL", "CRUCIBLE_REDIS_URL"}
    with closing(redis.Redis.from_url(urls["CRUCIBLE_REDIS_URL"])) as client:
        assert client.ping()
    started = psutil.Process(program.pid).children(recursive=True)
    assert len(started) >= 4
    program.send_signal(signal.SIGINT)
    assert program.wait(20) == 0
    assert not [process for process in started if process.is_running()]
    assert program.pid not in own_links().values()
    assert list(tmp_path.iterdir()) == []


@needs("rabbitmq", "network namespaces")
def test_servers_end_with_a_program_that_is_killed_and_the_next_one_removes_its_interfaces(
    running: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program, _ = servers_for_people(running, "rabbitmq", "--nodes", "1")
    started = psutil.Process(program.pid).children(recursive=True)
    assert program.pid in own_links().values()
    program.kill()
    program.wait(10)
    wait_until(
        lambda: not [process for process in started if process.is_running()], timeout=10, describe="the nodes to end"
    )
    assert program.pid in own_links().values()
    NamespaceNetwork().close()
    assert program.pid not in own_links().values()


@needs("redis")
def test_redis_comes_back_with_its_data_and_after_a_wipe_without(redis_server: RedisServer) -> None:
    with closing(redis.Redis.from_url(redis_server.url)) as client:
        client.set("kept", "yes")
        redis_server.restart()
        assert client.get("kept") == b"yes"
        redis_server.stop()
        with pytest.raises(redis.ConnectionError):
            client.get("kept")
        redis_server.start()
        assert client.get("kept") == b"yes"
        redis_server.wipe()
        assert client.get("kept") is None


@needs("redis")
def test_redis_by_tls_shows_a_certificate_for_its_name(folder: Path) -> None:
    with RedisServer(folder, tls=Authority()) as server:
        with closing(
            redis.Redis.from_url(server.url, ssl_ca_certs=str(folder / "certificates/authority.pem"))
        ) as client:
            assert client.ping()
        stranger = Authority().issue_into(folder / "stranger", "localhost").authority
        with (
            closing(redis.Redis.from_url(server.url, ssl_ca_certs=str(stranger))) as client,
            pytest.raises(redis.ConnectionError, match="certificate verify failed"),
        ):
            client.ping()
