"""Starts `crucible` commands by forking a process that has imported everything already, which spares each start 1.5 s of processor time.

    process = start_crucible("serve", "storage", environment={...}, stderr=log)
    process.kill()

What runs is the same `main` in a process of its own, with its own environment, arguments and standard streams; only the time that its
imports take is gone. Tests that start many services use it. Tests of the command line itself start it as a person does.

The forking process is a program of its own (`python -m tests.support.preloaded FD`), which holds nothing of the tests' but one socket, and
ends when that closes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_BYTES = 1024 * 1024
_STANDARD_STREAMS = 3


class PreloadedProcess:
    """A command that was started; the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        # Ended and reaped already: then its status waits in the pipe.
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return the exit code as `Popen` gives it, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it runs still after so many seconds.
        """
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(f"crucible (process {self.pid})", timeout or 0)
            told = os.read(self._status, 16)
            assert told, "the process that starts commands has ended"
            self.returncode = int(told)
            os.close(self._status)
            if self._handle is not None:
                os.close(self._handle)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        if self.poll() is None and self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _starter() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    return ours, program


def start_crucible(
    *arguments: str, environment: Mapping[str, str], stdout: IO[bytes] | None = None, stderr: IO[bytes] | None = None
) -> PreloadedProcess:
    """Start a command with an environment of its own and no input; output without a file is thrown away."""
    connection, _ = _starter()
    told, tell = os.pipe()
    request = {"arguments": arguments, "environment": dict(environment), "folder": str(Path.cwd())}
    with Path(os.devnull).open("r+b") as nowhere:
        streams = [nowhere.fileno(), (stdout or nowhere).fileno(), (stderr or nowhere).fileno()]
        socket.send_fds(connection, [json.dumps(request).encode()], [*streams, tell])
    os.close(tell)
    return PreloadedProcess(int(connection.recv(16)), told)


# --- the program that forks -----------------------------------------------------------------------------------------------


def _import_everything() -> None:
    from crucible.cli import main  # noqa: F401
    from crucible.local import platform, worker_process  # noqa: F401
    from crucible.serve import api, dispatcher, storage, worker  # noqa: F401


def _reap(told: dict[int, int]) -> None:
    while told:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        pipe = told.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in the child, and None in the parent once nobody asks any more."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the socket
    told: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([connection.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(told)
        if connection.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, _STANDARD_STREAMS + 1)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _take_streams(descriptors)
            os.closerange(_STANDARD_STREAMS, max([*descriptors, *told.values(), connection.fileno(), wake, woken]) + 1)
            connection.detach()
            return dict(json.loads(message))
        for descriptor in descriptors[:_STANDARD_STREAMS]:
            os.close(descriptor)
        told[pid] = descriptors[_STANDARD_STREAMS]
        connection.send(str(pid).encode())


def _take_streams(descriptors: list[int]) -> None:
    for number, descriptor in enumerate(descriptors[:_STANDARD_STREAMS]):
        os.dup2(descriptor, number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", line_buffering=True))


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["crucible", *request["arguments"]]
    random.seed()
    from crucible.cli.main import main

    main()


if __name__ == "__main__":
    _import_everything()
    gc.freeze()
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request is None:
        os._exit(0)  # there is nothing to put away, and taking everything down that was imported takes seconds
    _become(_request)
