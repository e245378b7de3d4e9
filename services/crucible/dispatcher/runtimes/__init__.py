"""The ways to make a sandbox, one module each, and what they have in common.

A runtime makes sandboxes and knows of each what was done to it from outside; what the code did, only the runner inside can say. It
decides nothing about outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from crucible.evaluation import Resources


class RuntimeUnavailableError(RuntimeError):
    """Sandboxes cannot be made on this machine. `hint` says what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(f"{reason}\n  {hint}")
        self.reason = reason
        self.hint = hint


class SandboxStartError(Exception):
    """This one sandbox could not be started; another may."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a sandbox is to run. `name` is unique among the dispatcher's sandboxes."""

    name: str
    evaluation_id: str
    code: bytes
    stdin: bytes
    timeout_seconds: int
    resources: Resources


@dataclass(frozen=True, slots=True)
class SandboxEnd:
    """What is known from outside of a sandbox that has ended: None where nothing counted it."""

    description: str
    oom_kills: int = 0
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None


class Sandbox(Protocol):
    """One sandbox, from its start until no process of it is left."""

    async def receive(self) -> bytes:
        """Return bytes of frames as the runner sends them; empty once the runner is gone."""

    def code_started(self) -> None:
        """Note that the start-up is over: from now on the CPU limit holds."""

    def stop(self) -> None:
        """Ask the runner to end the run now and to report."""

    def kill(self) -> None:
        """End the sandbox from outside, with or without a report."""

    async def ended(self) -> SandboxEnd:
        """Wait until no process of it is left, remove what belonged to it, and say what is known."""


class Runtime(Protocol):
    """A way to make sandboxes."""

    name: str

    @property
    def limits_by(self) -> str:
        """What holds memory, CPU and process limits here, in words; known once started."""

    async def start(self) -> None:
        """Get ready, and make sure by running one that sandboxes can be made.

        Raises:
            RuntimeUnavailableError: they cannot.
        """

    def create(self, spec: SandboxSpec) -> Sandbox:
        """Start a sandbox.

        Raises:
            SandboxStartError: it could not be started.
        """

    async def aclose(self) -> None:
        """End every sandbox and leave nothing behind."""
