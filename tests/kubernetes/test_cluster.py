"""The test cluster is what the other tests of this tier take it for: really several machines, really isolated, really breakable."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cluster import Cluster, ClusterError, open_cluster
from tests.cluster.cgroups import Cgroup
from tests.cluster.state import Home
from tests.support.capabilities import needs
from tests.support.waits import wait_until

pytestmark = needs("cluster")

MANIFESTS = Path(__file__).with_name("manifests")
NAMESPACE = "cluster-check"
# The kubelet says every 2 s that it lives; after 12 s of silence its node counts as lost.
LOST_SECONDS = 30
SERVERS = ("runc", "gvisor")


@pytest.fixture(scope="module", autouse=True)
def probes(cluster: Cluster) -> Iterator[None]:
    cluster.kubectl("apply", "-f", str(MANIFESTS / "probes.yaml"))
    wait_until(lambda: is_ready(cluster, "runc"), timeout=60, describe="the server under runc")
    wait_until(lambda: is_ready(cluster, "gvisor"), timeout=60, describe="the server under gVisor")
    yield
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def is_ready(cluster: Cluster, pod: str) -> bool:
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return in_namespace(cluster, "get", "pod", pod, "-o", f"jsonpath={path}") == "True"


def node_is_ready(cluster: Cluster, name: str) -> bool:
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return cluster.kubectl("get", "node", name, "-o", f"jsonpath={path}", check=False) == "True"


def in_namespace(cluster: Cluster, *arguments: str) -> str:
    """What kubectl says of the namespace's objects; nothing if it fails."""
    return cluster.kubectl("--namespace", NAMESPACE, *arguments, check=False)


def probe(cluster: Cluster, pod: str, *arguments: str) -> str:
    return in_namespace(cluster, "exec", pod, "--", "/probe", *arguments).strip()


def address_of(cluster: Cluster, pod: str) -> str:
    return in_namespace(cluster, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")


def answers(cluster: Cluster, client: str, server: str) -> bool:
    return probe(cluster, client, "connect", f"{address_of(cluster, server)}:8080") == server


def test_every_zone_has_a_worker_and_the_control_plane_takes_no_ordinary_pod(cluster: Cluster):
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    zones = {node["metadata"]["name"]: node["metadata"]["labels"]["topology.kubernetes.io/zone"] for node in nodes}
    assert zones == {"cp": "zone-a", "w1": "zone-a", "w2": "zone-b"}
    assert all(node_is_ready(cluster, name) for name in zones)
    [control_plane] = [node for node in nodes if node["metadata"]["name"] == "cp"]
    assert "NoSchedule" in {taint["effect"] for taint in control_plane["spec"]["taints"]}


def test_gvisor_is_the_kernel_of_its_pods_and_of_no_other(cluster: Cluster):
    assert "Starting gVisor" in probe(cluster, "gvisor", "kernel")
    under_runc = probe(cluster, "runc", "kernel")
    assert "gVisor" not in under_runc
    assert os.uname().release in under_runc


@pytest.mark.parametrize("client", SERVERS)
def test_names_resolve_and_services_answer(cluster: Cluster, client: str):
    address = in_namespace(cluster, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}")
    assert probe(cluster, client, "resolve", f"server.{NAMESPACE}.svc.cluster.local") == address
    assert probe(cluster, client, "connect", "server:80") in SERVERS


def test_a_node_port_answers_on_this_machine(cluster: Cluster):
    url = urlsplit(cluster.node_port_url(30080))
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=10) as connection:
        assert connection.makefile("r", encoding="ascii").readline().strip() in SERVERS


def test_a_long_log_is_kept_whole(cluster: Cluster):
    def ended() -> bool:
        return in_namespace(cluster, "get", "pod", "talker", "-o", "jsonpath={.status.phase}") == "Succeeded"

    wait_until(ended, timeout=60, describe="a Pod that writes 12 MB, which a kubelet by itself would cut at 10")
    lines = in_namespace(cluster, "logs", "talker").splitlines()
    assert [int(line) for line in lines] == list(range(120_000))


@pytest.mark.parametrize("client", SERVERS)
def test_a_network_policy_is_enforced(cluster: Cluster, client: str):
    server = next(name for name in SERVERS if name != client)
    assert answers(cluster, client, server)
    cluster.kubectl("apply", "-f", str(MANIFESTS / "default-deny.yaml"))
    try:
        wait_until(lambda: not answers(cluster, client, server), timeout=10, describe="the policy to be enforced")
    finally:
        cluster.kubectl("delete", "-f", str(MANIFESTS / "default-deny.yaml"))
    wait_until(lambda: answers(cluster, client, server), timeout=10, describe="the policy to be gone")


def test_a_policy_of_calicos_own_is_enforced_and_a_malformed_one_refused(cluster: Cluster):
    policy = (MANIFESTS / "quarantine.yaml").read_text(encoding="utf-8")
    with pytest.raises(ClusterError, match="selector"):
        cluster.calicoctl("apply", "-f", "-", input=policy.replace("==", "=!="))
    cluster.calicoctl("apply", "-f", "-", input=policy)
    try:
        wait_until(lambda: not answers(cluster, "runc", "gvisor"), timeout=10, describe="the policy to be enforced")
    finally:
        cluster.calicoctl("delete", "-f", "-", input=policy)
    wait_until(lambda: answers(cluster, "runc", "gvisor"), timeout=10, describe="the policy to be gone")


