"""The cluster tool: what it decides and writes, without the machine around it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import yaml

from tests.cluster import Cluster, ClusterError, UnsupportedHereError, choice, cli, machine, node, open_cluster
from tests.cluster.cgroups import V1_CONTROLLERS, V2_CONTROLLERS, Cgroup, why_unusable
from tests.cluster.external import ExternalCluster
from tests.cluster.namespaces import MANIFESTS, RUNTIME_CLASS
from tests.cluster.network import FILES
from tests.cluster.processes import ProcessId
from tests.cluster.state import Home, NodeState, State, boot_id
from tests.cluster.versions import VERSIONS_FILE, versions

pytestmark = pytest.mark.unit

MODULES = VERSIONS_FILE.with_name("modules")
WORKER = NodeState("w1", "zone-a", 1, gvisor=True)
BARE = NodeState("w2", "zone-b", 2, gvisor=False)
CONTROL_PLANE = NodeState("cp", "zone-a", 0, gvisor=False, control_plane=True)


@pytest.fixture(autouse=True)
def no_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr(choice, "kind_works", lambda: False)


@pytest.mark.parametrize(
    ("module", "requirement", "name"),
    [
        ("kubernetes", "k8s.io/kubernetes", "KUBERNETES"),
        ("kubernetes", "go.etcd.io/etcd/server/v3", "ETCD"),
        ("coredns", "github.com/coredns/coredns", "COREDNS"),
        ("containerd", "github.com/containerd/containerd/v2", "CONTAINERD"),
        ("gvisor", "gvisor.dev/gvisor", "GVISOR_MODULE"),
        ("calico", "github.com/projectcalico/calico", "CALICO"),
    ],
)
def test_the_modules_are_of_the_versions_that_the_one_file_says(module: str, requirement: str, name: str):
    lines = (MODULES / module / "go.mod").read_text(encoding="utf-8").splitlines()
    assert f"{requirement} {versions()[name]}" in {line.removeprefix("require ").strip() for line in lines}


@pytest.mark.parametrize("state", [WORKER, BARE, CONTROL_PLANE])
def test_every_template_is_filled_in_and_reads_as_what_it_is(state: NodeState):
    values = node.settings(state)
    templates = [*(FILES / "node").rglob("*.yaml"), *(FILES / "node").rglob("*.conflist")]
    assert len(templates) == 3
    for file in templates:
        assert isinstance(yaml.safe_load(node.fill_in(file, values)), dict)
    for file in [*MANIFESTS.glob("*.yaml"), RUNTIME_CLASS]:
        assert all("kind" in document for document in yaml.safe_load_all(node.fill_in(file, {**values, "VOLUME": "0"})))


def test_a_node_without_gvisor_is_closed_to_pods_until_someone_installs_it():
    assert node.taints(WORKER) == []
    assert node.labels(WORKER)["crucible.dev/gvisor"] == "ready"
    assert [taint["key"] for taint in node.taints(BARE)] == ["crucible.dev/gvisor-not-ready"]
    assert "crucible.dev/gvisor" not in node.labels(BARE)
    assert "crucible.dev/sandbox" not in node.labels(CONTROL_PLANE)


def test_state_is_what_was_saved_until_the_machine_starts_anew():
    home = Home("x")
    home.path.mkdir(parents=True)
    init = ProcessId.of(os.getpid())
    state = State(tools="/tools", api_port=1, fabric=init, boot_id=boot_id(), node_ports={30000: 2})
    state.nodes["w1"] = NodeState("w1", "zone-a", 1, gvisor=True, init=init)
    home.save(state)
    assert home.load() == state
    state.boot_id = "another"
    home.save(state)
    assert home.load() is None


def test_the_lock_of_a_cluster_goes_with_it():
    home = Home("x")
    with home.locked():
        home.path.mkdir(parents=True)
    assert [file.name for file in home.path.parent.iterdir()] == ["x", "x.lock"]
    with home.locked():
        home.path.rmdir()
    assert list(home.path.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "x" * 33])
def test_a_name_that_would_be_no_folder_is_refused(name: str):
    with pytest.raises(ClusterError, match="cannot name a cluster"):
        Home(name)


def fake_v2(root: Path) -> Path:
    root.mkdir()
    (root / "cgroup.controllers").write_text(" ".join(V2_CONTROLLERS), encoding="ascii")
    return root


def test_under_cgroup_v2_controllers_are_handed_on_once_no_process_is_in_the_way(tmp_path: Path):
    root = fake_v2(tmp_path / "v2")
    cgroup, services = Cgroup("x", "w1", root=root), Cgroup("x", "w1", "services", root=root)
    cgroup.make()
    top = root / "crucible-cluster"
    assert cgroup.procs_files == [top / "x/w1/cgroup.procs"]
    assert not (top / "x/w1/cgroup.subtree_control").exists()
    cgroup.procs_files[0].write_text("", encoding="ascii")
    cgroup.move_into(services)
    assert services.procs_files == [top / "x/w1/services/cgroup.procs"]
    assert services.procs_files[0].parent.is_dir()
    for folder in (root, top, top / "x", top / "x/w1"):
        assert (folder / "cgroup.subtree_control").read_text(encoding="ascii") == "+cpu +cpuset +io +memory +pids"


def test_under_cgroup_v1_a_node_is_in_every_hierarchy_and_may_use_its_parents_processors(tmp_path: Path):
    root = tmp_path / "v1"
    for controller in V1_CONTROLLERS:
        (root / controller).mkdir(parents=True)
    for folder in ("", "crucible-cluster", "crucible-cluster/x"):
        (root / "cpuset" / folder).mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            (root / "cpuset" / folder / name).write_text("0-1" if not folder else "\n", encoding="ascii")
    cgroup = Cgroup("x", root=root)
    cgroup.make()
    assert {file.parent for file in cgroup.procs_files} == {root / c / "crucible-cluster/x" for c in V1_CONTROLLERS}
    assert (root / "cpuset/crucible-cluster/x/cpuset.cpus").read_text(encoding="ascii") == "0-1"


def test_a_machine_without_a_controller_says_which(tmp_path: Path):
    root = fake_v2(tmp_path / "v2")
    assert why_unusable(root) is None
    (root / "cgroup.controllers").write_text("cpu memory pids", encoding="ascii")
    assert "cpuset, io" in str(why_unusable(root))


def test_who_is_not_root_is_told_what_to_do_instead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo" in str(machine.why_unusable())
    with pytest.raises(ClusterError, match=r"uid 1000.*KUBECONFIG"):
        open_cluster("x").up()
    assert "uid 1000" in str(choice.why_no_cluster())


def test_a_cluster_that_kubeconfig_names_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", "/somewhere/kubeconfig")
    cluster = open_cluster()
    assert isinstance(cluster, ExternalCluster)
    with pytest.raises(UnsupportedHereError, match="KUBECONFIG names cannot cut a node's power"):
        cluster.node("w1").power_cut()
    # What `up` says to export is still the cluster that it made.
    monkeypatch.setenv("KUBECONFIG", str(Home("x").kubeconfig))
    assert not isinstance(open_cluster("x"), ExternalCluster)


@pytest.mark.parametrize("command", ["power-cut", "revive", "cut", "heal", "cut-zone", "heal-zone"])
def test_each_command_does_to_the_cluster_what_it_is_called(monkeypatch: pytest.MonkeyPatch, command: str):
    cluster = Mock(spec=Cluster)
    monkeypatch.setattr(cli, "open_cluster", lambda: cluster)
    # Signals are the process's own, which here is the run of the tests.
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main([command, "x"]) == 0
    assert cluster.method_calls == [getattr(call, command.replace("-", "_"))("x")]
