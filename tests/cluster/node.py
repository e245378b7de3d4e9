"""One node: namespaces of its own, a disk that outlives a power cut, an init that keeps its services running."""

from __future__ import annotations

import json
import shutil
import signal
import string
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import cgroups
from tests.cluster.cgroups import Cgroup
from tests.cluster.errors import ClusterError
from tests.cluster.network import (
    API_PORT,
    API_SERVICE_ADDRESS,
    DNS_ADDRESS,
    FABRIC_ADDRESS,
    FILES,
    IN_CGROUP,
    NODE_FIRST_HOST,
    NODE_LIMIT,
    NODE_PREFIX,
    POD_NETWORK,
    POD_PREFIX,
    SERVICE_NETWORK,
    node_address,
    pod_network,
)
from tests.cluster.pki import Authority
from tests.cluster.processes import ProcessId, run, start, wait_for

if TYPE_CHECKING:
    from tests.cluster.machine import Tools
    from tests.cluster.state import Home, NodeState

# A sparse file. What a sandbox may write is set aside for it: 150 of the smallest on two nodes take this much.
DISK_BYTES = 48 * 1024**3
BOOT_SECONDS = 60
# The cgroup of the kubelet, containerd and their like, beside the Pods'.
SERVICES_CGROUP = "services"
VOLUMES = 8
DOMAIN = "crucible.dev"
NODE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONTROL_PLANE_SERVICES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
SERVICES = ("calico-felix", "calico-gate", "containerd", "kubelet", "kube-proxy")
_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "kubelet", "kube-proxy", "kubectl", "calico-felix")
_CONTROL_PLANE_PROGRAMS = CONTROL_PLANE_SERVICES
_GVISOR_PROGRAMS = ("runsc", "containerd-shim-runsc-v1")
_HOST_CNI_PLUGINS = Path("/usr/lib/cni")
# Their placeholders are filled in; everything else is copied as it is.
_TEMPLATES = {".yaml", ".conflist"}


def taints(state: NodeState) -> list[dict[str, str]]:
    """Return what keeps Pods off a node when it joins."""
    if state.control_plane:
        return [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]
    if not state.gvisor:
        return [{"key": f"{DOMAIN}/gvisor-not-ready", "effect": "NoSchedule"}]
    return []


def labels(state: NodeState) -> dict[str, str]:
    """Return the labels with which a node joins."""
    result = {"topology.kubernetes.io/region": "local", "topology.kubernetes.io/zone": state.zone}
    if not state.control_plane:
        result[f"{DOMAIN}/sandbox"] = "true"
        if state.gvisor:
            result[f"{DOMAIN}/gvisor"] = "ready"
    return result


def settings(state: NodeState) -> dict[str, str]:
    """Return what the node's scripts read, and what is filled into its configuration."""
    services = (*(CONTROL_PLANE_SERVICES if state.control_plane else ()), *SERVICES)
    return {
        "NODE_NAME": state.name,
        "NODE_ZONE": state.zone,
        "NODE_NUMBER": str(state.number),
        "NODE_ADDRESS": node_address(state.number),
        "NODE_POD_NETWORK": pod_network(state.number),
        "NODE_LABELS": ",".join(f"{key}={value}" for key, value in labels(state).items()),
        "NODE_TAINTS": json.dumps(taints(state)),
        "NODE_SERVICES": " ".join(services),
        "NODE_PATH": NODE_PATH,
        "NODE_PREFIX": NODE_PREFIX,
        "NODE_FIRST_HOST": str(NODE_FIRST_HOST),
        "NODE_LIMIT": str(NODE_LIMIT),
        "POD_PREFIX": POD_PREFIX,
        "POD_NETWORK": POD_NETWORK,
        "SERVICE_NETWORK": SERVICE_NETWORK,
        "DNS_ADDRESS": DNS_ADDRESS,
        "FABRIC_ADDRESS": FABRIC_ADDRESS,
        "CGROUP_VERSION": str(cgroups.version()),
        "CGROUP_CONTROLLERS": " ".join(cgroups.V1_CONTROLLERS),
    }


def fill_in(file: Path, values: dict[str, str]) -> str:
    """Return a template with its placeholders filled in.

    Raises:
        KeyError: it has one that `values` has nothing for.
    """
    return string.Template(file.read_text(encoding="utf-8")).substitute(values)


def _copy_tree(source: Path, target: Path, values: dict[str, str]) -> None:
    for file in sorted(source.rglob("*")):
        to = target / file.relative_to(source)
        if file.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        elif file.suffix in _TEMPLATES:
            to.write_text(fill_in(file, values), encoding="utf-8")
        else:
            shutil.copy(file, to)


def _in_cgroup(cgroup: Cgroup) -> list[str | Path]:
    return [IN_CGROUP, *cgroup.procs_files, "--"]


