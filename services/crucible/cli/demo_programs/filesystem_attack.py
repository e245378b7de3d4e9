"""Reads and writes where it must not, and ends well only if each attempt was refused.

Standard input names paths of the host, one a line: what the platform keeps there must be out of reach.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial

READ = [
    "/etc/shadow",
    "/root/.bashrc",
    "/root/.ssh/id_rsa",
    "/proc/1/root/etc/shadow",
    "/proc/kcore",
    "/dev/sda",
    "/dev/mem",
]
WRITE = [
    "/escaped",
    "/etc/escaped",
    "/usr/escaped",
    "/usr/bin/python3",
    "/code/main.py",
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/cgroup.procs",
]

refused: list[str] = []
succeeded: list[str] = []


def attempt(label: str, action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, ValueError) as error:
        refused.append(f"{label}: {error}")
    else:
        succeeded.append(label)


def read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def write(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"# escaped\n")


def mount() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def foreign_processes() -> None:
    """Fail unless some process is to be seen that is neither the sandbox's first, nor ours."""
    numbers = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid(), os.getppid()}
    if not numbers:
        raise OSError("no process but the sandbox's own")


host_paths = [line.strip() for line in sys.stdin if line.strip()]
for path in [*READ, *host_paths]:
    attempt(f"read {path}", partial(read, path))
for path in [*WRITE, *host_paths]:
    attempt(f"write {path}", partial(write, path))
attempt("mount a file system", mount)
attempt("make a device", lambda: os.mknod("/tmp/device", 0o60600, os.makedev(8, 0)))
attempt("become root", lambda: os.setuid(0) if os.getuid() else os.setgroups([0]))
attempt("leave the root", lambda: os.chroot("/proc/1/root"))
attempt("see other processes", foreign_processes)

for label in refused:
    print("refused   ", label)
for label in succeeded:
    print("SUCCEEDED ", label)
with open("/tmp/allowed", "w") as file:
    file.write("what /tmp is for")
sys.exit(1 if succeeded else 0)
