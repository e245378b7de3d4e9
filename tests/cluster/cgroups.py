"""Where a cluster's processes are accounted for: one cgroup per cluster, and in it one per node, under either version.

A cluster's cgroup is also the list of its processes: what is in it is what `down` ends, whatever else is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.processes import wait_for

ROOT = Path("/sys/fs/cgroup")
PARENT = "crucible-cluster"
# On the host: the network between the nodes, and the relays into it.
OUTSIDE = "outside"
V1_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd")
V2_CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")


def version(root: Path = ROOT) -> int:
    """Return which version of the interface this machine has; a mixed one is version 1."""
    return 2 if (root / "cgroup.controllers").exists() else 1


def why_unusable(root: Path = ROOT) -> str | None:
    """Return why cgroups cannot be made here, or None if they can."""
    if version(root) == 2:
        has = (root / "cgroup.controllers").read_text(encoding="ascii").split()
        missing = [name for name in V2_CONTROLLERS if name not in has]
        probed = root
    else:
        missing = [name for name in V1_CONTROLLERS if not (root / name).is_dir()]
        probed = root / "memory"
    if missing:
        return f"{root} lacks the cgroup controllers {', '.join(missing)}"
    probe = probed / f"crucible-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made in {probed}: {error.strerror}"
    return None


class Cgroup:
    """The cgroup of a cluster, of one of its nodes, or of what runs outside of the nodes."""

    def __init__(self, *path: str, root: Path = ROOT) -> None:
        self._root = root
        self._version = version(root)
        self._path = (PARENT, *path)

    @property
    def _tops(self) -> list[Path]:
        return [self._root] if self._version == 2 else [self._root / name for name in V1_CONTROLLERS]

    @property
    def _folders(self) -> list[Path]:
        return [top.joinpath(*self._path) for top in self._tops]

    @property
    def procs_files(self) -> list[Path]:
        """The files that a process writes its number to in order to be in this cgroup."""
        return [folder / "cgroup.procs" for folder in self._folders]

    def make(self) -> None:
        """Make it, with every controller; nothing happens if it is there already."""
        for top in self._tops:
            folder = top
            for name in self._path:
                if self._version == 2:
                    _hand_on(folder)
                folder /= name
                folder.mkdir(exist_ok=True)
                if top.name == "cpuset":
                    _inherit_cpuset(folder)

    def move_into(self, inner: Cgroup) -> None:
        """Have the processes that are in it in a cgroup right below it, which it makes; what they start will be there too.

        A machine's own services are so in `system.slice`: what a kubelet makes beside it shares the processors with all of them
        together, not with each of their threads. Version 2 limits what is in a cgroup only if no process is in it directly.
        """
        for mine, its in zip(self._folders, inner._folders, strict=True):
            its.mkdir(exist_ok=True)
            if self._version == 1 and its.is_relative_to(self._root / "cpuset"):
                _inherit_cpuset(its)
            wait_for(partial(_move_all, mine, its), seconds=10, what=f"the processes of {mine} to move to {its}")
        if self._version == 2:
            _hand_on(self._folders[0])

    def pids(self) -> set[int]:
        """Return the processes in it and in the cgroups below."""
        found: set[int] = set()
        listed = self._folders[0] if self._version == 2 else self._root.joinpath("pids", *self._path)
        for folder, _, _ in os.walk(listed):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in Path(folder, "cgroup.procs").read_text(encoding="ascii").split()}
        # A process of another PID namespace than ours reads as 0.
        return found - {0, os.getpid()}

    def kill(self) -> None:
        """End every process in it at once, and wait until they are gone."""

        def gone() -> bool:
            pids = self.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_for(gone, seconds=30, what=f"the processes of {'/'.join(self._path)} to end")

    def remove(self) -> None:
        """Remove it and the cgroups below; its processes must have ended."""
        for folder in self._folders:
            for child, _, _ in os.walk(folder, topdown=False):
                _remove(Path(child))

    def remove_parent_if_empty(self) -> None:
        """Remove what all clusters have in common, if this was the last."""
        for top in self._tops:
            with contextlib.suppress(OSError):
                (top / PARENT).rmdir()


def _move_all(source: Path, target: Path) -> bool:
    """Move the processes of a cgroup; tells whether none was left. One that starts others meanwhile is caught the next time."""
    pids = (source / "cgroup.procs").read_text(encoding="ascii").split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (target / "cgroup.procs").write_text(pid, encoding="ascii")
    return not pids


def _hand_on(folder: Path) -> None:
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in V2_CONTROLLERS), encoding="ascii")


def _inherit_cpuset(folder: Path) -> None:
    """Give a v1 cpuset its parent's processors and memory: it starts with none, and takes no process in."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (folder / name).read_text(encoding="ascii").strip():
            (folder / name).write_text((folder.parent / name).read_text(encoding="ascii"), encoding="ascii")


def _remove(folder: Path) -> None:
    def removed() -> bool:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            # The kernel is still letting go of processes that have ended.
            return False
        return True

    try:
        wait_for(removed, seconds=10, what=f"the cgroup {folder} to be empty")
    except ClusterError as error:
        raise ClusterError(f"{error}: something still runs in it") from None
