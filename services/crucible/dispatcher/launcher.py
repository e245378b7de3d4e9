"""The process that starts sandboxes for the dispatcher, and outlives none of them.

Executed by path (`python -I -S launcher.py FD`), standard library alone. The dispatcher is large, threaded and runs an event loop: forking
it costs milliseconds per evaluation, and what must happen between fork and exec (joining a control group, giving up root) is not safe
there. This process is small and single-threaded and does nothing else. As the parent of every sandbox's first process it also sees to
it that nothing stays: whatever is orphaned to it is killed, and when the dispatcher is gone, for whatever reason, so is everything.

It speaks length-prefixed JSON over the socket whose descriptor it is given: `keep` (descriptors to hold for all launches), `stage` (folders to
make reachable), `launch`, `kill`; it answers `staged`, `started`, `ended`. It must not decide anything: what to run, as whom and where comes from the dispatcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any

LINUX = sys.platform == "linux"
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS = 0x00020000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_SLAVE = 2, 4, 4096, 16384, 1 << 19
# Where staged folders appear, in this process's own view of the file system only.
STAGE = "/tmp"  # noqa: S108 - covered by a file system of our own
MAX_DESCRIPTORS = 32
# Above every descriptor that a launch asks for, so that moving one never overwrites another.
PARKING = 100
EXEC_FAILED = 127
# Orphans are killed at once; they are looked for again until none is left.
SWEEP_SECONDS = 0.005
# Ignored here, since the dispatcher decides when to end; Python ignores the last two by itself. A sandbox starts with the defaults.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESTORED = (*IGNORED, signal.SIGPIPE, signal.SIGXFSZ)


class PeerGoneError(Exception):
    """The dispatcher has closed its end."""


def receive(peer: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read one message and the descriptors that came with it."""
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    header, descriptors, _, _ = socket.recv_fds(peer, 4, MAX_DESCRIPTORS, flags)
    data = header + _exactly(peer, 4 - len(header))
    return json.loads(_exactly(peer, int.from_bytes(data, "big"))), descriptors


