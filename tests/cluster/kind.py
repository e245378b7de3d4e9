"""The cluster as containers, by kind, on machines with a Docker engine. Its nodes get gVisor from the installer, as real ones do."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import machine
from tests.cluster.base import Cluster, say_nothing
from tests.cluster.processes import run
from tests.cluster.state import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATION = Path(__file__).with_name("files") / "kind.yaml"
PROBE_SECONDS = 20
# What kind calls the nodes that are cp, w1 and w2 elsewhere, after the cluster's name.
_SUFFIXES = {"cp": "control-plane", "w1": "worker", "w2": "worker2"}
_NETWORK = "kind"


@functools.cache
def kind_works() -> bool:
    """Whether there is kind, and a Docker engine that answers."""
    if not shutil.which("kind") or not shutil.which("docker"):
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class KindCluster(Cluster):
    """A cluster whose nodes are containers."""

    kind = "a cluster of kind"

    def up(self, say: Callable[[str], None] = say_nothing) -> bool:
        """Make it, with Calico; False if it is there already."""
        if self.name in run(["kind", "get", "clusters"]).split():
            return False
        try:
            say("containers")
            self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
            run(
                [
                    "kind",
                    "create",
                    "cluster",
                    "--name",
                    self.name,
                    "--config",
                    CONFIGURATION,
                    "--kubeconfig",
                    self.kubeconfig,
                ]
            )
            say("Calico")
            self.kubectl("apply", "--server-side", "-f", str(machine.calico_manifest()))
            # Its default closes only IPv4: a Pod would still reach its own node over the link-local address of IPv6.
            self.kubectl("-n", "kube-system", "set", "env", "daemonset/calico-node", "FELIX_IPV6SUPPORT=true")
            self.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=300s")
        except BaseException:
            self.down()
            raise
        return True

    def down(self) -> None:
        """Remove its containers."""
        run(["kind", "delete", "cluster", "--name", self.name, "--kubeconfig", self.kubeconfig])
        self.kubeconfig.unlink(missing_ok=True)

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig that kind wrote for this cluster."""
        return cache_folder() / "clusters" / f"{self.name}.kind"

    @property
    def kubectl_program(self) -> str:
        """The kubectl of this machine."""
        return machine.kubectl()

    def _container(self, name: str) -> str:
        return f"{self.name}-{_SUFFIXES.get(name, name)}"

    def import_image(self, file: Path) -> None:
        """Give an image to every node."""
        run(["kind", "load", "image-archive", "--name", self.name, file])

    def node_command(self, name: str, *command: str) -> list[str | Path]:
        """Return the command line that runs a command on a node as root."""
        return ["docker", "exec", "--interactive", self._container(name), *command]

    def power_cut(self, name: str) -> None:
        """End everything on a node at once."""
        run(["docker", "kill", self._container(name)])

    def revive(self, name: str) -> None:
        """Switch a node on again after a power cut."""
        run(["docker", "start", self._container(name)])

    def cut(self, name: str) -> None:
        """Take a node off the network."""
        run(["docker", "network", "disconnect", _NETWORK, self._container(name)])

    def heal(self, name: str) -> None:
        """Put a node on the network again."""
        run(["docker", "network", "connect", _NETWORK, self._container(name)])

    def pause_api_server(self) -> None:
        """Stop the API server in its tracks."""
        run(self.node_command("cp", "pkill", "-STOP", "kube-apiserver"))

    def resume_api_server(self) -> None:
        """Undo `pause_api_server`."""
        run(self.node_command("cp", "pkill", "-CONT", "kube-apiserver"))

    def node_port_url(self, port: int) -> str:
        """Return the address of a port of the first worker, which the machine of the Docker engine reaches."""
        inspected = json.loads(run(["docker", "inspect", self._container("w1")]))
        return f"http://{inspected[0]['NetworkSettings']['Networks'][_NETWORK]['IPAddress']}:{port}"
