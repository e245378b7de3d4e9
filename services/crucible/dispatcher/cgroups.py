"""Control groups: memory, CPU and process limits of a sandbox that the kernel itself enforces and counts.

Version 2 where this process may use a subtree of its own (a systemd unit with `Delegate=yes`, a container with its own hierarchy), else
version 1 where this is root. Everything is made below the group that this process is already in, so that whatever bounds the platform
bounds its sandboxes too. Each group is removed with its sandbox, and what a dead instance left behind is removed at the next start.

It never touches a group that it did not make, except to move this process's own group aside as version 2 demands.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crucible import logs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logs.get_logger("cgroups")

# The kernel's own default period for CPU bandwidth.
_CPU_PERIOD_US = 100_000
# Smallest quota that the kernel accepts.
_CPU_QUOTA_MIN_US = 1000
_REMOVE_ATTEMPTS = 200
_REMOVE_PAUSE_S = 0.01
# `crucible-<pid>-<start time>-<count>`: tells whether the instance that made it still lives.
_INSTANCE = re.compile(r"crucible-(?P<pid>[0-9]+)-(?P<started>[0-9]+)-[0-9]+")
# Where version 2 makes us move to, since a group with limits on its children may hold no process itself.
_ASIDE = "crucible-aside"
_counts = itertools.count()


class ControlGroupsUnavailableError(Exception):
    """Control groups cannot be used here; the message says why and what would change it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the kernel counted in a group. None where it does not count."""

    oom_kills: int
    peak_memory_bytes: int | None
    cpu_seconds: float | None


class ControlGroup(Protocol):
    """The group of one sandbox."""

    @property
    def join_files(self) -> Sequence[str]:
        """Files into which a process with one thread writes "0" to join."""

    def limit_cpu(self, millis: int) -> None:
        """Hold all its processes together to so many thousandths of a processor."""

    def oom_kills(self) -> int:
        """Return how often the kernel's memory killer has struck in it."""

    def usage(self) -> Usage:
        """Return what was counted so far."""

    async def remove(self) -> None:
        """Kill what is left in it, and remove it."""


class ControlGroups(Protocol):
    """All groups of this instance."""

    version: int

    def create(self, name: str, *, memory_bytes: int, processes: int) -> ControlGroup:
        """Make a group.

        Raises:
            OSError: the kernel refused.
        """

    async def aclose(self) -> None:
        """Remove what is left of this instance's."""


# --- files ----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _write(path: Path, value: object) -> None:
    # One write, as the kernel wants it; cheaper than opening a text file.
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _keyed(path: Path, key: str) -> int | None:
    """Read one number of a file of `key value` lines."""
    with contextlib.suppress(OSError, ValueError):
        for line in _read(path).splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return None


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(_read(path))
    return None


