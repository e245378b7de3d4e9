"""The dispatcher's side of the launcher process: start it, ask it for processes, learn how they end.

If the launcher is lost, every process that it started is lost with it (it is their parent, and they end with it); the next launch starts
another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from crucible import logs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logs.get_logger("launch")

_SCRIPT = Path(__file__).with_name("launcher.py")
_STOP_SECONDS = 5.0
_SEND_SECONDS = 5.0
# A killed process ends in milliseconds; this much later something is badly wrong with the one who should have killed it.
_KILL_SECONDS = 30.0
# As in launcher.py.
_STAGE = "/tmp"  # noqa: S108 - the launcher's own view of it


class LauncherLostError(Exception):
    """The launcher ended, and with it what it had started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start. Descriptor numbers are those that the new process finds.

    Args:
        program: path, or name of a kept descriptor to execute.
        argv: its arguments, the zeroth included.
        environment: its whole environment.
        sent: descriptors of ours to hand over, by number; still ours to close afterwards.
        reopened: names of kept descriptors, by number; opened anew, so that reading starts at the beginning.
        groups: files of control groups to join.
        user: uid and gid to become, or None to stay.
        folder: where to start, or None.
    """

    program: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    sent: Mapping[int, int]
    reopened: Mapping[int, str] = field(default_factory=dict)
    groups: Sequence[str] = ()
    user: int | None = None
    folder: str | None = None


class Process:
    """A process that the launcher started."""

    def __init__(self, launcher: Launcher, number: int) -> None:
        loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._number = number
        self.pid: asyncio.Future[int] = loop.create_future()
        self.status: asyncio.Future[int] = loop.create_future()

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended; harmless at any time."""
        if not self.status.done():
            self._launcher.send({"do": "kill", "number": self._number})
            asyncio.get_running_loop().call_later(_KILL_SECONDS, self._insist)

    def _insist(self) -> None:
        if not self.status.done():
            self._launcher.give_up("a process that it was told to kill has not ended")

    async def wait(self) -> int:
        """Return its wait status once it and everything orphaned by it is gone.

        Raises:
            LauncherLostError: the launcher ended first.
        """
        return await asyncio.shield(self.status)

    def lose(self, error: LauncherLostError) -> None:
        """Note that its end will never be told."""
        for future in (self.pid, self.status):
            if not future.done():
                future.set_exception(error)
                # Retrieved here: not everyone waits, and an unheard error is a warning.
                future.exception()


class Launcher:
    """Starts processes through one launcher process at a time.

    Args:
        kept: descriptors that launches refer to by name. They stay open here, for the launcher's successors.
        staged: folders that must be reachable although the ones above them are closed to the user of a launch. Needs root.
    """

    def __init__(self, kept: Mapping[str, int], staged: Sequence[str]) -> None:
        self._kept = dict(kept)
        self._staged = list(staged)
        self._stage_error: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._numbers = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._peer: socket.socket | None = None
        self._program: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the launcher, if it runs."""
        return self._program.pid if self._program and self._peer else None

    def start(self) -> None:
        """Start the launcher process unless it runs."""
        if self._peer:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # It must be a child of this thread and needs a few milliseconds once; asyncio's subprocesses would want a watcher.
            self._program = subprocess.Popen(  # noqa: S603 - our own file with our own interpreter
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_SCRIPT), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={},
                cwd="/",
            )
        ours.setblocking(False)
        self._peer = ours
        self._reader = asyncio.create_task(self._read(ours), name="launcher")
        self.send({"do": "keep", "names": list(self._kept)}, list(self._kept.values()))
        if self._staged:
            self.send({"do": "stage", "folders": self._staged})

    def staged_path(self, folder: str) -> str:
        """Return where a launched process finds a staged folder."""
        return f"{_STAGE}/{self._staged.index(folder)}"

    async def staging_error(self) -> str | None:
        """Return why the folders could not be staged, or None if they are."""
        return await asyncio.shield(self._stage_error) if self._staged else None

    async def aclose(self) -> None:
        """End the launcher and with it everything that it started."""
        if self._peer:
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
        if self._reader:
            await self._reader
        if self._program:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._program.wait, _STOP_SECONDS)

    def launch(self, launch: Launch) -> Process:
        """Ask for a process; how it fares is told by what is returned. What is `sent` may be closed at once."""
        self.start()
        number = next(self._numbers)
        process = self._processes[number] = Process(self, number)
        request = {
            "do": "launch",
            "number": number,
            "program": launch.program,
            "argv": list(launch.argv),
            "environment": dict(launch.environment),
            "sent": list(launch.sent),
            "reopened": {str(key): value for key, value in launch.reopened.items()},
            "groups": list(launch.groups),
            "user": launch.user,
            "folder": launch.folder,
        }
        self.send(request, list(launch.sent.values()))
        return process

    def send(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Write a message. The launcher reads promptly and messages are small, so this never waits for long."""
        if not self._peer:
            return
        data = orjson.dumps(request)
        data = len(data).to_bytes(4, "big") + data
        self._peer.settimeout(_SEND_SECONDS)
        try:
            sent = socket.send_fds(self._peer, [data], descriptors) if descriptors else 0
            self._peer.sendall(data[sent:])
        except OSError as error:
            self.give_up(f"it takes no messages: {error}")
        finally:
            self._peer.setblocking(False)

    def give_up(self, why: str) -> None:
        """End a launcher that does not do its work; whatever it had started ends with it, and the next launch starts another."""
        if self._program and self._program.poll() is None:
            log.error("ending the launcher of sandboxes", why=why)
            self._program.kill()

    async def _read(self, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        pending = bytearray()
        try:
            while data := await loop.sock_recv(peer, 65536):
                pending += data
                self._take(pending)
        except OSError as error:
            log.warning("the launcher was cut off", error=str(error))
        finally:
            peer.close()
            self._peer = None
            self._lose_all()

    def _take(self, pending: bytearray) -> None:
        while len(pending) >= 4 and len(pending) >= (end := 4 + int.from_bytes(pending[:4], "big")):
            message = orjson.loads(pending[4:end])
            del pending[:end]
            if message["what"] == "staged":
                if not self._stage_error.done():
                    self._stage_error.set_result(message["error"])
                continue
            process = self._processes[message["number"]]
            if message["what"] == "started":
                process.pid.set_result(message["pid"])
            else:
                del self._processes[message["number"]]
                process.status.set_result(message["status"])

    def _lose_all(self) -> None:
        if not self._stage_error.done():
            self._stage_error.set_result("the launcher ended")
        if self._processes:
            log.error("the launcher ended; its sandboxes are lost", sandboxes=len(self._processes))
        for process in self._processes.values():
            process.lose(LauncherLostError("the launcher of sandboxes ended"))
        self._processes.clear()
        if self._program:
            # Reaps it, if it is already dead; otherwise the next start does.
            self._program.poll()


def exit_text(status: int) -> str:
    """Say in words how a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        return f"was ended by signal {os.WTERMSIG(status)}"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"
