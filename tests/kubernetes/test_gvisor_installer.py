"""The installer of gVisor on a node that has none: what it opens, what it refuses, and that it closes again what broke.

One node of the test cluster starts as a node of a cloud does, without gVisor and with the taint that says so. The installer is
applied to it as it is deployed, only more impatient. The tests follow each other on that node, as a life does: each begins
where the one before it ended.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from crucible import names
from tests.cluster import Cluster, Node, UnsupportedHereError
from tests.support.capabilities import needs
from tests.support.images import built_image
from tests.support.waits import wait_until

# The first build of the image takes minutes on a busy machine.
pytestmark = [pytest.mark.cluster, pytest.mark.gvisor, pytest.mark.timeout(600), needs("cluster")]

FILES = Path(__file__).with_name("gvisor")
NODE = "gv"
NAMESPACE = "gvisor-test"
CONFIG = "/etc/containerd/config.toml"
RELEASES = "/opt/crucible/gvisor"
DROP_IN = "/etc/containerd/conf.d/50-crucible-gvisor.toml"
SCRAPE = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8085/metrics').read().decode(), end='')"
POLL = 0.2


@dataclass(frozen=True)
class Machine:
    """The node, and what the cluster says of it."""

    cluster: Cluster
    node: Node

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", "node", NODE, "-o", "json"))
        return found

    @property
    def condition(self) -> dict[str, str]:
        conditions = self.read()["status"]["conditions"]
        return next((c for c in conditions if c["type"] == names.CONDITION_GVISOR), {})

    @property
    def marks(self) -> tuple[bool, bool]:
        """Whether the node has the label that opens it, and the taint that closes it."""
        node = self.read()
        taints = [taint["key"] for taint in node["spec"].get("taints", [])]
        label = node["metadata"]["labels"].get(names.LABEL_GVISOR)
        return label == names.GVISOR_READY, names.TAINT_NOT_READY in taints

    def await_reason(self, reason: str, *, timeout: float = 60) -> dict[str, str]:
        """Wait until the condition gives that reason; return the condition."""

        def given() -> dict[str, str] | None:
            found = self.condition
            return found if found.get("reason") == reason else None

        try:
            found = wait_until(given, timeout=timeout, describe=f"reason {reason}", poll=POLL)
        except AssertionError as error:
            log = self.installer("logs", "-l", "app.kubernetes.io/component=gvisor-installer", "--tail=20")
            raise AssertionError(f"{error}; the condition is {self.condition}; the installer said:\n{log}") from error
        assert found is not None
        return found

    def installer(self, *arguments: str) -> str:
        return self.cluster.kubectl("--namespace", names.NODE_NAMESPACE, *arguments, check=False)

    def apply(self, overlay: str) -> None:
        self.cluster.kubectl("apply", "--kustomize", str(FILES / overlay))

    @property
    def pod(self) -> str:
        """The running installer."""
        pods = json.loads(
            self.installer("get", "pods", "-l", "app.kubernetes.io/component=gvisor-installer", "-o", "json")
        )
        running = [
            pod["metadata"]["name"]
            for pod in pods["items"]
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return str(running[0]) if running else ""

    @property
    def metrics(self) -> dict[str, float]:
        # From inside the Pod: the network policies let no node but its own reach it.
        lines = self.installer("exec", self.pod, "--", "python3", "-c", SCRAPE).splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    @property
    def releases(self) -> list[str]:
        return self.node.run("ls", RELEASES).split()

    @property
    def containerd(self) -> str:
        """The process that containerd is."""
        return self.node.run("cat", "/run/node/containerd.pid").strip()


@pytest.fixture(scope="module")
def machine(guarded_cluster: Cluster) -> Iterator[Machine]:
    cluster = guarded_cluster
    cluster.import_image(built_image("gvisor-installer").archive)
    try:
        node = cluster.add_node(NODE, "zone-a", gvisor=False)
    except UnsupportedHereError as error:
        pytest.skip(str(error))
    cluster.kubectl("create", "namespace", NAMESPACE)
    yield Machine(cluster, node)
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")
    cluster.kubectl("delete", "--kustomize", str(FILES / "base"), "--wait=false", "--ignore-not-found", check=False)
    cluster.remove_node(NODE)


def sandbox(machine: Machine, *path: str) -> str:
    arguments = ["--namespace", NAMESPACE, "get", "pod", "sandbox", "-o", f"jsonpath={{{path[0]}}}"]
    return machine.cluster.kubectl(*arguments, check=False)


def test_a_node_without_gvisor_takes_no_sandbox(machine: Machine) -> None:
    machine.cluster.kubectl("apply", "-f", str(FILES / "sandbox.yaml"))
    reason = '.status.conditions[?(@.type=="PodScheduled")].reason'
    wait_until(
        lambda: sandbox(machine, reason) == "Unschedulable",
        timeout=20,
        describe="the verdict of the scheduler",
        poll=POLL,
    )
    assert machine.marks == (False, True)


def test_a_containerd_that_would_not_read_the_drop_in_is_refused(machine: Machine) -> None:
    machine.node.run("sed", "-i.whole", "/^imports/d", CONFIG)
    machine.apply("corrupted")
    told = machine.await_reason("DropInNotImported")
    assert told["status"] == "False"
    assert "seed imports" in told["message"]
    assert machine.marks == (False, True)
    assert machine.releases == []


def test_a_corrupted_binary_is_refused_before_anything_is_installed(machine: Machine) -> None:
    before = machine.containerd
    machine.node.run("mv", f"{CONFIG}.whole", CONFIG)
    told = machine.await_reason("ChecksumMismatch")
    assert told["status"] == "False"
    assert told["message"].startswith("runsc has SHA-256")
    assert machine.marks == (False, True)
    assert machine.releases == []
    assert machine.containerd == before


def test_the_installer_opens_the_node_once_a_sandbox_has_run_there(machine: Machine) -> None:
    machine.apply("base")
    told = machine.await_reason("SandboxRan")
    wait_until(lambda: machine.marks == (True, False), timeout=20, describe="the node's label and taint", poll=POLL)
    [release] = machine.releases
    assert told["status"] == "True"
    assert told["message"].startswith(f"{release}: ")
    wait_until(
        lambda: machine.metrics.get("gvisor_node_ready") == 1, timeout=20, describe="gvisor_node_ready", poll=POLL
    )
    assert any(f'release="{release}"' in series for series in machine.metrics)


def test_a_sandbox_then_really_runs_on_gvisor_there(machine: Machine) -> None:
    wait_until(lambda: sandbox(machine, ".status.phase") == "Running", timeout=40, describe="the sandbox", poll=POLL)
    assert sandbox(machine, ".spec.nodeName") == NODE
    logs = ["--namespace", NAMESPACE, "logs", "sandbox"]
    kernel = wait_until(
        lambda: machine.cluster.kubectl(*logs).strip(), timeout=10, describe="the sandbox's output", poll=POLL
    )
    assert kernel != machine.read()["status"]["nodeInfo"]["kernelVersion"]
    seen = machine.cluster.kubectl("--namespace", NAMESPACE, "exec", "sandbox", "--", "cat", "/proc/version")
    assert kernel in seen


def test_a_second_installer_finds_all_done_and_restarts_nothing(machine: Machine) -> None:
    before, first = machine.containerd, machine.pod
    written = machine.node.run("stat", "-c", "%Y", DROP_IN)
    machine.installer("delete", "pod", first, "--wait=false")
    wait_until(lambda: machine.pod not in {"", first}, timeout=30, describe="the next installer", poll=POLL)
    wait_until(
        lambda: machine.metrics.get('gvisor_probes_total{result="gvisor"}', 0) >= 1,
        timeout=30,
        describe="its own probe",
        poll=POLL,
    )
    assert machine.metrics.get("gvisor_containerd_restarts_total", 0) == 0
    assert machine.containerd == before
    assert machine.node.run("stat", "-c", "%Y", DROP_IN) == written
    assert machine.marks == (True, False)


@pytest.fixture
def holder(machine: Machine) -> Iterator[httpx.Client]:
    """Who holds the installer's token, and nothing else."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={machine.pod}"]
    token = machine.installer("create", "token", "gvisor-installer", *bound).strip()
    api = yaml.safe_load(machine.cluster.kubeconfig.read_text(encoding="utf-8"))["clusters"][0]["cluster"]
    authority = base64.b64decode(api["certificate-authority-data"]).decode("ascii")
    context = ssl.create_default_context(cadata=authority)
    with httpx.Client(
        base_url=api["server"], verify=context, headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "change", "answer"),
    [
        (f"nodes/{NODE}", {"metadata": {"labels": {names.LABEL_GVISOR: names.GVISOR_READY}}}, ""),
        ("nodes/w1", {"metadata": {"labels": {names.LABEL_GVISOR: None}}}, "only the node that it runs on"),
        (f"nodes/{NODE}", {"metadata": {"labels": {"x": "y"}}}, "labels an installer changes only"),
        (
            f"nodes/{NODE}",
            {"metadata": {"labels": {"topology.kubernetes.io/zone": None}}},
            "labels an installer changes only",
        ),
        (
            f"nodes/{NODE}",
            {"spec": {"taints": [{"key": "x", "effect": "NoExecute"}]}},
            "taints an installer changes only",
        ),
        (f"nodes/{NODE}", {"spec": {"unschedulable": True}}, "neither cordons nor uncordons"),
        (f"nodes/{NODE}/status", {"status": {"capacity": {"cpu": "99"}}}, "only the condition CrucibleGvisorReady"),
        (f"nodes/{NODE}/status", {"status": {"conditions": []}}, "only the condition CrucibleGvisorReady"),
    ],
)
def test_an_installer_s_token_marks_its_own_node_and_nothing_else(
    holder: httpx.Client, path: str, change: dict[str, Any], answer: str
) -> None:
    headers = {"Content-Type": "application/merge-patch+json"}
    said = holder.patch(f"/api/v1/{path}", content=json.dumps(change), headers=headers)
    assert said.status_code == (403 if answer else 200), said.text
    assert answer in said.text