def _exactly(peer: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = peer.recv(size)
        if not part:
            raise PeerGoneError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def arrange(wanted: dict[int, int]) -> None:
    """Give each descriptor its number; everything else is closed by exec."""
    for number, descriptor in wanted.items():
        os.dup2(descriptor, PARKING + number, inheritable=False)
    for number in wanted:
        os.dup2(PARKING + number, number, inheritable=True)


def become(request: dict[str, Any], descriptors: dict[int, int], program: int | str) -> None:
    """In the forked child: join the control groups, give up root, and turn into the sandbox. Never returns."""
    try:
        for number in RESTORED:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.setsid()
        for path in request["groups"]:
            # "0" is the writer itself. Written by a process with one thread, which spares the kernel its global lock.
            with open(path, "w") as file:  # noqa: PTH123 - this process imports as little as it can
                file.write("0")
        if isinstance(program, int):
            program = os.dup2(program, PARKING - 1, inheritable=False)
        arrange(descriptors)
        if request["user"] is not None:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        if request["folder"]:
            os.chdir(request["folder"])
        os.execve(program, request["argv"], request["environment"])  # noqa: S606 - without a shell is the point
    except BaseException as error:  # noqa: BLE001 - whatever it was, this process must not go on as a second launcher
        os.write(2, f"the sandbox could not be started: {type(error).__name__}: {error}\n".encode())
    os._exit(EXEC_FAILED)


def call(name: str, *arguments: object) -> None:
    """Call a C function that answers 0 or sets errno."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def stage(folders: list[str]) -> None:
    """Make folders reachable as `/tmp/0`, `/tmp/1`, ... for users who may not pass through the folders above them, such as /root.

    Only in this process and what it starts: it gets a view of the file system of its own.
    """
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, MS_REC | MS_SLAVE, None)
    # Opened before /tmp is covered, since they may be in it, and after the unshare, since a mount binds only what is in its own view.
    opened = [os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for folder in folders]
    call("mount", b"crucible", STAGE.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755,size=64k")
    for place, descriptor in enumerate(opened):
        target = f"{STAGE}/{place}"
        os.mkdir(target)  # noqa: PTH102 - this process imports as little as it can
        call("mount", f"/proc/self/fd/{descriptor}".encode(), target.encode(), None, MS_BIND | MS_REC, None)
        os.close(descriptor)


class Launcher:
    """All sandboxes of one dispatcher."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._kept: dict[str, int] = {}
        self._heads: dict[int, int] = {}
        self._ending: dict[int, int] = {}

    def run(self) -> None:
        """Serve until the dispatcher is gone, then end everything."""
        woken, wake = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poller = select.poll()
        poller.register(self._peer, select.POLLIN)
        poller.register(woken, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poller.poll(SWEEP_SECONDS * 1000 if self._ending else None):
                    if descriptor == woken:
                        os.read(woken, 4096)
                    else:
                        self._obey(*receive(self._peer))
                self._reap()
        except (PeerGoneError, OSError):
            self._end_everything()

    def _tell(self, **message: Any) -> None:
        data = json.dumps(message).encode()
        self._peer.sendall(len(data).to_bytes(4, "big") + data)

    def _obey(self, request: dict[str, Any], descriptors: list[int]) -> None:
        match request["do"]:
            case "keep":
                self._kept.update(zip(request["names"], descriptors, strict=True))
            case "stage":
                try:
                    stage(request["folders"])
                except OSError as error:
                    self._tell(what="staged", error=str(error))
                else:
                    self._tell(what="staged", error=None)
            case "launch":
                self._launch(request, descriptors)
            case "kill":
                for pid, number in self._heads.items():
                    if number == request["number"]:
                        os.kill(pid, signal.SIGKILL)

    def _launch(self, request: dict[str, Any], received: list[int]) -> None:
        wanted = dict(zip(request["sent"], received, strict=True))
        opened = []
        for number, name in request["reopened"].items():
            # What is read from the start needs a position of its own: a fresh open file, not another name for the kept one.
            opened.append(os.open(f"/proc/self/fd/{self._kept[name]}", os.O_RDONLY | os.O_CLOEXEC))
            wanted[int(number)] = opened[-1]
        program = request["program"]
        pid = os.fork()
        if pid == 0:
            become(request, wanted, self._kept.get(program, program))
        self._heads[pid] = request["number"]
        for descriptor in (*received, *opened):
            os.close(descriptor)
        self._tell(what="started", number=request["number"], pid=pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                break
            number = self._heads.pop(pid, None)
            if number is not None:
                self._ending[number] = status
        # An end is told when nothing of any ended sandbox can be left, so that "ended" means that no process remains.
        if self._ending and not self._sweep():
            for number, status in self._ending.items():
                self._tell(what="ended", number=number, status=status)
            self._ending.clear()

    def _sweep(self) -> bool:
        """Kill whatever was orphaned to this process: its sandbox has lost its head. Whether there was anything."""
        strangers = [pid for pid in self._children() if pid not in self._heads]
        for pid in strangers:
            os.kill(pid, signal.SIGKILL)
        return bool(strangers)

    def _children(self) -> list[int]:
        if not LINUX:
            return []
        pid = os.getpid()
        try:
            with open(f"/proc/self/task/{pid}/children") as file:  # noqa: PTH123 - this process imports as little as it can
                return [int(child) for child in file.read().split()]
        except OSError:  # a kernel without CONFIG_PROC_CHILDREN
            return []

    def _end_everything(self) -> None:
        for pid in self._heads:
            os.kill(pid, signal.SIGKILL)
        while True:
            try:
                pid, _ = os.waitpid(-1, 0)
            except ChildProcessError:
                return
            self._heads.pop(pid, None)
            self._sweep()


def main() -> None:
    """Serve on the socket whose descriptor is the only argument."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # No terminal and no process group of anyone else's can send a signal here.
    os.setsid()
    if LINUX:
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    Launcher(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main()
