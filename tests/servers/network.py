"""Where the nodes of a cluster live: each in a network of its own that it can be cut off from, or on loopback without root.

With a network each, a node has two interfaces: one to its peers and one to clients, each ending in a bridge on this machine.
To cut nodes off is to move the peers' interfaces to another bridge and to take the clients' ones off theirs: packets then
vanish in silence, as they do when a cable is pulled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

# RFC 2544 sets 198.18.0.0/15 aside for tests between networks of one's own; nothing on the internet has such an address.
_CLIENTS = "198.18.{subnet}.{host}"
_PEERS = "198.19.0.{host}"
_LOOPBACK = "127.18.{subnet}.{host}"
_HOST = 254
# Below the ports that the kernel hands out.
_LOOPBACK_PORTS = 20_000
# What ip(8) shows of this machine, by the process that made it: cr<pid>-<cluster><role><node>, within 15 characters.
_OWN_NAME = re.compile(r"cr(?P<pid>\d+)-\d+[a-z]\d*")
_PEER_BRIDGE, _ISLAND_BRIDGE, _CLIENT_BRIDGE, _PEER_END, _CLIENT_END = "b", "i", "d", "p", "c"

_cluster_numbers = itertools.count()


class NetworkUnavailableError(Exception):
    """This machine lets nobody make networks, or not this user."""


class Network(Protocol):
    """Addresses for the nodes 1, 2, ... of one cluster."""

    own_namespaces: bool
    # Where Erlang's epmd tells nodes each other's ports.
    names_port: int

    def client_address(self, node: int) -> str:
        """Return where clients reach a node."""

    def peer_address(self, node: int) -> str:
        """Return where the other nodes reach a node."""

    def peer_port(self, node: int) -> int:
        """Return at which port they do."""

    def connect(self, node: int, pid: int) -> None:
        """Give the process that a node has just become its interfaces."""

    def cut_off(self, nodes: Collection[int], *, clients: bool) -> None:
        """Part these nodes from the others and, if `clients`, from everyone; among themselves they still talk."""

    def heal(self) -> None:
        """Undo every cut."""

    def close(self) -> None:
        """Leave nothing behind."""


def _run_ip(*commands: str, namespace_of: int | None = None) -> str:
    """Run commands of ip(8) in one process, in the network of another process if one is given.

    Raises:
        NetworkUnavailableError: one of them was refused.
    """
    enter = [] if namespace_of is None else ["nsenter", "--target", str(namespace_of), "--net"]
    try:
        done = subprocess.run(
            [*enter, "ip", "-json", "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError as error:
        raise NetworkUnavailableError(f"ip(8) is missing, install iproute2: {error}") from None
    if done.returncode != 0:
        raise NetworkUnavailableError(f"{'; '.join(commands)}: {done.stderr.strip()}")
    return done.stdout


def _mac(host: int) -> str:
    return f"02:00:00:00:00:{host:02x}"


def own_links() -> dict[str, int]:
    """Return the interfaces on this machine that are of this module's making, each with its maker's process id."""
    links = [link["ifname"] for link in json.loads(_run_ip("link show"))]
    return {name: int(match["pid"]) for name in links if (match := _OWN_NAME.fullmatch(name))}


def _remove_leftovers() -> None:
    """Remove what programs left behind that were killed."""
    for name, pid in own_links().items():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            # The other end of a pair goes with the first.
            with contextlib.suppress(NetworkUnavailableError):
                _run_ip(f"link del {name}")
        except PermissionError:
            pass


class _Subnet:
    """A number that no other cluster on this machine has, held for as long as the program lives or until it is closed."""

    def __init__(self) -> None:
        for number in range(1, 255):
            self._held = socket.socket(socket.AF_UNIX)
            try:
                # An abstract name is one per network namespace, and goes when its holder goes.
                self._held.bind(f"\0crucible-test-servers-{number}")
            except OSError:
                self._held.close()
            else:
                self.number = number
                return
        raise NetworkUnavailableError("254 clusters run on this machine already")

    def close(self) -> None:
        self._held.close()


class LoopbackNetwork:
    """All nodes on this machine's loopback interface, each at an address of its own. They cannot be cut off."""

    own_namespaces = False

    def __init__(self) -> None:
        self._subnet = _Subnet()
        # Erlang's own ports serve a whole machine, whatever the address: each cluster has others.
        self._ports = _LOOPBACK_PORTS + 10 * self._subnet.number
        self.names_port = self._ports

    def client_address(self, node: int) -> str:
        """Return where clients reach a node."""
        return _LOOPBACK.format(subnet=self._subnet.number, host=node)

    peer_address = client_address

    def peer_port(self, node: int) -> int:
        """Return at which port they do."""
        return self._ports + node

    def connect(self, node: int, pid: int) -> None:
        """Do nothing: the node has the machine's own network."""

    def cut_off(self, nodes: Collection[int], *, clients: bool) -> None:
        """Raise, always."""
        raise NetworkUnavailableError(
            "nodes on loopback cannot be cut off: mark the test @needs('network namespaces'), which root has"
        )

    def heal(self) -> None:
        """Do nothing: nothing is ever cut."""

    def close(self) -> None:
        """Let another cluster have the addresses."""
        self._subnet.close()