@pytest.mark.parametrize(
    ("pod", "answer"),
    [("elsewhere", "only on the node that it runs on"), ("intruder", "nothing but a sandbox"), ("mount", "no volume")],
)
def test_an_installer_s_token_starts_nothing_but_its_probe(holder: httpx.Client, pod: str, answer: str) -> None:
    said = holder.post(
        f"/api/v1/namespaces/{names.NODE_NAMESPACE}/pods",
        content=(FILES / "pods" / f"{pod}.yaml").read_bytes(),
        headers={"Content-Type": "application/yaml"},
    )
    assert said.status_code == 403, said.text
    assert answer in said.text


def test_an_upgrade_leaves_running_sandboxes_their_version(machine: Machine) -> None:
    [old] = machine.releases
    machine.apply("upgraded")
    told = wait_until(
        lambda: (c := machine.condition)["status"] == "True" and not c["message"].startswith(old) and c,
        timeout=60,
        describe="the new version's sandbox",
        poll=POLL,
    )
    assert told
    assert len(machine.releases) == 2
    assert old in machine.releases
    assert sandbox(machine, ".status.phase") == "Running"
    alive = ["--namespace", NAMESPACE, "exec", "sandbox", "--", "cat", "/proc/uptime"]
    assert float(machine.cluster.kubectl(*alive).split()[0]) > 0
    machine.cluster.kubectl("--namespace", NAMESPACE, "delete", "pod", "sandbox", "--wait=false")
    wait_until(lambda: old not in machine.releases, timeout=40, describe="the old version to be removed", poll=POLL)
    assert len(machine.releases) == 1


def test_a_node_that_breaks_is_closed_and_opens_when_it_is_repaired(machine: Machine) -> None:
    machine.node.run("sed", "-i.whole", "/^imports/d", CONFIG)
    machine.await_reason("DropInNotImported")
    assert machine.marks == (False, True)
    assert machine.metrics["gvisor_node_ready"] == 0
    assert machine.metrics['gvisor_install_failures_total{reason="DropInNotImported"}'] >= 1
    machine.node.run("mv", f"{CONFIG}.whole", CONFIG)
    machine.await_reason("SandboxRan")
    wait_until(lambda: machine.marks == (True, False), timeout=20, describe="the node to open again", poll=POLL)


def test_a_binary_that_someone_changed_closes_the_node_for_good(machine: Machine) -> None:
    [release] = machine.releases
    began = time.monotonic()
    machine.node.run(
        "sh", "-c", f"cp {RELEASES}/{release}/runsc /tmp/r; echo >>/tmp/r; mv /tmp/r {RELEASES}/{release}/runsc"
    )
    told = machine.await_reason("InstalledFileChanged", timeout=30)
    assert time.monotonic() - began < 30
    assert f"{release}/runsc" in told["message"]
    assert machine.marks == (False, True)
