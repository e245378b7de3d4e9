"""A sandbox whose first process the launcher started: the channel to its runner, and its end.

The same for every runtime that starts processes on this machine; a runtime adds what it puts around the runner. Nothing in here
trusts what comes out of the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

from crucible.dispatcher.launch import LauncherLostError, exit_text
from crucible.dispatcher.runtimes import SandboxEnd

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.dispatcher.cgroups import ControlGroup
    from crucible.dispatcher.launch import Process

_READ_BYTES = 256 * 1024
_STOP = b"S"
_DIAGNOSTICS_BYTES = 4096
# How often to ask whether the memory killer has struck, and how long the runner then has to end and report.
_MEMORY_POLL_SECONDS = 0.2
_MEMORY_STOP_SECONDS = 2.0


class Channel:
    """What connects a runner with the dispatcher: a socket for frames and commands, and a pipe for its last words.

    The far ends, `runner_end` and `words_end`, are for the sandbox; close them here once it has been launched.
    """

    def __init__(self) -> None:
        self._socket, far = socket.socketpair()
        self._socket.setblocking(False)
        self.runner_end = far.detach()
        self._words, self.words_end = os.pipe()
        os.set_blocking(self._words, False)

    def close_far_ends(self) -> None:
        """Let go of what the sandbox now holds."""
        os.close(self.runner_end)
        os.close(self.words_end)

    async def receive(self) -> bytes:
        """Return the next bytes; empty at the end."""
        if self._socket.fileno() < 0:
            return b""
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, _READ_BYTES)
        except OSError:  # reset: the runner was killed with our command unread
            return b""

    def send_stop(self) -> None:
        """Ask the runner to stop; one that no longer listens has."""
        with contextlib.suppress(OSError):
            self._socket.send(_STOP)

    def hang_up(self) -> None:
        """Let the runner know that no one listens, upon which it ends everything."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def last_words(self) -> str:
        """Return what bubblewrap, or a runner that could not do its work, wrote for people."""
        try:
            return os.read(self._words, _DIAGNOSTICS_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""

    def close(self) -> None:
        """Close our ends."""
        self._socket.close()
        os.close(self._words)


class LaunchedSandbox:
    """A sandbox made of one launched process, its descendants, and perhaps a control group.

    Args:
        process: the first process.
        channel: the connection to the runner.
        group: what bounds and counts it, if anything does.
        cpu_millis: CPU limit that the group enforces once the code runs.
        release: called once when nothing of it is left.
    """

    def __init__(
        self,
        process: Process,
        channel: Channel,
        *,
        group: ControlGroup | None,
        cpu_millis: int,
        release: Callable[[], Awaitable[None]],
    ) -> None:
        self._process = process
        self._channel = channel
        self._group = group
        self._cpu_millis = cpu_millis
        self._release = release
        self._timer: asyncio.TimerHandle | None = None
        process.status.add_done_callback(self._on_process_end)

    def _on_process_end(self, status: asyncio.Future[int]) -> None:
        if status.exception():
            # The launcher was lost. A runner that outlives it ends everything when it finds that no one listens.
            self._channel.hang_up()

    async def receive(self) -> bytes:
        """Return bytes of frames as the runner sends them; empty once the runner is gone."""
        return await self._channel.receive()

    def code_started(self) -> None:
        """Hold the CPU limit from now on: the start of the sandbox is the platform's own cost, not the code's."""
        if self._group:
            self._group.limit_cpu(self._cpu_millis)
            self._later(_MEMORY_POLL_SECONDS, self._check_memory, self._group)

    def _later(self, seconds: float, do: Callable[..., None], *arguments: object) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, do, *arguments)

    def _check_memory(self, group: ControlGroup) -> None:
        """End the whole run when the kernel has killed a part of it, as a container's memory limit does.

        Otherwise a parent would wait for a child that never comes, and its time-out would hide what happened.
        """
        if group.oom_kills():
            self.stop()
            self._later(_MEMORY_STOP_SECONDS, self.kill)
        else:
            self._later(_MEMORY_POLL_SECONDS, self._check_memory, group)

    def stop(self) -> None:
        """Ask the runner to end the run now and to report."""
        self._channel.send_stop()

    def kill(self) -> None:
        """End the sandbox from outside."""
        self._process.kill()

    async def ended(self) -> SandboxEnd:
        """Wait until no process of it is left, remove what belonged to it, and say what is known."""
        try:
            description = f"the sandbox {exit_text(await self._process.wait())} without a report"
        except LauncherLostError:
            while await self._channel.receive():
                pass
            description = "the sandbox was lost with the process that had started it"
        if words := self._channel.last_words():
            description = f"{description}: {words.splitlines()[-1][:500]}"
        if self._timer:
            self._timer.cancel()
        end = await self._close_group(description)
        self._channel.close()
        await self._release()
        return end

    async def _close_group(self, description: str) -> SandboxEnd:
        if not self._group:
            return SandboxEnd(description)
        usage = self._group.usage()
        await self._group.remove()
        return SandboxEnd(description, usage.oom_kills, usage.peak_memory_bytes, usage.cpu_seconds)