class NamespaceNetwork:
    """Each node in a network namespace of its own. The namespace lives in the node's processes and ends with them."""

    own_namespaces = True
    names_port = 4369

    def __init__(self) -> None:
        _remove_leftovers()
        self._subnet = _Subnet()
        self._prefix = f"cr{os.getpid()}-{next(_cluster_numbers)}"
        self._connected: set[int] = set()
        bridges = [self._link(role) for role in (_PEER_BRIDGE, _ISLAND_BRIDGE, _CLIENT_BRIDGE)]
        try:
            _run_ip(
                # An address of its own: it would otherwise take one of its ports', and another when that port goes.
                *(f"link add {bridge} address {_mac(_HOST)} type bridge" for bridge in bridges),
                *(f"link set {bridge} up" for bridge in bridges),
                f"addr add {self.client_address(_HOST)}/24 dev {self._link(_CLIENT_BRIDGE)}",
            )
        except NetworkUnavailableError:
            self.close()
            raise

    def _link(self, role: str, node: int | None = None) -> str:
        return f"{self._prefix}{role}{'' if node is None else node}"

    def client_address(self, node: int) -> str:
        """Return where clients reach a node."""
        return _CLIENTS.format(subnet=self._subnet.number, host=node)

    def peer_address(self, node: int) -> str:
        """Return where the other nodes reach a node."""
        return _PEERS.format(host=node)

    def peer_port(self, node: int) -> int:
        """Return at which port they do, the same for all: RabbitMQ's own."""
        return 25672

    def connect(self, node: int, pid: int) -> None:
        """Give the process that a node has just become its interfaces."""
        peer, client = self._link(_PEER_END, node), self._link(_CLIENT_END, node)
        # The same in each of its lives, as a machine's is: the others remember it for half a minute.
        mac = _mac(node)
        # The kernel removes those of the node's earlier life in its own time.
        self._delete({peer, client})
        _run_ip(
            f"link add {peer} type veth peer name peers address {mac} netns {pid}",
            f"link add {client} type veth peer name clients address {mac} netns {pid}",
            f"link set {peer} master {self._link(_PEER_BRIDGE)} up",
            f"link set {client} master {self._link(_CLIENT_BRIDGE)} up",
        )
        # Not `lo`: bubblewrap brings it up at this very moment, and fails where that is done already.
        _run_ip(
            f"addr add {self.peer_address(node)}/24 dev peers",
            f"addr add {self.client_address(node)}/24 dev clients",
            "link set peers up",
            "link set clients up",
            namespace_of=pid,
        )
        self._connected.add(node)

    def cut_off(self, nodes: Collection[int], *, clients: bool) -> None:
        """Part these nodes from the others and, if `clients`, from everyone; among themselves they still talk."""
        for node in nodes:
            _run_ip(f"link set {self._link(_PEER_END, node)} master {self._link(_ISLAND_BRIDGE)}")
            if clients:
                _run_ip(f"link set {self._link(_CLIENT_END, node)} nomaster")

    def heal(self) -> None:
        """Undo every cut."""
        for node in self._connected:
            for end, bridge in ((_PEER_END, _PEER_BRIDGE), (_CLIENT_END, _CLIENT_BRIDGE)):
                self._for_existing({self._link(end, node)}, f"link set {{}} master {self._link(bridge)}")

    def _delete(self, names: set[str]) -> None:
        self._for_existing(names, "link del {}")

    @staticmethod
    def _for_existing(names: set[str], command: str) -> None:
        """Run a command for each of these that exists; those of a node that was killed go at any moment."""
        for name in names & own_links().keys():
            try:
                _run_ip(command.format(name))
            except NetworkUnavailableError:
                if name in own_links():
                    raise

    def close(self) -> None:
        """Leave nothing behind."""
        self._delete({name for name in own_links() if name.startswith(self._prefix)})
        self._subnet.close()


def make_network() -> Network:
    """Return a network for one cluster: namespaces as root where the kernel has them, otherwise loopback."""
    return LoopbackNetwork() if why_no_namespaces() else NamespaceNetwork()


def why_no_namespaces() -> str | None:
    """Return why nodes cannot have networks of their own on this machine, or None where they can."""
    if os.geteuid() != 0:
        return f"running as uid {os.geteuid()}"
    name = f"cr{os.getpid()}-0x"
    try:
        _run_ip(f"link add {name} type bridge", f"link del {name}")
    except NetworkUnavailableError as error:
        return str(error)
    return None
