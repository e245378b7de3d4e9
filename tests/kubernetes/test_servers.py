"""RabbitMQ and Redis in the cluster: nobody gets in without TLS, and while nodes and certificates come and go nothing is lost."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography import x509

from crucible.broker.definitions import ADMIN
from crucible.broker.topology import USERS
from tests.deployment.certificates import certificate
from tests.deployment.secret_values import NAMES, read_secrets, secret_objects
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.deployed import DeployedPlatform

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
AUTHORITY = "/run/servers/ca.crt"
NODES = ("rabbitmq-0", "rabbitmq-1", "rabbitmq-2")
RABBITMQ = "statefulset/rabbitmq"
EVERYTHING = (
    *(f"statefulset/{name}" for name in ("rabbitmq", "redis", "postgres")),
    *(f"deployment/crucible-{name}" for name in ("api", "storage", "worker", "dispatcher", "monitor", "cleanup")),
)
PATIENCE = 150
# From a Secret to its nodes' files takes the kubelet up to this long, from there to new connections the servers some seconds.
CERTIFICATE_SECONDS = 150
# Messages under way before something is broken, and after.
SOME = 200


@pytest.fixture(scope="module")
def servers(platform: DeployedPlatform) -> Iterator[DeployedPlatform]:
    """The platform with two Pods beside it: `client`, and `peer`."""
    files = [f"--from-file={HERE / 'programs' / name}" for name in ("broker_load.py", "tls_shown.py", "plain.py")]
    made = platform.kubectl("create", "configmap", "broker-programs", *files, "--dry-run=client", "-o", "yaml")
    (service,) = (image.reference for image in platform.images if image.name == "service")
    pods = list(yaml.safe_load_all((HERE / "manifests" / "servers.yaml").read_text(encoding="utf-8")))
    (most, _), *_ = nodes_of_rabbitmq(platform).most_common()
    for pod in pods:
        pod["spec"]["containers"][0]["image"] = service
        # Where two of RabbitMQ's nodes are; the machine with the third is to lose its power.
        pod["spec"]["nodeName"] = most
    platform.cluster.kubectl("apply", "-f", "-", input=made + "---\n" + yaml.safe_dump_all(pods))
    try:
        platform.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "pod/client", "pod/peer")
        yield platform
    finally:
        platform.kubectl("delete", "pod/client", "pod/peer", "configmap/broker-programs", "--ignore-not-found")


def told(servers: DeployedPlatform, pod: str, program: str, *arguments: str) -> str:
    return servers.kubectl("exec", pod, "--", "python3", f"/programs/{program}.py", *arguments).strip()


def shown(
    servers: DeployedPlatform, pod: str, *places: str, name: str = "-", authority: str = AUTHORITY
) -> dict[str, str]:
    return dict(json.loads(told(servers, pod, "tls_shown", authority, name, *places)))


AMQPS = tuple(f"{node}.rabbitmq:5671" for node in NODES)
PEERS = tuple(f"{node}.rabbitmq.crucible.svc.cluster.local:25672" for node in NODES)


# --- who gets in ----------------------------------------------------------------------------------------------------------


def test_clients_see_a_certificate_of_the_authority_that_bears_each_nodes_name(servers: DeployedPlatform) -> None:
    serials = set(shown(servers, "client", *AMQPS).values())
    assert serials == {serial(servers, "rabbitmq-tls")}


def test_a_client_that_expects_another_name_or_trusts_another_authority_does_not_connect(
    servers: DeployedPlatform,
) -> None:
    for said in shown(servers, "client", *AMQPS, name="database.example").values():
        assert "CERTIFICATE_VERIFY_FAILED" in said
    system = "/etc/ssl/certs/ca-certificates.crt"
    for said in shown(servers, "client", *AMQPS, authority=system).values():
        assert "CERTIFICATE_VERIFY_FAILED" in said


@pytest.mark.parametrize(("pod", "place", "language"), [("client", AMQPS[0], "amqp"), ("peer", PEERS[0], "erlang")])
def test_plain_text_gets_no_answer_in_kind(servers: DeployedPlatform, pod: str, place: str, language: str) -> None:
    # An alert of TLS at most, which begins with 0x15.
    said = told(servers, pod, "plain", place, language)
    assert said in ("b''", "ConnectionResetError") or said.startswith(r"b'\x15\x03")


def test_rabbitmq_listens_for_nobody_without_tls_but_for_its_figures(servers: DeployedPlatform) -> None:
    for node in NODES:
        said = servers.kubectl("exec", node, "--", "rabbitmq-diagnostics", "listeners", "--formatter", "json")
        found = {each["port"]: each["protocol"] for each in json.loads(said)["listeners"]}
        assert found == {
            5671: "amqp/ssl",
            15671: "https",
            15692: "http/prometheus",
            25672: "clustering/ssl",
        }


def test_a_node_takes_no_peer_that_shows_no_certificate(servers: DeployedPlatform) -> None:
    for said in shown(servers, "peer", *PEERS).values():
        assert "CERTIFICATE_REQUIRED" in said


def test_redis_answers_by_tls_alone(servers: DeployedPlatform) -> None:
    said = servers.kubectl("exec", "redis-0", "--", "sh", "-c", "redis-cli ping || true")
    assert "PONG" not in said
    assert servers.kubectl("exec", "redis-0", "--", "/etc/redis/ready.sh") == ""


def test_the_brokers_definitions_have_hashes_and_no_password(servers: DeployedPlatform) -> None:
    present = present_secrets(servers)
    definitions = json.loads(present["rabbitmq"]["definitions.json"])
    assert {user["name"] for user in definitions["users"]} == {user.name for user in (*USERS, ADMIN)}
    for user in definitions["users"]:
        assert user.keys() >= {"password_hash", "hashing_algorithm"}
        assert "password" not in user
    passwords = [value for key, value in present["crucible-setup"].items() if "PASSWORD" in key]
    assert len(passwords) == len(definitions["users"])
    assert not [each for each in passwords if each in present["rabbitmq"]["definitions.json"]]


# --- while it is in use ---------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """A publisher and a consumer that are at work."""

    servers: DeployedPlatform
    process: subprocess.Popen[str]

    @property
    def sent(self) -> int:
        """How many messages the broker has confirmed so far."""
        return int(self.servers.kubectl("exec", "client", "--", "sh", "-c", "cat /tmp/sent || echo 0") or 0)

    def goes_on(self) -> None:
        """Wait until it has sent some more.

        Raises:
            WaitTimeoutError: it has not.
        """
        before = self.sent
        wait_until(lambda: self.sent >= before + SOME, timeout=PATIENCE, poll=0.5, describe="messages to be confirmed")

    def ended(self) -> dict[str, Any]:
        """End it, and return what became of the messages."""
        self.servers.kubectl("exec", "client", "--", "touch", "/tmp/stop")
        said, _ = self.process.communicate(timeout=PATIENCE)
        print(said)
        return dict(json.loads(said.strip().splitlines()[-1]))


@pytest.fixture
def load(servers: DeployedPlatform) -> Iterator[Load]:
    """Messages under way, of which none may be lost."""
    servers.kubectl("exec", "client", "--", "rm", "-f", "/tmp/stop", "/tmp/sent")
    queue = f"load-{secrets.token_hex(4)}"
    program = f'python3 -u /programs/broker_load.py "$BROKER" {AUTHORITY} {queue}'
    command = servers.cluster.kubectl_command("exec", "--namespace=crucible", "client", "--", "sh", "-c", program)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        running = Load(servers, process)
        try:
            running.goes_on()
            yield running
        finally:
            if process.poll() is None:
                servers.kubectl("exec", "client", "--", "touch", "/tmp/stop")
                process.wait(PATIENCE)
    servers.rolled_out(RABBITMQ, timeout=PATIENCE)
    servers.kubectl("exec", NODES[0], "--", "rabbitmqctl", "--quiet", "--vhost=crucible", "delete_queue", queue)


def nothing_is_lost(load: Load) -> dict[str, Any]:
    load.goes_on()
    result = load.ended()
    assert result["sent"] > 2 * SOME
    assert result["lost"] == []
    return result


def test_new_certificates_are_shown_without_a_restart_and_nothing_is_lost(
    servers: DeployedPlatform, load: Load
) -> None:
    before = uids(servers)
    renew(servers, "rabbitmq")
    renew(servers, "redis")
    new = serial(servers, "rabbitmq-tls")

    def all_show_it() -> bool:
        return set(shown(servers, "client", *AMQPS).values()) == {new}

    wait_until(all_show_it, timeout=CERTIFICATE_SECONDS, poll=1, describe="all nodes to show the new certificate")
    wait_until(
        lambda: redis_serial(servers) == serial(servers, "redis-tls"),
        timeout=CERTIFICATE_SECONDS,
        poll=1,
        describe="Redis to show the new certificate",
    )
    assert uids(servers) == before
    nothing_is_lost(load)


def test_a_rolling_restart_loses_nothing(servers: DeployedPlatform, load: Load) -> None:
    # Each node comes back to others that may have seen none but an older certificate of it.
    before = uids(servers)
    servers.kubectl("rollout", "restart", RABBITMQ)
    servers.rolled_out(RABBITMQ, timeout=2 * PATIENCE)
    assert not before & uids(servers)
    assert nothing_is_lost(load)["connections"]["publisher"] > 1


@contextmanager
def without_power(servers: DeployedPlatform, node: str) -> Iterator[None]:
    servers.cluster.node(node).power_cut()
    try:
        yield
    finally:
        servers.cluster.node(node).revive()


def test_the_loss_of_a_node_loses_nothing_and_stops_nobody(servers: DeployedPlatform, load: Load) -> None:
    (alone,) = [node for node, count in nodes_of_rabbitmq(servers).items() if count == 1]
    with without_power(servers, alone):
        # Its peers take it for gone after a while, and go on.
        load.goes_on()
    nothing_is_lost(load)
    servers.rolled_out(*EVERYTHING, timeout=PATIENCE)


def test_a_node_does_not_go_while_another_is_away(servers: DeployedPlatform, load: Load) -> None:
    leaving = "rabbitmq-0"
    old = uid(servers, leaving)
    servers.kubectl("delete", "pod", "rabbitmq-1", "--grace-period=0", "--force")
    servers.kubectl("delete", "pod", leaving, "--wait=false")

    def went() -> bool:
        gone = uid(servers, leaving) != old
        assert not gone or ready(servers, "rabbitmq-1"), f"{leaving} went before rabbitmq-1 was back"
        return gone

    wait_until(went, timeout=PATIENCE, poll=0.3, describe=f"{leaving} to go")
    nothing_is_lost(load)


def test_of_two_evictions_at_once_the_second_waits(servers: DeployedPlatform) -> None:
    servers.rolled_out(RABBITMQ, timeout=PATIENCE)
    assert evicted(servers, "rabbitmq-0") == ""
    assert "disruption budget" in evicted(servers, "rabbitmq-1")
    servers.rolled_out(RABBITMQ, timeout=PATIENCE)


def present_secrets(servers: DeployedPlatform) -> dict[str, dict[str, str]]:
    return read_secrets(servers.objects("secrets"))


def serial(servers: DeployedPlatform, secret: str) -> str:
    """The serial number of the certificate in a Secret, as Python's ssl writes it."""
    found = x509.load_pem_x509_certificate(present_secrets(servers)[secret]["tls.crt"].encode())
    text = f"{found.serial_number:X}"
    return text.zfill(len(text) + len(text) % 2)


