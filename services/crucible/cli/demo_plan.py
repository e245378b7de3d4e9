"""What the demo submits, and how each program must end.

The programs themselves are files in `demo_programs/`; they run in sandboxes and are never imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from crucible.cli.requests import given

if TYPE_CHECKING:
    from crucible.cli.client import Document

# Evaluations of size class small that run at a time: few, so that the rest has to queue on any machine.
SLOTS = 4
LABEL = "crucible-demo"


@dataclass(frozen=True, slots=True)
class Ending:
    """How an evaluation ends: its state and reason, and what belongs to the reason."""

    state: str
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    exception_type: str | None = None

    def differences(self, evaluation: Document) -> list[str]:
        """Name each field of an ended evaluation that is not as it is here."""
        wanted: dict[str, Any] = given(
            state=self.state,
            reason=self.reason,
            exit_code=self.exit_code,
            signal=self.signal,
            exception_type=self.exception_type,
        )
        return [
            f"{field} is {evaluation.get(field)} and not {value}"
            for field, value in wanted.items()
            if evaluation.get(field) != value
        ]

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


COMPLETED = Ending("completed", "exit_zero", exit_code=0)


@dataclass(frozen=True, slots=True)
class Program:
    """One submission of the demo.

    `endings` are those that are right. `stdout` is the exact output and `stdout_sha256` its digest, where they are known.
    `attacks` marks what must not run where nothing isolates it, `cancel` what is cancelled once it runs.
    """

    name: str
    priority: int
    endings: tuple[Ending, ...] = (COMPLETED,)
    stdin: str = ""
    timeout_seconds: int = 20
    memory_limit: str | None = None
    cpu_limit: str | None = None
    stdout: str | None = None
    stdout_sha256: str | None = None
    attacks: bool = False
    cancel: bool = False
    file: str = ""

    def body(self, run: str) -> Document:
        """Return the request; `run` labels all that belong together."""
        return given(
            code=source(self.file or f"{self.name}.py"),
            stdin=self.stdin or None,
            priority=self.priority,
            timeout_seconds=self.timeout_seconds,
            memory_limit=self.memory_limit,
            cpu_limit=self.cpu_limit,
            labels={LABEL: run, "program": self.name},
        )


def source(file: str) -> str:
    """Return the text of a program."""
    return (files("crucible.cli") / "demo_programs" / file).read_text()


def blockers() -> list[Program]:
    """Return what holds every slot while the rest is submitted."""
    return [Program(f"occupy_slot_{n + 1}", 5, file="occupy_slot.py") for n in range(SLOTS)]


def afterwards() -> Program:
    """Return what shows that the platform is unharmed by all that came before."""
    return Program("hello_afterwards", 10, file="hello.py", stdout="hello from the sandbox\n")


def programs(reachable: str, secrets: str) -> list[Program]:
    """Return the mixed batch, in the order of submission, which is not the order of priority.

    Args:
        reachable: addresses that must be out of reach, `host port` a line.
        secrets: files of the host that must be out of reach, one a line.
    """
    return [
        Program("hello", 0, stdout="hello from the sandbox\n"),
        Program("cpu_work", 3, memory_limit="512Mi", cpu_limit="500m", stdout="17984 primes\n"),
        Program("division_by_zero", 2, (Ending("failed", "exception", 1, exception_type="ZeroDivisionError"),)),
        Program("network_attempt", 8, stdin=reachable, attacks=True),
        Program("hello_again", 5, file="hello.py", stdout="hello from the sandbox\n"),
        Program(
            "syntax_error",
            1,
            (Ending("failed", "exception", 1, exception_type="SyntaxError"),),
            file="syntax_error.txt",
        ),
        Program("fork_bomb", 7, (COMPLETED, Ending("failed", "exception")), memory_limit="512Mi", attacks=True),
        Program("exit_three", 4, (Ending("failed", "exit_nonzero", 3),)),
        Program("infinite_loop", 9, (Ending("timeout", "wall_clock"),), timeout_seconds=1),
        Program("stdin_echo", 3, stdin="shout\nthis\n", stdout="SHOUT\nTHIS\n"),
        Program("sleeper", 10, (Ending("cancelled", "cancelled_by_user"),), timeout_seconds=60, cancel=True),
        Program("big_output", 6, stdout_sha256="0eb6d479cdcf935ab00ee3a39c748c9abc451471d760e26f1682c45a2a349225"),
        Program("killed_by_signal", 4, (Ending("failed", "signal", signal=11),)),
        Program("filesystem_attack", 7, stdin=secrets, attacks=True),
        Program("memory_hog", 9, (Ending("failed", "oom_killed"),), memory_limit="64Mi"),
        Program("hello_at_last", 0, file="hello.py", stdout="hello from the sandbox\n"),
    ]
