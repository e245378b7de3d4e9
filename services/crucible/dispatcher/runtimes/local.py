"""What the runtimes that start processes on this machine share: host users, control groups, and the runner's arguments."""

from __future__ import annotations

import asyncio
import heapq
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from crucible import logs
from crucible.dispatcher.cgroups import ControlGroupsUnavailableError, open_control_groups
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.quantity import GIB

if TYPE_CHECKING:
    from crucible.dispatcher.cgroups import ControlGroup, ControlGroups
    from crucible.dispatcher.runtimes import SandboxSpec
    from crucible.limits import Limits
    from crucible.settings import DispatcherSettings

log = logs.get_logger("runtime")

# Host users for sandboxes when the platform is root: from the range that systemd's UIDS-GIDS document lists as unused.
_HOST_IDS = range(1_879_048_192, 1_879_048_192 + 65_536)
_NOBODY = 65534
# Without a control group: room for what a process maps but does not use, such as thread stacks and allocator arenas.
_ADDRESS_SPACE_EXTRA = 4 * GIB
# From this version on the kernel counts RLIMIT_NPROC per user namespace (commit 21d1c5e386bc), so that sandboxes do not share a count.
_PER_NAMESPACE_COUNTS = (5, 14)


def limits_by(groups: ControlGroups | None) -> str:
    """Say what holds memory, CPU and process limits."""
    return f"control groups version {groups.version}" if groups else "the runner's own watch"


class HostIds:
    """Hands out host users to sandboxes, a different one to each, if the platform is root; else sandboxes share its user.

    Args:
        root: whether the platform may become another user.
        uid_map: content of `/proc/self/uid_map`; empty where every id exists.
    """

    def __init__(self, *, root: bool, uid_map: str) -> None:
        self._root = root
        self._distinct = not uid_map or _mapped(_HOST_IDS, uid_map)
        self._free: list[int] = []
        self._next = _HOST_IDS.start

    @classmethod
    def here(cls) -> HostIds:
        """Return the users of this machine."""
        path = Path("/proc/self/uid_map")
        return cls(root=os.geteuid() == 0, uid_map=path.read_text() if path.exists() else "")

    def take(self) -> int | None:
        """Return a user id, or None to stay who we are."""
        if not self._root:
            return None
        if not self._distinct:
            return _NOBODY
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, user: int | None) -> None:
        """Return a user id for another sandbox."""
        if user is not None and self._distinct:
            heapq.heappush(self._free, user)


def _mapped(ids: range, uid_map: str) -> bool:
    """Whether all ids exist in our user namespace; in a rootless container few do."""
    for line in uid_map.splitlines():
        first, _, count = (int(part) for part in line.split())
        if first <= ids.start and ids.stop <= first + count:
            return True
    return False


async def open_groups(settings: DispatcherSettings) -> ControlGroups | None:
    """Return the control groups to use, or None to do without.

    Raises:
        RuntimeUnavailableError: they are required and cannot be used.
    """
    if settings.cgroups == "off":
        return None
    try:
        return await open_control_groups()
    except ControlGroupsUnavailableError as error:
        if settings.cgroups == "require":
            raise RuntimeUnavailableError(
                f"control groups are required and cannot be used: {error}",
                "run as root, or under `systemd-run --user --scope -p Delegate=yes`, or set CRUCIBLE_DISPATCHER__CGROUPS=auto",
            ) from error
        log.warning("memory, CPU and process limits are best effort: no control groups", why=str(error))
    return None


def make_group(
    groups: ControlGroups | None, spec: SandboxSpec, limits: Limits, *, own_processes: int
) -> ControlGroup | None:
    """Make the control group of a sandbox, or None where there are none; `own_processes` are ours and not the code's.

    Raises:
        OSError: the kernel refused.
    """
    if groups is None:
        return None
    return groups.create(
        spec.name, memory_bytes=spec.resources.memory_bytes, processes=limits.processes + own_processes
    )


def dispose(group: ControlGroup | None) -> None:
    """Remove the control group of a sandbox that never began, without waiting for it."""
    if group is not None:
        task = asyncio.ensure_future(group.remove())
        task.add_done_callback(lambda done: done.exception())


def process_limit(limits: Limits, *, own_namespace: bool) -> int:
    """Return what RLIMIT_NPROC must be for a sandbox to have its number of processes; 0 for no such limit.

    The kernel counts a user's processes, and where sandboxes have no user of their own, that may be hundreds of someone else's.
    """
    release = platform.release().split("-")[0].split(".")
    counted_alone = own_namespace and tuple(int(part) for part in release[:2]) >= _PER_NAMESPACE_COUNTS
    # One more, since the runner is the same user's and counts too.
    return limits.processes + 1 if counted_alone or os.geteuid() == 0 else 0


def runner_arguments(
    spec: SandboxSpec,
    limits: Limits,
    settings: DispatcherSettings,
    *,
    channel: int,
    code: str,
    packages: str,
    processes: int,
    memory_folders: str | None,
) -> list[str]:
    """Return the runner's arguments.

    Args:
        spec: what to run.
        limits: what it may use.
        settings: for the grace.
        channel: descriptor for frames and commands.
        code: path of the code, as the runner sees it.
        packages: path of extra packages, or empty.
        processes: RLIMIT_NPROC.
        memory_folders: folders whose files count as memory; None if the kernel bounds the memory and the runner need not watch.
    """
    longest = spec.timeout_seconds + settings.deadline_grace_seconds
    arguments: dict[str, object] = {
        "frames": channel,
        "commands": channel,
        "code": code,
        "packages": packages,
        "timeout_ms": spec.timeout_seconds * 1000,
        "output_bytes": limits.output_bytes,
        "processes": processes,
        "open_files": limits.open_files,
        "file_bytes": limits.tmp_bytes,
        # Backs up the wall clock, should the runner ever miss it: no process can have used more when that has passed.
        "cpu_seconds": int(longest * (os.cpu_count() or 1)) + 1,
    }
    if memory_folders is not None:
        arguments["memory_bytes"] = spec.resources.memory_bytes
        arguments["memory_folders"] = memory_folders
        if sys.platform == "linux":
            arguments["address_space"] = 2 * spec.resources.memory_bytes + _ADDRESS_SPACE_EXTRA
    return [f"{name}={value}" for name, value in arguments.items()]
