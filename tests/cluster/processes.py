"""Processes of the host by an identity that outlives the reuse of process numbers, and commands that say what they said."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.errors import ClusterError
from tests.support.waits import WaitTimeoutError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POLL_SECONDS = 0.05
COMMAND_SECONDS = 600


@dataclass(frozen=True)
class ProcessId:
    """A process number and the moment it was given out, in clock ticks since the machine started."""

    number: int
    started: int

    @classmethod
    def of(cls, number: int) -> ProcessId:
        """Return the identity of a running process."""
        started = _started(number)
        if started is None:
            raise ClusterError(f"process {number} ended at once")
        return cls(number, started)

    @property
    def alive(self) -> bool:
        """Whether it still runs; one that has ended and was not yet reaped does not."""
        return _started(self.number) == self.started

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.alive:
            os.kill(self.number, number)


def _started(number: int) -> int | None:
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def run(command: Sequence[str | Path], *, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - as subprocess calls it
    """Run a command and return what it wrote to standard output.

    Raises:
        ClusterError: it failed, and `check` is true; the text has everything that it said.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(str(error)) from None
    if check and done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        raise ClusterError(f"{' '.join(str(word) for word in command)}: exit status {done.returncode}\n{said}")
    return done.stdout


def start(command: Sequence[str | Path], log: Path, *, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a command that goes on when this program has ended."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=pass_fds,
        )


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        ClusterError: it did not within `seconds`.
    """
    try:
        wait_until(condition, timeout=seconds, describe=what, poll=POLL_SECONDS)
    except WaitTimeoutError as error:
        raise ClusterError(str(error)) from None