def _processes(group: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(line) for line in _read(group / "cgroup.procs").split()]
    return []


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Field 22; the second field, in parentheses, may itself hold spaces.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _kill_all(group: Path) -> None:
    for pid in _processes(group):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _removed(group: Path) -> bool:
    """Remove a group of ours if it is empty; otherwise kill what is in it."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        _kill_all(group)
        return False
    return True


async def _remove(group: Path) -> None:
    """Kill what is in a group of ours and remove it. The kernel refuses while an exiting process is still being taken down."""
    for _ in range(_REMOVE_ATTEMPTS):
        if _removed(group):
            return
        await asyncio.sleep(_REMOVE_PAUSE_S)
    log.error("a control group could not be removed", group=str(group), processes=_processes(group))


def _subgroups(base: Path) -> list[Path]:
    return [child for child in base.iterdir() if child.is_dir()] if base.is_dir() else []


async def _remove_tree(base: Path) -> None:
    for child in _subgroups(base):
        await _remove(child)
    await _remove(base)


def _hold(base: Path) -> int:
    """Lock a base group of ours for as long as we live; the kernel lets go when we die. Returns the descriptor to close.

    A process id alone does not tell who is dead: an instance in another PID namespace is invisible, and may share our hierarchy.
    """
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _is_held(base: Path) -> bool:
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _dead_instances(parent: Path) -> Iterable[Path]:
    for entry in parent.iterdir():
        match = _INSTANCE.fullmatch(entry.name)
        if not match or _start_time(int(match["pid"])) == int(match["started"]):
            continue
        with contextlib.suppress(FileNotFoundError):
            if not _is_held(entry):
                yield entry


def _instance_name() -> str:
    return f"crucible-{os.getpid()}-{_start_time(os.getpid())}-{next(_counts)}"


# --- where we are ---------------------------------------------------------------------------------------------------------


def _own_paths(proc: Path) -> dict[str, str]:
    """Return this process's group by controller; version 2 has the empty name."""
    paths = {}
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _mounts(proc: Path) -> dict[str, tuple[str, Path]]:
    """Return, by controller, which part of a hierarchy is mounted where."""
    found: dict[str, tuple[str, Path]] = {}
    for line in (proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = before.split(" ")[3:5]
        if kind == "cgroup2":
            found[""] = (root, Path(point))
        elif kind == "cgroup":
            for option in options.split(","):
                found[option] = (root, Path(point))
    return found


def _own_folder(controller: str, proc: Path) -> Path | None:
    path, mount = _own_paths(proc).get(controller), _mounts(proc).get(controller)
    if path is None or mount is None:
        return None
    root, point = mount
    inside = path.removeprefix(root.rstrip("/")) if root != "/" else path
    return point / inside.lstrip("/")


# --- version 1 ------------------------------------------------------------------------------------------------------------

_V1_NEEDED = ("memory", "pids")
_V1_WANTED = ("cpu", "cpuacct")


class _GroupV1:
    """One folder per hierarchy. Limits are set before anything joins."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        # `tasks` moves the writing thread alone, without the global lock that `cgroup.procs` takes; the writer has one thread.
        self.join_files = [str(folder / "tasks") for folder in dict.fromkeys(folders.values())]

    def limit(self, memory_bytes: int, processes: int) -> None:
        memory = self._folders["memory"]
        _write(memory / "memory.limit_in_bytes", memory_bytes)
        with contextlib.suppress(FileNotFoundError):  # a kernel that does not count swap
            _write(memory / "memory.memsw.limit_in_bytes", memory_bytes)
        _write(self._folders["pids"] / "pids.max", processes)

    def limit_cpu(self, millis: int) -> None:
        if "cpu" in self._folders:
            _write(self._folders["cpu"] / "cpu.cfs_quota_us", max(_CPU_QUOTA_MIN_US, millis * _CPU_PERIOD_US // 1000))

    def oom_kills(self) -> int:
        return _keyed(self._folders["memory"] / "memory.oom_control", "oom_kill") or 0

    def usage(self) -> Usage:
        memory = self._folders["memory"]
        nanoseconds = _number(self._folders["cpuacct"] / "cpuacct.usage") if "cpuacct" in self._folders else None
        return Usage(
            oom_kills=self.oom_kills(),
            peak_memory_bytes=_number(memory / "memory.max_usage_in_bytes"),
            cpu_seconds=None if nanoseconds is None else nanoseconds / 1e9,
        )

    async def remove(self) -> None:
        for folder in dict.fromkeys(self._folders.values()):
            await _remove(folder)


class ControlGroupsV1:
    """Groups in the version 1 hierarchies, for root.

    Raises:
        ControlGroupsUnavailableError: a needed hierarchy is missing or cannot be written.
    """

    version = 1

    def __init__(self, proc: Path = Path("/proc")) -> None:
        parents = {}
        for controller in (*_V1_NEEDED, *_V1_WANTED):
            folder = _own_folder(controller, proc)
            if folder is not None and os.access(folder, os.W_OK):
                parents[controller] = folder
        if missing := [name for name in _V1_NEEDED if name not in parents]:
            raise ControlGroupsUnavailableError(f"no writable version 1 hierarchy for {' and '.join(missing)}")
        self._stale = [dead for parent in {*parents.values()} for dead in _dead_instances(parent)]
        name = _instance_name()
        self._bases = {controller: parent / name for controller, parent in parents.items()}
        self._locks: list[int] = []
        try:
            for base in {*self._bases.values()}:
                base.mkdir()
                self._locks.append(_hold(base))
        except OSError as error:
            raise ControlGroupsUnavailableError(f"no group can be made: {error}") from error

    async def start(self) -> None:
        """Remove what dead instances left."""
        for base in self._stale:
            log.info("removing the control groups of a dead instance", group=str(base))
            await _remove_tree(base)

    def create(self, name: str, *, memory_bytes: int, processes: int) -> ControlGroup:
        """Make a group with its limits set."""
        group = _GroupV1({controller: base / name for controller, base in self._bases.items()})
        for folder in {base / name for base in self._bases.values()}:
            folder.mkdir()
        group.limit(memory_bytes, processes)
        return group

    async def aclose(self) -> None:
        """Remove this instance's groups."""
        for base in {*self._bases.values()}:
            await _remove_tree(base)
        while self._locks:
            os.close(self._locks.pop())


# --- version 2 ------------------------------------------------------------------------------------------------------------

_V2_NEEDED = ("memory", "pids")
_V2_WANTED = ("cpu",)


class _GroupV2:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.join_files = [str(folder / "cgroup.procs")]

    def limit(self, memory_bytes: int, processes: int) -> None:
        _write(self._folder / "memory.max", memory_bytes)
        with contextlib.suppress(FileNotFoundError):
            _write(self._folder / "memory.swap.max", 0)
        _write(self._folder / "pids.max", processes)

    def limit_cpu(self, millis: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # the cpu controller is not handed on everywhere
            quota = max(_CPU_QUOTA_MIN_US, millis * _CPU_PERIOD_US // 1000)
            _write(self._folder / "cpu.max", f"{quota} {_CPU_PERIOD_US}")

    def oom_kills(self) -> int:
        return _keyed(self._folder / "memory.events", "oom_kill") or 0

    def usage(self) -> Usage:
        microseconds = _keyed(self._folder / "cpu.stat", "usage_usec")
        return Usage(
            oom_kills=self.oom_kills(),
            peak_memory_bytes=_number(self._folder / "memory.peak"),
            cpu_seconds=None if microseconds is None else microseconds / 1e6,
        )

    async def remove(self) -> None:
        with contextlib.suppress(OSError):
            _write(self._folder / "cgroup.kill", 1)
        await _remove(self._folder)


def _delegated(folder: Path, path: str) -> bool:
    """Whether the group is ours to divide: systemd says so in an attribute; a container's own hierarchy begins at "/"."""
    if path == "/":
        return True
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


class ControlGroupsV2:
    """Groups in a version 2 subtree that was delegated to this process.

    Raises:
        ControlGroupsUnavailableError: there is no such subtree.
    """

    version = 2

    def __init__(self, proc: Path = Path("/proc")) -> None:
        own = _own_folder("", proc)
        if own is None:
            raise ControlGroupsUnavailableError("no version 2 hierarchy is mounted")
        path = _own_paths(proc)[""]
        if own.name == _ASIDE:
            own, path = own.parent, str(Path(path).parent)
        if not _delegated(own, path) or not os.access(own, os.W_OK):
            raise ControlGroupsUnavailableError(
                f"{own} is not delegated to this process; start it with `systemd-run --user --scope -p Delegate=yes ...`"
            )
        try:
            self._divide(own)
            self._stale = list(_dead_instances(own))
            self._base = own / _instance_name()
            self._base.mkdir()
            self._lock: int | None = _hold(self._base)
            self._hand_on(self._base)
        except OSError as error:
            raise ControlGroupsUnavailableError(f"{own} cannot be divided: {error}") from error

    def _divide(self, own: Path) -> None:
        available = _read(own / "cgroup.controllers").split()
        if missing := [name for name in _V2_NEEDED if name not in available]:
            raise ControlGroupsUnavailableError(f"{own} lacks the controllers {' and '.join(missing)}")
        try:
            self._hand_on(own)
        except OSError:
            # The kernel's "no internal processes" rule: step aside, with everyone who shares the group.
            aside = own / _ASIDE
            aside.mkdir(exist_ok=True)
            for pid in _processes(own):
                with contextlib.suppress(ProcessLookupError):
                    _write(aside / "cgroup.procs", pid)
            self._hand_on(own)

    def _hand_on(self, group: Path) -> None:
        available = _read(group / "cgroup.controllers").split()
        wanted = [name for name in (*_V2_NEEDED, *_V2_WANTED) if name in available]
        _write(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in wanted))

    async def start(self) -> None:
        """Remove what dead instances left."""
        for base in self._stale:
            log.info("removing the control groups of a dead instance", group=str(base))
            await _remove_tree(base)

    def create(self, name: str, *, memory_bytes: int, processes: int) -> ControlGroup:
        """Make a group with its limits set."""
        folder = self._base / name
        folder.mkdir()
        group = _GroupV2(folder)
        group.limit(memory_bytes, processes)
        return group

    async def aclose(self) -> None:
        """Remove this instance's groups."""
        await _remove_tree(self._base)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


async def open_control_groups(proc: Path = Path("/proc")) -> ControlGroupsV1 | ControlGroupsV2:
    """Return what this machine offers, with the leftovers of dead instances removed.

    Raises:
        ControlGroupsUnavailableError: neither version can be used; the message says why of each.
    """
    groups: ControlGroupsV1 | ControlGroupsV2
    try:
        groups = ControlGroupsV2(proc)
    except ControlGroupsUnavailableError as second:
        try:
            groups = ControlGroupsV1(proc)
        except ControlGroupsUnavailableError as first:
            raise ControlGroupsUnavailableError(f"version 2: {second}; version 1: {first}") from first
    await groups.start()
    return groups
