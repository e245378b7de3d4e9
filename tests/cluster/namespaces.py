"""A real Kubernetes cluster of several nodes in namespaces of this machine, and what can happen to its machines."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tests.cluster import machine
from tests.cluster.base import ZONES, Cluster, Node, say_nothing
from tests.cluster.cgroups import Cgroup
from tests.cluster.errors import ClusterError
from tests.cluster.images import COREDNS, PAUSE, PROBE, make_image
from tests.cluster.network import API_PORT, FILES, NODE_LIMIT, Fabric, node_address
from tests.cluster.node import VOLUMES, NodeMachine, fill_in, settings
from tests.cluster.pki import Authority, make_signing_key, write_private
from tests.cluster.processes import wait_for
from tests.cluster.state import Home, NodeState, State, boot_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CONTROL_PLANE = "cp"
# Each takes a few seconds on an idle machine.
API_SECONDS = 120
NODE_SECONDS = 120
MANIFESTS = FILES / "manifests"
# The platform's own, so that a Pod under gVisor is here what it is there.
RUNTIME_CLASS = machine.REPOSITORY / "policies" / "admission" / "runtime-class.yaml"
_CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
_ROLES = {"calico-node", "calico-cni-plugin"}


def _keep(file: Path, kept: Path) -> None:
    """Have the file under another name too, for nodes that come when the first is gone."""
    try:
        kept.hardlink_to(file)
    except OSError:
        # Another file system.
        shutil.copy(file, kept)


class NamespaceCluster(Cluster):
    """A cluster by its name. The same cluster may be used from several processes; changes to it take turns."""

    kind = "a cluster of namespaces"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._home = Home(self.name)

    # ------------------------------------------------------------------ up and down

    def up(self, say: Callable[[str], None] = say_nothing) -> bool:
        """Bring the cluster up with a control plane and a worker in each zone; False if it is up already.

        Raises:
            ClusterError: it cannot be had here, or did not come up; nothing of it is left then.
        """
        with self._home.locked():
            state = self._home.load()
            if state is not None and state.complete:
                return False
            if reason := machine.why_unusable():
                raise ClusterError(reason)
            self._remove()
            say("programs")
            tools = machine.build_tools()
            machine.raise_inotify_limit()
            try:
                self._make(tools, say)
            except BaseException:
                self._keep_logs()
                self._remove()
                raise
        return True

    def down(self) -> None:
        """End it, and leave nothing of it behind. A cluster that is not up, or only half, is no error."""
        with self._home.locked():
            self._remove()
            shutil.rmtree(self._failed, ignore_errors=True)

    @property
    def _failed(self) -> Path:
        """Where the logs are kept of a cluster that did not come up."""
        return self._home.path.with_name(f"{self.name}.failed")

    def _make(self, tools: machine.Tools, say: Callable[[str], None]) -> None:
        self._home.path.mkdir(parents=True)
        self._home.path.chmod(0o700)
        authority = Authority(self._home.pki, "ca")
        Authority(self._home.pki, "front-proxy-ca")
        make_signing_key(self._home.pki, "service-accounts")
        fabric_process = Fabric.start(self.name, self._home, ZONES)
        fabric = Fabric(self.name, self._home, fabric_process)
        port = fabric.relay([(node_address(0), API_PORT)])
        kubeconfig = authority.kubeconfig(
            f"https://127.0.0.1:{port}", "admin", organization="system:masters", cluster_name=f"crucible-{self.name}"
        )
        write_private(self._home.kubeconfig, kubeconfig)
        state = State(tools=str(tools.path), api_port=port, fabric=fabric_process, boot_id=boot_id())
        self._home.save(state)
        nodes = [
            NodeState(CONTROL_PLANE, ZONES[0], 0, gvisor=False, control_plane=True),
            *(NodeState(f"w{n}", zone, n, gvisor=True) for n, zone in enumerate(ZONES, start=1)),
        ]
        for node in nodes:
            self._start_new_node(state, node)
        say("nodes started")
        self._wait_for_api()
        say("API server ready")
        self._apply_calico(tools)
        say("Calico's resources")
        self._make_own_images(state, tools)
        self._give_images(state, nodes)
        say("images")
        for node in nodes:
            self._join(node)
        self._apply(fill_in(MANIFESTS / "coredns.yaml", settings(nodes[0])))
        self._apply((MANIFESTS / "storage.yaml").read_text(encoding="utf-8"))
        self._apply(RUNTIME_CLASS.read_text(encoding="utf-8"))
        say("nodes Ready")
        self.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", f"--timeout={NODE_SECONDS}s")
        state.complete = True
        self._home.save(state)
        say("up")

    def _remove(self) -> None:
        cgroup = Cgroup(self.name)
        cgroup.kill()
        cgroup.remove()
        cgroup.remove_parent_if_empty()
        shutil.rmtree(self._home.path, ignore_errors=True)

    def _keep_logs(self) -> None:
        shutil.rmtree(self._failed, ignore_errors=True)
        for log in self._home.path.glob("nodes/*/log"):
            shutil.copytree(log, self._failed / log.parent.name, ignore_dangling_symlinks=True)

    def _wait_for_api(self) -> None:
        def ready() -> bool:
            return self.kubectl("get", "--raw", "/readyz", check=False) == "ok"

        wait_for(ready, seconds=API_SECONDS, what=f"the API server; logs: {self._home.node(CONTROL_PLANE) / 'log'}")

    def _apply(self, manifests: str) -> None:
        self.kubectl("apply", "-f", "-", input=manifests)

    def _apply_calico(self, tools: machine.Tools) -> None:
        self.kubectl("apply", "--server-side", "-f", str(tools.calico_manifests / "crds.yaml"))
        self.kubectl("wait", "--for=condition=Established", f"--timeout={API_SECONDS}s", "crd", "--all")
        manifest = (tools.calico_manifests / "calico-policy-only.yaml").read_text(encoding="utf-8")
        roles = [
            document
            for document in yaml.safe_load_all(manifest)
            if document["kind"] == "ClusterRole" and document["metadata"]["name"] in _ROLES
        ]
        self._apply(yaml.safe_dump_all(roles))
        self._apply((MANIFESTS / "calico.yaml").read_text(encoding="utf-8"))

    # ------------------------------------------------------------------ nodes

    def add_node(self, name: str, zone: str, *, gvisor: bool = True) -> Node:
        """Add a worker; one without gVisor has neither its programs nor its configuration, and a taint that says so."""
        with self._changing() as state:
            if name in state.nodes or len(name) > 12:
                raise ClusterError(f"a node {name} is there already, or the name is longer than 12 characters")
            used = {node.number for node in state.nodes.values()}
            free = set(range(NODE_LIMIT)) - used
            if not free:
                raise ClusterError(f"a cluster has at most {NODE_LIMIT} nodes")
            fabric = self._fabric(state)
            if not fabric.has_zone(zone):
                fabric.add_zone(zone)
            node = NodeState(name, zone, min(free), gvisor=gvisor)
            self._start_new_node(state, node)
            self._give_images(state, [node])
            self._join(node)
        return Node(self, name)

    def remove_node(self, name: str) -> None:
        """Take a worker away for good, with its disk."""
        with self._changing() as state:
            node = self._node(state, name)
            self._machine(state, node).power_off()
            del state.nodes[name]
            shutil.rmtree(self._home.node(name))
            self.kubectl("delete", "node", name, "--ignore-not-found", "--wait=false")
            volumes = [f"{name}-{number}" for number in range(VOLUMES)]
            self.kubectl("delete", "persistentvolume", *volumes, "--ignore-not-found", "--wait=false")

    def node(self, name: str) -> Node:
        """Return a node by its name."""
        self._node(self._state(), name)
        return Node(self, name)

    def node_command(self, name: str, *command: str) -> list[str | Path]:
        """Return the command line that runs a command on a node as root."""
        state = self._state()
        return self._machine(state, self._node(state, name)).enter(*command)

    def _start_new_node(self, state: State, node: NodeState) -> None:
        self._machine(state, node).make()
        state.nodes[node.name] = node
        self._power_on(state, node)

    def _power_on(self, state: State, node: NodeState) -> None:
        node_machine = self._machine(state, node)
        node.init = node_machine.power_on()
        self._home.save(state)
        self._fabric(state).connect(node, node.init.number)

    def _join(self, node: NodeState) -> None:
        """Wait until a new node is Ready, and add what only an administrator may."""

        def ready() -> bool:
            return self._is_ready(node.name)

        log = self._home.node(node.name) / "log"
        wait_for(ready, seconds=NODE_SECONDS, what=f"node {node.name} to be Ready; its logs: {log}")
        if node.control_plane:
            self.kubectl("label", "node", node.name, "node-role.kubernetes.io/control-plane=")
            return
        values = settings(node)
        volumes = [fill_in(MANIFESTS / "volume.yaml", {**values, "VOLUME": str(n)}) for n in range(VOLUMES)]
        self._apply("---\n".join(volumes))

    def _is_ready(self, name: str) -> bool:
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        return self.kubectl("get", "node", name, "-o", f"jsonpath={path}", check=False) == "True"

    def power_cut(self, name: str) -> None:
        """End everything on a node at once."""
        with self._changing() as state:
            node = self._node(state, name)
            self._machine(state, node).power_off()
            node.init = None

    def revive(self, name: str) -> None:
        """Switch a node on again after a power cut."""
        with self._changing() as state:
            node = self._node(state, name)
            if node.init is not None and node.init.alive:
                raise ClusterError(f"node {name} is switched on")
            self._power_on(state, node)
            self._machine(state, node).wait_until_booted()
            self._give_images(state, [node])

    def cut(self, name: str) -> None:
        """Pull a node's network cable."""
        self._set_link(name, connected=False)

    def heal(self, name: str) -> None:
        """Plug a node's network cable in again."""
        self._set_link(name, connected=True)

    def _set_link(self, name: str, *, connected: bool) -> None:
        state = self._state()
        self._fabric(state).set_node(self._node(state, name).name, connected=connected)

    def cut_zone(self, zone: str) -> None:
        """Cut a zone off from all others and from this machine; within it all goes on."""
        self._fabric(self._state()).set_zone(zone, connected=False)

    def heal_zone(self, zone: str) -> None:
        """Undo `cut_zone`."""
        self._fabric(self._state()).set_zone(zone, connected=True)

    # ------------------------------------------------------------------ the API server

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig: an ordinary one, for this machine."""
        return self._home.kubeconfig

    @property
    def kubectl_program(self) -> Path:
        """The kubectl of the cluster's version."""
        return self._tools(self._state()).bin / "kubectl"

    @property
    def calicoctl_program(self) -> Path:
        """The calicoctl of the cluster's version."""
        return self._tools(self._state()).bin / "calicoctl"

    def pause_api_server(self) -> None:
        """Stop the API server in its tracks: connections stay open and nothing answers."""
        self._signal_api_server(signal.SIGSTOP)

    def resume_api_server(self) -> None:
        """Undo `pause_api_server`."""
        self._signal_api_server(signal.SIGCONT)

    def _signal_api_server(self, number: signal.Signals) -> None:
        node = Node(self, CONTROL_PLANE)
        pid = node.run("cat", "/run/node/kube-apiserver.pid").strip()
        node.run("kill", f"-{number.name.removeprefix('SIG')}", pid)

    def node_port_url(self, port: int) -> str:
        """Return the address on this machine of a port that a Service has on every node."""
        with self._changing() as state:
            if port not in state.node_ports:
                workers = [node for node in state.nodes.values() if not node.control_plane]
                targets = [(node_address(node.number), port) for node in workers]
                state.node_ports[port] = self._fabric(state).relay(targets)
            return f"http://127.0.0.1:{state.node_ports[port]}"

    # ------------------------------------------------------------------ images

    def import_image(self, file: Path) -> None:
        """Give an image to every node, and to every one that comes later, by each name that its archive has for it."""
        with self._changing() as state:
            if not file.is_file():
                raise ClusterError(f"there is no file {file}")
            kept = self._images / f"{file.stat().st_ino}-{file.name}"
            if not kept.exists():
                _keep(file, kept)
            if str(kept) not in state.images:
                state.images.append(str(kept))
            self._give_images(state, [node for node in state.nodes.values() if node.init])

    @property
    def _images(self) -> Path:
        return self._home.path / "images"

    def _make_own_images(self, state: State, tools: machine.Tools) -> None:
        self._images.mkdir()
        for reference, program in ((PAUSE, "pause"), (COREDNS, "coredns"), (PROBE, "probe")):
            file = self._images / f"{program}.tar"
            make_image(reference, tools.bin / program, file)
            state.images.append(str(file))

    def _give_images(self, state: State, nodes: Iterable[NodeState]) -> None:
        """Give each of these nodes, all of them at once, the images that it does not have yet."""

        def give(node: NodeState) -> None:
            missing = [image for image in state.images if image not in node.images]
            if not missing:
                return
            node_machine = self._machine(state, node)
            node_machine.wait_for_socket(_CONTAINERD_SOCKET, NODE_SECONDS)
            command = [str(word) for word in node_machine.enter("ctr", "--namespace=k8s.io", "images", "import", "-")]
            for image in missing:
                with Path(image).open("rb") as archive:
                    done = subprocess.run(command, stdin=archive, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise ClusterError(f"{node.name} does not take the image {image}: {done.stderr.strip()}")
                node.images.append(image)

        with ThreadPoolExecutor(4) as nodes_at_once:
            list(nodes_at_once.map(give, nodes))

    # ------------------------------------------------------------------ state

    def status(self) -> str:
        """Return what people want to know about the cluster, in lines."""
        with self._home.locked():
            state = self._home.load()
        if state is None or not state.complete:
            return f"cluster {self.name} is not up\n"
        lines = []
        for node in state.nodes.values():
            power = "on" if node.init and node.init.alive else "off"
            lines.append(f"  {node.name:12} power {power:4} logs {self._home.node(node.name) / 'log'}\n")
        return super().status() + "".join(lines)

    def _state(self) -> State:
        state = self._home.load()
        if state is None:
            raise ClusterError(f"cluster {self.name} is not up: make cluster-up")
        return state

    @contextlib.contextmanager
    def _changing(self) -> Iterator[State]:
        with self._home.locked():
            state = self._state()
            yield state
            self._home.save(state)

    def _node(self, state: State, name: str) -> NodeState:
        try:
            return state.nodes[name]
        except KeyError:
            raise ClusterError(f"there is no node {name}; there are: {', '.join(state.nodes)}") from None

    @staticmethod
    def _tools(state: State) -> machine.Tools:
        return machine.Tools(Path(state.tools))

    def _machine(self, state: State, node: NodeState) -> NodeMachine:
        return NodeMachine(self.name, self._home, self._tools(state), node)

    def _fabric(self, state: State) -> Fabric:
        return Fabric(self.name, self._home, state.fabric)
