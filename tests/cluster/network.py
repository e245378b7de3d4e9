"""The network between the nodes: a namespace with a bridge per zone, where links and whole zones can be cut.

    node -- zone's bridge -- core bridge -- the relay's way in
                                |
                           other zones

All addresses live in namespaces of the cluster, so that any number of clusters have the same.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.cgroups import OUTSIDE, Cgroup
from tests.cluster.errors import ClusterError
from tests.cluster.processes import ProcessId, run, start, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.cluster.state import Home, NodeState

FILES = Path(__file__).with_name("files")
RELAY = Path(__file__).with_name("relay.py")
IN_CGROUP = FILES / "in-cgroup"

NODE_PREFIX = "10.91.0"
NODE_FIRST_HOST = 10
NODE_LIMIT = 16
POD_PREFIX = "10.246"
POD_NETWORK = f"{POD_PREFIX}.0.0/16"
SERVICE_NETWORK = "10.98.0.0/16"
API_SERVICE_ADDRESS = "10.98.0.1"
DNS_ADDRESS = "10.98.0.10"
FABRIC_ADDRESS = f"{NODE_PREFIX}.1"
# Where a cloud's machines ask for their metadata, and with it for their credentials. A stand-in answers here, and everyone.
METADATA_ADDRESS = "169.254.169.254"
API_PORT = 6443
_CORE = "core"


def node_address(number: int) -> str:
    """Return the address of a node."""
    return f"{NODE_PREFIX}.{NODE_FIRST_HOST + number}"


def pod_network(number: int) -> str:
    """Return the network of a node's Pods."""
    return f"{POD_PREFIX}.{number}.0/24"


def _link(kind: str, name: str) -> str:
    """Return an interface's name, which may have 15 characters."""
    return f"{kind}-{name}"[:15]


class Fabric:
    """The network between the nodes of one cluster, alive as long as its one process."""

    def __init__(self, cluster: str, home: Home, process: ProcessId) -> None:
        self._cluster = cluster
        self._home = home
        self._process = process

    @classmethod
    def start(cls, cluster: str, home: Home, zones: Iterable[str]) -> ProcessId:
        """Make the network, and return its process."""
        cgroup = Cgroup(cluster, OUTSIDE)
        cgroup.make()
        command = ["unshare", "--net", "sleep", "infinity"]
        process = start([IN_CGROUP, *cgroup.procs_files, "--", *command], home.log)
        identity = ProcessId.of(process.pid)
        fabric = cls(cluster, home, identity)
        own = Path("/proc/self/ns/net").readlink()
        namespace = Path(f"/proc/{process.pid}/ns/net")
        wait_for(lambda: namespace.readlink() != own, seconds=5, what="a network namespace")
        routes = [f"route add {pod_network(n)} via {node_address(n)}" for n in range(NODE_LIMIT)]
        fabric._ip(
            "link set lo up",
            # A fixed address: a bridge's own changes when a port goes, and the nodes would look for the old one.
            f"link add {_CORE} address 02:00:0a:5b:00:01 type bridge",
            f"addr add {FABRIC_ADDRESS}/24 dev {_CORE}",
            f"addr add {METADATA_ADDRESS}/32 dev {_CORE}",
            f"link set {_CORE} up",
            *routes,
        )
        for zone in sorted(set(zones)):
            fabric.add_zone(zone)
        server = [sys.executable, "-I", "-m", "http.server", "--bind", METADATA_ADDRESS, "--directory"]
        fabric._start([*server, FILES / "metadata", "80"])
        return identity

    def add_zone(self, zone: str) -> None:
        """Make a zone's bridge and its line to the core."""
        bridge, up, down = _link("z", zone), _link("u", zone), _link("d", zone)
        self._ip(
            f"link add {bridge} type bridge",
            f"link set {bridge} up",
            f"link add {up} type veth peer name {down}",
            f"link set {up} master {bridge} up",
            f"link set {down} master {_CORE} up",
        )

    def has_zone(self, zone: str) -> bool:
        """Whether the zone has its bridge already."""
        return _link("z", zone) in self._links()

    def connect(self, node: NodeState, pid: int) -> None:
        """Plug in the cable of the node whose PID 1 this is."""
        port = _link("n", node.name)
        if port in self._links():
            # The kernel removes the cable of the node's earlier life in its own time.
            with contextlib.suppress(ClusterError):
                self._ip(f"link del {port}")
        mac = f"02:00:0a:5b:00:{NODE_FIRST_HOST + node.number:02x}"
        self._ip(
            f"link add {port} type veth peer name eth0 address {mac} netns {pid}",
            f"link set {port} master {_link('z', node.zone)} up",
        )

    def set_node(self, name: str, *, connected: bool) -> None:
        """Cut a node's link, or heal it."""
        self._ip(f"link set {_link('n', name)} {'up' if connected else 'down'}")

    def set_zone(self, zone: str, *, connected: bool) -> None:
        """Cut a zone off from all others and from this machine, or heal it; its nodes still reach each other."""
        self._ip(f"link set {_link('u', zone)} {'up' if connected else 'down'}")

    def relay(self, targets: Sequence[tuple[str, int]], port: int = 0) -> int:
        """Listen on this machine's 127.0.0.1 and pass connections on to the first target that answers; return the port."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
            addresses = [f"{host}:{number}" for host, number in targets]
            program: list[str | Path] = [sys.executable, "-I", RELAY, str(listener.fileno()), *addresses]
            self._start(program, pass_fds=[listener.fileno()])
            bound: int = listener.getsockname()[1]
            return bound

    def _start(self, program: Sequence[str | Path], pass_fds: Sequence[int] = ()) -> None:
        procs = Cgroup(self._cluster, OUTSIDE).procs_files
        start([IN_CGROUP, *procs, "--", *self._enter, *program], self._home.log, pass_fds=pass_fds)

    def run(self, *command: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess calls it
        """Run a command in the network, beside the nodes."""
        return run([*self._enter, *command], input=input)

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._process.number}/ns/net", "--"]

    def _links(self) -> set[str]:
        return {link["ifname"] for link in json.loads(self.run("ip", "-json", "link", "show"))}

    def _ip(self, *commands: str) -> None:
        self.run("ip", "-batch", "-", input="\n".join(commands))