def redis_serial(servers: DeployedPlatform) -> str:
    """That of the certificate which Redis shows; only some may ask it, such as storage."""
    program = (HERE / "programs" / "tls_shown.py").read_text(encoding="utf-8")
    arguments = ("-c", program, AUTHORITY, "-", "redis:6379")
    said = servers.kubectl("exec", "deployment/crucible-storage", "--", "python3", *arguments)
    return str(json.loads(said)["redis:6379"])


def renew(servers: DeployedPlatform, server: str) -> None:
    """Put a new certificate of the same authority in the place of a server's, and have the nodes' kubelets look for it now."""
    present = present_secrets(servers)
    name = f"{server}-tls"
    content = certificate(present["crucible-ca"], NAMES[server], {})
    servers.cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(secret_objects({name: content})))
    for pod in servers.pods(server):
        servers.kubectl("annotate", "pod", pod["metadata"]["name"], f"renewed={serial(servers, name)}", "--overwrite")


def nodes_of_rabbitmq(servers: DeployedPlatform) -> Counter[str]:
    """How many of RabbitMQ's nodes are on each of the cluster's."""
    return Counter(pod["spec"]["nodeName"] for pod in servers.pods("rabbitmq"))


def uids(servers: DeployedPlatform) -> set[str]:
    return {pod["metadata"]["uid"] for pod in servers.pods("rabbitmq")}


def uid(servers: DeployedPlatform, pod: str) -> str:
    return servers.kubectl("get", "pod", pod, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")


def ready(servers: DeployedPlatform, pod: str) -> bool:
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return servers.kubectl("get", "pod", pod, "--ignore-not-found", "-o", f"jsonpath={path}") == "True"


def evicted(servers: DeployedPlatform, pod: str) -> str:
    """Ask for a Pod's eviction, as a drain does; returns why it was refused, or nothing."""
    wanted = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "crucible"}}
    where = f"/api/v1/namespaces/crucible/pods/{pod}/eviction"
    command = servers.cluster.kubectl_command("create", "--raw", where, "-f", "-")
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""