def test_a_node_whose_cable_is_pulled_reaches_nobody(cluster: Cluster):
    cluster.node("w2").cut()
    try:
        assert not answers(cluster, "runc", "gvisor")
    finally:
        cluster.node("w2").heal()
    wait_until(lambda: answers(cluster, "runc", "gvisor"), timeout=20, describe="the node to be reached again")


def test_a_zone_that_is_cut_off_reaches_no_other(cluster: Cluster):
    cluster.cut_zone("zone-b")
    try:
        assert not answers(cluster, "runc", "gvisor")
    finally:
        cluster.heal_zone("zone-b")
    wait_until(lambda: answers(cluster, "runc", "gvisor"), timeout=20, describe="the zone to be reached again")


def test_a_paused_api_server_accepts_and_does_not_answer(cluster: Cluster):
    cluster.pause_api_server()
    try:
        with pytest.raises(ClusterError, match=r"[Tt]imeout|deadline"):
            cluster.kubectl("get", "--raw", "/version", "--request-timeout=1s")
    finally:
        cluster.resume_api_server()
    cluster.kubectl("get", "--raw", "/version", "--request-timeout=20s")


def test_after_a_power_cut_a_pod_waits_for_its_volume_and_finds_its_data(cluster: Cluster):
    wait_until(lambda: is_ready(cluster, "keeper-0"), timeout=30, describe="the server with data")
    probe(cluster, "keeper-0", "write", "/data/file", "precious")
    node = cluster.node(in_namespace(cluster, "get", "pod", "keeper-0", "-o", "jsonpath={.spec.nodeName}"))
    assert node.name == "w1"
    node.power_cut()
    try:
        wait_until(
            lambda: not node_is_ready(cluster, node.name), timeout=LOST_SECONDS, describe="the node to count as lost"
        )
        in_namespace(cluster, "delete", "pod", "keeper-0", "--force", "--grace-period=0")

        def why_pending() -> str:
            path = '{.status.conditions[?(@.type=="PodScheduled")].message}'
            return in_namespace(cluster, "get", "pod", "keeper-0", "-o", f"jsonpath={path}")

        said = wait_until(why_pending, timeout=20, describe="the Pod to be refused a place")
        assert "0/3 nodes are available" in said
        assert in_namespace(cluster, "get", "pod", "keeper-0", "-o", "jsonpath={.spec.nodeName}") == ""
    finally:
        node.revive()
    wait_until(lambda: node_is_ready(cluster, node.name), timeout=LOST_SECONDS, describe="the node to be back")
    wait_until(lambda: is_ready(cluster, "keeper-0"), timeout=60, describe="the Pod to start where its volume is")
    assert probe(cluster, "keeper-0", "read", "/data/file") == "precious"


def test_the_control_plane_comes_back_with_everything_that_it_knew(cluster: Cluster):
    node = cluster.node("cp")
    node.power_cut()
    try:
        with pytest.raises(ClusterError):
            cluster.kubectl("get", "--raw", "/readyz", "--request-timeout=2s")
        with pytest.raises(ClusterError, match="switched off"):
            node.run("true")
    finally:
        node.revive()

    def knows() -> bool:
        return NAMESPACE in cluster.kubectl("get", "namespace", NAMESPACE, "-o", "name", check=False)

    wait_until(knows, timeout=60, describe="the API server to answer again")


def test_a_node_without_gvisor_says_so_and_restarts_its_containerd_when_told(cluster: Cluster):
    node = cluster.add_node("bare", "zone-b", gvisor=False)
    try:
        taints = cluster.kubectl("get", "node", node.name, "-o", "jsonpath={.spec.taints[*].key}")
        assert "crucible.dev/gvisor-not-ready" in taints.split()
        assert "runsc" not in node.run("ls", "/usr/local/bin").split()
        before = node.run("cat", "/run/node/containerd.pid")
        node.run("systemctl", "restart", "containerd")
        assert node.run("cat", "/run/node/containerd.pid") != before
        node.run("ctr", "version")
    finally:
        cluster.remove_node(node.name)
    assert node.name not in cluster.kubectl("get", "nodes", "-o", "name")


def test_a_cluster_whose_making_was_interrupted_is_removed_whole(tmp_path: Path):
    name = f"half-{os.getpid()}"
    command = [sys.executable, "-m", "tests.cluster", "up"]
    environment = {**os.environ, "CRUCIBLE_CLUSTER": name}
    with (tmp_path / "up.log").open("wb") as log:
        making = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: b"nodes started" in (tmp_path / "up.log").read_bytes(),
            timeout=30,
            describe="a cluster to be half up",
        )
    finally:
        making.send_signal(signal.SIGKILL)
        making.wait()
    assert Cgroup(name).pids()
    disks = Home(name).path
    open_cluster(name).down()
    assert not Cgroup(name).pids()
    assert not disks.exists()
    loops = subprocess.run(["losetup", "--list", "--output", "BACK-FILE"], capture_output=True, text=True, check=True)
    assert str(disks) not in loops.stdout
