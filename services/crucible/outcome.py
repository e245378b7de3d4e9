"""From what was observed to what is recorded: the pure decision of how an evaluation ended.

Two witnesses exist. The runner inside the sandbox reports what the code did; the runtime outside knows what was done to the
sandbox (memory killer, back-stop deadline, disappearance). The outside wins where both speak, since hostile code may reach the
inside, and a missing report is evidence, never a default of 0 or 1.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from crucible.evaluation import Reason, State, terminal_state_of
from crucible.quantity import format_memory


class RunnerStatus(StrEnum):
    """How the run ended as the runner saw it."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    WALL_CLOCK = "wall_clock"
    OUTPUT_LIMIT = "output_limit"
    MEMORY_LIMIT = "memory_limit"
    RUNNER_ERROR = "runner_error"


class RunnerReport(BaseModel):
    """What the runner writes when the run is over (JSON, at most 4 KiB so that it fits a container's termination message)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: RunnerStatus
    exit_code: int | None = Field(None, ge=0, le=255, description="Exit code, only if the code exited by itself")
    signal: int | None = Field(None, ge=1, le=64, description="Signal number, only if a signal ended it")
    exception_type: str | None = Field(
        None, max_length=200, description="Class of an uncaught exception, as the code's own process tells it"
    )
    peak_memory_bytes: int | None = Field(None, ge=0)
    cpu_seconds: float | None = Field(None, ge=0)
    run_seconds: float = Field(0.0, ge=0)
    stdout_bytes: int = Field(0, ge=0)
    stderr_bytes: int = Field(0, ge=0)
    processes_killed: int = Field(0, ge=0, description="Processes that the code left behind and the runner ended")
    detail: str | None = Field(None, max_length=1000)


class SandboxFacts(BaseModel):
    """What the runtime knows of the sandbox from outside."""

    model_config = ConfigDict(frozen=True)

    oom_kills: int = Field(0, ge=0, description="Memory kills that the kernel counted in the sandbox")
    peak_memory_bytes: int | None = Field(None, ge=0, description="Peak of the whole sandbox, if the kernel counted it")
    cpu_seconds: float | None = Field(None, ge=0, description="CPU time of the whole sandbox, if the kernel counted it")
    deadline_exceeded: bool = Field(
        False, description="The outside back-stop ended the sandbox, since the runner had not"
    )
    cancelled: Reason | None = Field(None, description="Why the sandbox was asked to stop, if it was")
    lost: Reason | None = Field(
        None, description="Why the platform lost the sandbox, if it knows (node_lost, evicted, preempted, image_error)"
    )
    exit_description: str | None = Field(None, description="How the sandbox's own process ended, for the record")


class Outcome(BaseModel):
    """The end of an attempt, ready to be recorded."""

    model_config = ConfigDict(frozen=True)

    state: State
    reason: Reason
    detail: str
    exit_code: int | None = None
    signal: int | None = None
    exception_type: str | None = None
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    run_seconds: float | None = None


def _cause(  # noqa: C901, PLR0911, PLR0912 - one line per cause, in order of authority
    report: RunnerReport | None, facts: SandboxFacts, memory_limit: int, timeout_seconds: int
) -> tuple[Reason, str]:
    limit = format_memory(memory_limit)
    if report and report.status is RunnerStatus.EXITED and report.exit_code == 0:
        # It had finished before anything was done to the sandbox: a cancel or kill that came after changes nothing.
        return Reason.EXIT_ZERO, "the code ran to its end"
    if facts.cancelled:
        return facts.cancelled, "cancelled on request"
    if facts.lost:
        return facts.lost, facts.exit_description or "the platform lost the sandbox"
    if report and report.status is RunnerStatus.MEMORY_LIMIT:
        return Reason.OOM_KILLED, f"used more than its memory limit of {limit}"
    if facts.oom_kills and (report is None or report.status is RunnerStatus.SIGNALLED):
        return Reason.OOM_KILLED, f"the kernel killed it at its memory limit of {limit}"
    if report is None:
        if facts.deadline_exceeded:
            return (
                Reason.DEADLINE,
                f"the sandbox did not end by itself after its time limit of {timeout_seconds} s and was ended from outside",
            )
        return Reason.SANDBOX_ERROR, facts.exit_description or "the sandbox ended without a report"
    match report.status:
        case RunnerStatus.WALL_CLOCK:
            return Reason.WALL_CLOCK, f"still running at its time limit of {timeout_seconds} s"
        case RunnerStatus.OUTPUT_LIMIT:
            return Reason.OUTPUT_LIMIT, report.detail or "wrote more output than is kept"
        case RunnerStatus.SIGNALLED:
            return Reason.SIGNAL, f"ended by signal {report.signal}"
        case RunnerStatus.RUNNER_ERROR:
            return Reason.SANDBOX_ERROR, report.detail or "the runner could not start the code"
        case _ if report.exception_type:
            return Reason.EXCEPTION, f"uncaught {report.exception_type}"
        case _:
            return Reason.EXIT_NONZERO, f"exited with code {report.exit_code}"


def decide(report: RunnerReport | None, facts: SandboxFacts, *, memory_limit: int, timeout_seconds: int) -> Outcome:
    """Merge both witnesses into the outcome of the attempt.

    Args:
        report: the runner's report, or None if none arrived.
        facts: what the runtime saw from outside.
        memory_limit: bytes, for the explanation.
        timeout_seconds: the wall-clock limit, for the explanation.
    """
    reason, detail = _cause(report, facts, memory_limit, timeout_seconds)
    peaks = [peak for peak in (report and report.peak_memory_bytes, facts.peak_memory_bytes) if peak]
    cpu = facts.cpu_seconds if facts.cpu_seconds is not None else (report.cpu_seconds if report else None)
    exited = report is not None and report.status is RunnerStatus.EXITED
    return Outcome(
        state=terminal_state_of(reason),
        reason=reason,
        detail=detail,
        exit_code=report.exit_code if report and exited else None,
        signal=report.signal if report and report.status is RunnerStatus.SIGNALLED else None,
        exception_type=report.exception_type if report and reason is Reason.EXCEPTION else None,
        peak_memory_bytes=max(peaks) if peaks else None,
        cpu_seconds=cpu,
        run_seconds=report.run_seconds if report else None,
    )
