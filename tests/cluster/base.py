"""What every kind of cluster can be asked, whatever it is made of."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tests.cluster.errors import UnsupportedHereError
from tests.cluster.processes import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ZONES = ("zone-a", "zone-b")


def default_name() -> str:
    """Return the name of the cluster that is meant when none is given."""
    return os.environ.get("CRUCIBLE_CLUSTER", "crucible")


def say_nothing(_: str) -> None:
    """Do not tell what is being done."""


class Node:
    """A node of a cluster that is up, as a machine with a power button, a network cable and a shell."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self.name = name

    def power_cut(self) -> None:
        """End everything on it at once, as when a machine loses its power. Its disk stays."""
        self._cluster.power_cut(self.name)

    def revive(self) -> None:
        """Switch it on again, with the disk that it had; returns when its services are being started."""
        self._cluster.revive(self.name)

    def cut(self) -> None:
        """Pull its network cable."""
        self._cluster.cut(self.name)

    def heal(self) -> None:
        """Plug its network cable in again."""
        self._cluster.heal(self.name)

    def run(self, *command: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - as subprocess calls it
        """Run a command on it as root and return what it wrote to standard output."""
        return run(self._cluster.node_command(self.name, *command), input=input, check=check)

    def popen(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command on it as root."""
        words = [str(word) for word in self._cluster.node_command(self.name, *command)]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Cluster(ABC):
    """A cluster by its name; `open_cluster` returns the kind that this machine can have.

    What a kind cannot do raises `UnsupportedHereError`, and everything that fails raises `ClusterError`.
    """

    # Completes the sentence "... cannot do that".
    kind: str

    def __init__(self, name: str | None = None) -> None:
        self.name = name or default_name()

    @abstractmethod
    def up(self, say: Callable[[str], None] = say_nothing) -> bool:
        """Bring the cluster up with a control plane and a worker in each zone; False if it is up already.

        If it does not come up, nothing of it is left.
        """

    @abstractmethod
    def down(self) -> None:
        """End it, and leave nothing of it behind. A cluster that is not up, or only half, is no error."""

    @property
    @abstractmethod
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig: an ordinary one, for this machine."""

    @property
    @abstractmethod
    def kubectl_program(self) -> str | Path:
        """The kubectl of the cluster's version."""

    @abstractmethod
    def import_image(self, file: Path) -> None:
        """Give an image to every node, and to every one that comes later, by each name that its archive has for it."""

    def kubectl_command(self, *arguments: str) -> list[str | Path]:
        """Return the command line that runs kubectl against this cluster."""
        return [self.kubectl_program, f"--kubeconfig={self.kubeconfig}", *arguments]

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - as subprocess calls it
        """Run kubectl and return what it wrote to standard output."""
        return run(self.kubectl_command(*arguments), input=input, check=check)

    @property
    def calicoctl_program(self) -> str | Path:
        """The calicoctl of the cluster's version."""
        return "calicoctl"

    def calicoctl(self, *arguments: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess calls it
        """Run calicoctl, which checks what it applies, and return what it wrote to standard output."""
        settings = ["DATASTORE_TYPE=kubernetes", f"KUBECONFIG={self.kubeconfig}"]
        return run(["env", *settings, self.calicoctl_program, *arguments], input=input)

    def status(self) -> str:
        """Return what people want to know about the cluster, in lines."""
        zones = "--label-columns=topology.kubernetes.io/zone"
        nodes = self.kubectl("get", "nodes", zones, "--request-timeout=5s", check=False)
        answer = nodes or "The API server does not answer.\n"
        return f"cluster {self.name}: export KUBECONFIG={self.kubeconfig}\n{answer}"

    def node(self, name: str) -> Node:
        """Return a node by its name: `cp`, `w1` and `w2` are there from the start."""
        return Node(self, name)

    def node_command(self, name: str, *command: str) -> list[str | Path]:
        """Return the command line that runs a command on a node as root."""
        raise self._unsupported("run commands on nodes")

    def power_cut(self, name: str) -> None:
        """End everything on a node at once."""
        raise self._unsupported("cut a node's power")

    def revive(self, name: str) -> None:
        """Switch a node on again after a power cut."""
        raise self._unsupported("switch nodes on")

    def cut(self, name: str) -> None:
        """Pull a node's network cable."""
        raise self._unsupported("cut a node's link")

    def heal(self, name: str) -> None:
        """Plug a node's network cable in again."""
        raise self._unsupported("heal a node's link")

    def cut_zone(self, zone: str) -> None:
        """Cut a zone off from all others and from this machine; within it all goes on."""
        raise self._unsupported("cut a zone off")

    def heal_zone(self, zone: str) -> None:
        """Undo `cut_zone`."""
        raise self._unsupported("heal a zone")

    def add_node(self, name: str, zone: str, *, gvisor: bool = True) -> Node:
        """Add a worker; one without gVisor has neither its programs nor its configuration, and a taint that says so."""
        raise self._unsupported("add nodes")

    def remove_node(self, name: str) -> None:
        """Take a worker away for good, with its disk."""
        raise self._unsupported("remove nodes")

    def pause_api_server(self) -> None:
        """Stop the API server in its tracks: connections stay open and nothing answers."""
        raise self._unsupported("pause its API server")

    def resume_api_server(self) -> None:
        """Undo `pause_api_server`."""
        raise self._unsupported("pause its API server")

    def node_port_url(self, port: int) -> str:
        """Return the address on this machine of a port that a Service has on every node."""
        raise self._unsupported("reach the ports of its nodes")

    def _unsupported(self, what: str) -> UnsupportedHereError:
        return UnsupportedHereError(f"{self.kind} cannot {what}; a cluster of namespaces can: docs/test-cluster.md")
