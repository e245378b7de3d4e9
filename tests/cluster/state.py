"""What a cluster is made of at the moment, in one file of its folder, and the lock under which it changes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tests.cluster.errors import ClusterError
from tests.cluster.processes import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


@dataclass
class NodeState:
    """A node, running or not."""

    name: str
    zone: str
    number: int
    gvisor: bool
    control_plane: bool = False
    # Its PID 1; none while its power is cut.
    init: ProcessId | None = None
    # The archives that it was given.
    images: list[str] = field(default_factory=list)


@dataclass
class State:
    """A cluster that is up, or half up or down."""

    tools: str
    api_port: int
    fabric: ProcessId
    boot_id: str
    complete: bool = False
    nodes: dict[str, NodeState] = field(default_factory=dict)
    # By the port that all nodes listen on: the port on this machine.
    node_ports: dict[int, int] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)


def cache_folder() -> Path:
    """Return where everything is kept that can be made again."""
    if named := os.environ.get("CRUCIBLE_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "crucible"


def boot_id() -> str:
    """Return what tells this run of the machine from every other."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _is_file(opened: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


class Home:
    """The folder of a cluster."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ClusterError(f"{name!r} cannot name a cluster: at most 32 of a-z, 0-9 and - between them")
        self.path = cache_folder() / "clusters" / name
        self._lock_file = self.path.with_name(f"{name}.lock")
        self._state_file = self.path / "state.json"

    @staticmethod
    def owns(kubeconfig: str) -> bool:
        """Whether this is the kubeconfig of a cluster that this tool made, as `up` says to export it."""
        return Path(kubeconfig).absolute().is_relative_to(cache_folder() / "clusters")

    @property
    def pki(self) -> Path:
        """Where the certificates are."""
        return self.path / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for this machine."""
        return self.path / "kubeconfig"

    @property
    def log(self) -> Path:
        """Where what runs outside of the nodes writes to."""
        return self.path / "outside.log"

    def node(self, name: str) -> Path:
        """Return the folder of a node."""
        return self.path / "nodes" / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from changing the cluster. The lock's file goes when the cluster does."""
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._lock_file.open("w", encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_file(lock, self._lock_file):
                    # Who had it before has ended the cluster.
                    continue
                try:
                    yield
                finally:
                    if not self.path.exists():
                        self._lock_file.unlink()
                return

    def load(self) -> State | None:
        """Return the cluster's state, or None if it was never brought up, or in an earlier run of the machine."""
        try:
            raw: dict[str, Any] = json.loads(self._state_file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        if raw["boot_id"] != boot_id():
            return None
        nodes = {
            name: NodeState(**{**node, "init": ProcessId(**node["init"]) if node["init"] else None})
            for name, node in raw.pop("nodes").items()
        }
        fabric = ProcessId(**raw.pop("fabric"))
        ports = {int(port): on_host for port, on_host in raw.pop("node_ports").items()}
        return State(fabric=fabric, nodes=nodes, node_ports=ports, **raw)

    def save(self, state: State) -> None:
        """Write the state, whole or not at all."""
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(state), indent=1), encoding="ascii")
        partial.replace(self._state_file)