class NodeMachine:
    """The machine that a node is: what people would do with a power button, a cable and a shell."""

    def __init__(self, cluster: str, home: Home, tools: Tools, state: NodeState) -> None:
        self._home = home.node(state.name)
        self._pki = home.pki
        self._tools = tools
        self._state = state
        self._cgroup = Cgroup(cluster, state.name)
        self._services = Cgroup(cluster, state.name, SERVICES_CGROUP)

    def make(self) -> None:
        """Make its disk, and all that will be on it when it first starts."""
        for folder in ("log", "root", "seed"):
            (self._home / folder).mkdir(parents=True, exist_ok=True)
        values = settings(self._state)
        seed = self._home / "seed"
        _copy_tree(FILES / "node", seed, values)
        if self._state.gvisor:
            _copy_tree(FILES / "gvisor", seed, values)
        (seed / "etc/containerd/conf.d").mkdir(parents=True, exist_ok=True)
        (seed / "etc/resolv.conf").write_text(f"nameserver {DNS_ADDRESS}\n", encoding="ascii")
        environment = "".join(f"{name}='{value}'\n" for name, value in values.items())
        for file in (self._home / "node.env", seed / "etc/node/node.env"):
            file.write_text(environment, encoding="utf-8")
        for number in range(VOLUMES):
            (seed / f"var/lib/volumes/{number}").mkdir(parents=True)
        self._install_programs(seed)
        self._issue_certificates(seed / "etc/kubernetes")
        disk = self._home / "disk.img"
        with disk.open("wb") as image:
            image.truncate(DISK_BYTES)
        # Without a journal: the kernel lets go of the disk in good order even when the node's power is cut.
        run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", "-m", "0", disk])

    def _install_programs(self, seed: Path) -> None:
        programs = [*_PROGRAMS]
        if self._state.control_plane:
            programs += _CONTROL_PLANE_PROGRAMS
        if self._state.gvisor:
            programs += _GVISOR_PROGRAMS
        links = {f"usr/local/bin/{name}": f"../lib/cluster/{name}" for name in programs}
        links |= {
            f"opt/cni/bin/{name}": f"{_HOST_CNI_PLUGINS}/{name}" for name in ("host-local", "loopback", "portmap")
        }
        links["opt/cni/bin/calico"] = "/usr/local/lib/cluster/calico"
        for link, to in links.items():
            (seed / link).parent.mkdir(parents=True, exist_ok=True)
            (seed / link).symlink_to(to)

    def _issue_certificates(self, folder: Path) -> None:
        authority = Authority(self._pki, "ca")
        pki = folder / "pki"
        pki.mkdir(parents=True)
        shutil.copy(authority.certificate_file, pki)
        address = node_address(self._state.number)
        name = self._state.name
        authority.issue_into(pki, "kubelet", f"system:node:{name}", organization="system:nodes", names=(name, address))
        server = f"https://{node_address(0)}:{API_PORT}"
        users = {
            "kubelet": (f"system:node:{name}", "system:nodes"),
            "kube-proxy": ("system:kube-proxy", None),
            "calico-node": ("calico-node", None),
            "calico-cni": ("calico-cni", None),
        }
        if self._state.control_plane:
            self._issue_control_plane_certificates(pki, authority)
            users["controller-manager"] = ("system:kube-controller-manager", None)
            users["scheduler"] = ("system:kube-scheduler", None)
        for file, (user, organization) in users.items():
            kubeconfig = authority.kubeconfig(server, user, organization=organization)
            (folder / f"{file}.kubeconfig").write_bytes(kubeconfig)

    def _issue_control_plane_certificates(self, pki: Path, authority: Authority) -> None:
        front_proxy = Authority(self._pki, "front-proxy-ca")
        for file in self._pki.iterdir():
            shutil.copy(file, pki)
        names = ["localhost", "127.0.0.1", node_address(self._state.number), API_SERVICE_ADDRESS]
        names += [f"kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
        authority.issue_into(pki, "apiserver", "kube-apiserver", names=names)
        authority.issue_into(pki, "kubelet-client", "kube-apiserver-kubelet-client", organization="system:masters")
        front_proxy.issue_into(pki, "front-proxy", "front-proxy-client")

    def power_on(self) -> ProcessId:
        """Start it; it waits for its cable. Returns its PID 1."""
        self._cgroup.make()
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--cgroup"]
        unshare = ["unshare", *namespaces, "--fork", "--kill-child=SIGKILL", "--propagation", "private"]
        command = [*_in_cgroup(self._cgroup), *unshare, FILES / "node-root", self._home, self._tools.path]
        launcher = start(command, self._home / "log" / "node.log")
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")

        def child() -> list[str]:
            if launcher.poll() is not None:
                raise ClusterError(f"node {self._state.name} did not start: {self._last_words()}")
            return children.read_text(encoding="ascii").split()

        wait_for(child, seconds=BOOT_SECONDS, what=f"node {self._state.name} to start")
        # It waits for its cable, so that its kubelet finds this done.
        self._cgroup.move_into(self._services)
        return ProcessId.of(int(child()[0]))

    def wait_until_booted(self) -> None:
        """Wait until its services are started."""
        init = self._running()
        booted = Path(f"/proc/{init.number}/root/run/node/booted")

        def done() -> bool:
            if not init.alive:
                raise ClusterError(f"node {self._state.name} did not start: {self._last_words()}")
            return booted.exists()

        wait_for(done, seconds=BOOT_SECONDS, what=f"node {self._state.name} to boot; its logs: {self._home / 'log'}")

    def _running(self) -> ProcessId:
        init = self._state.init
        if init is None or not init.alive:
            raise ClusterError(f"node {self._state.name} is switched off")
        return init

    def _last_words(self) -> str:
        return (self._home / "log" / "node.log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def power_off(self) -> None:
        """Take its power away: everything on it ends at this moment, and its disk stays."""
        if self._state.init is not None:
            self._state.init.send(signal.SIGKILL)
        self._cgroup.kill()
        self._cgroup.remove()

    def enter(self, *command: str | Path) -> list[str | Path]:
        """Return the command line that runs a command on the node.

        Raises:
            ClusterError: it is switched off.
        """
        init = self._running()
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        nsenter = ["nsenter", f"--target={init.number}", *namespaces, "--"]
        return [*_in_cgroup(self._services), *nsenter, "env", "-i", f"PATH={NODE_PATH}", "HOME=/root", *command]

    def wait_for_socket(self, path: str, seconds: float) -> None:
        """Wait until a socket of the node's file system exists."""
        file = Path(f"/proc/{self._running().number}/root{path}")
        wait_for(file.is_socket, seconds=seconds, what=f"{path} on {self._state.name}; its logs: {self._home / 'log'}")
