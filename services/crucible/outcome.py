"""From what was observed to what is recorded: the pure decision of how an evaluation ended.

Two witnesses exist. The runner inside the sandbox reports what the code did; the runtime outside knows what was done to the
sandbox (memory killer, back-stop deadline, disappearance). The outside wins where both speak, since hostile code may reach the
inside, and a missing report is evidence, never a default of 0 or 1.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from crucible.evaluation import Reason, State, terminal_state_of
from crucible.quantity import format_memory

# What a signed 64-bit column holds; a larger count is no measurement.
_MAX_COUNT = 2**63 - 1
_MAX_TYPE_CHARACTERS = 200
_MAX_DETAIL_CHARACTERS = 1000


def plain_text(text: str, longest: int) -> str:
    """Return text that any log line, terminal and text column can take, whatever hostile code put into it.

    White space becomes blanks; control characters (NUL and escape sequences among them), bidirectional overrides and lone
    surrogates become `?`. At most `longest` characters are kept.
    """
    spaced = (" " if character.isspace() else character for character in text[:longest])
    return "".join(character if character.isprintable() else "?" for character in spaced)


def _plain(longest: int) -> BeforeValidator:
    return BeforeValidator(lambda value: plain_text(value, longest) if isinstance(value, str) else value)


# Cleaned and cut, not refused: what hostile code calls its exception must not void the report around it.
ExceptionType = Annotated[str, _plain(_MAX_TYPE_CHARACTERS)]
Detail = Annotated[str, _plain(_MAX_DETAIL_CHARACTERS)]
Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What only the code itself can cause, so that nobody outside may claim it.
OWN_DOING = frozenset(
    {
        Reason.EXIT_ZERO,
        Reason.EXIT_NONZERO,
        Reason.EXCEPTION,
        Reason.SIGNAL,
        Reason.OOM_KILLED,
        Reason.OUTPUT_LIMIT,
        Reason.WALL_CLOCK,
    }
)


def _from_outside(reason: Reason) -> Reason:
    if reason in OWN_DOING:
        raise ValueError(f"{reason} is the code's own doing, not something that is done to a sandbox")
    return reason


OutsideReason = Annotated[Reason, AfterValidator(_from_outside)]


class RunnerStatus(StrEnum):
    """How the run ended as the runner saw it."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    WALL_CLOCK = "wall_clock"
    OUTPUT_LIMIT = "output_limit"
    MEMORY_LIMIT = "memory_limit"
    RUNNER_ERROR = "runner_error"


class RunnerReport(BaseModel):
    """What the runner writes when the run is over (JSON, at most 4 KiB so that it fits a container's termination message).

    A report that contradicts itself (exited, but without a code) does not validate, and counts as none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: RunnerStatus
    exit_code: int | None = Field(None, ge=0, le=255, description="Exit code, only if the code exited by itself")
    signal: int | None = Field(None, ge=1, le=64, description="Signal number, only if a signal ended it")
    exception_type: ExceptionType | None = Field(
        None, description="Class of an uncaught exception, as the code's own process tells it"
    )
    peak_memory_bytes: Count | None = None
    cpu_seconds: Seconds | None = None
    run_seconds: Seconds = 0.0
    stdout_bytes: Count = 0
    stderr_bytes: Count = 0
    processes_killed: Count = Field(0, description="Processes that the code left behind and the runner ended")
    detail: Detail | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status is RunnerStatus.EXITED and self.exit_code is None:
            raise ValueError("exited, but with no exit code")
        return self


class SandboxFacts(BaseModel):
    """What the runtime knows of the sandbox from outside."""

    model_config = ConfigDict(frozen=True)

    oom_kills: Count = Field(0, description="Memory kills that the kernel counted in the sandbox")
    peak_memory_bytes: Count | None = Field(None, description="Peak of the whole sandbox, if the kernel counted it")
    cpu_seconds: Seconds | None = Field(None, description="CPU time of the whole sandbox, if the kernel counted it")
    deadline_exceeded: bool = Field(
        False, description="The outside back-stop ended the sandbox, since the runner had not"
    )
    cancelled: OutsideReason | None = Field(None, description="Why the sandbox was asked to stop, if it was")
    lost: OutsideReason | None = Field(None, description="Why the platform lost the sandbox, if it knows")
    exit_description: Detail | None = Field(None, description="How the sandbox's own process ended, for the record")


class Outcome(BaseModel):
    """The end of an attempt, ready to be recorded."""

    model_config = ConfigDict(frozen=True)

    state: State
    reason: Reason
    detail: Detail
    exit_code: int | None = None
    signal: int | None = None
    exception_type: ExceptionType | None = None
    peak_memory_bytes: Count | None = None
    cpu_seconds: Seconds | None = None
    run_seconds: Seconds | None = None


def _cause(  # noqa: C901, PLR0911 - one line per cause, in order of authority
    report: RunnerReport | None, facts: SandboxFacts, memory_limit: int, timeout_seconds: int
) -> tuple[Reason, str]:
    limit = format_memory(memory_limit)
    if report and report.status is RunnerStatus.EXITED and report.exit_code == 0:
        # It had finished before anything was done to the sandbox: a cancel or kill that came after changes nothing. Any other
        # end may be the effect of the cancel or of the loss, so those come next.
        return Reason.EXIT_ZERO, "the code ran to its end"
    if facts.cancelled:
        asked = terminal_state_of(facts.cancelled) is State.CANCELLED
        return facts.cancelled, "cancelled on request" if asked else "the platform ended the sandbox"
    if facts.lost:
        return facts.lost, facts.exit_description or "the platform lost the sandbox"
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
            return Reason.SIGNAL, f"ended by signal {report.signal}" if report.signal else "ended by a signal"
        case RunnerStatus.RUNNER_ERROR:
            return Reason.SANDBOX_ERROR, report.detail or "the runner could not start the code"
        case RunnerStatus.MEMORY_LIMIT:
            return Reason.OOM_KILLED, f"used more than its memory limit of {limit}"
        case RunnerStatus.EXITED:
            # A child of the code may have been killed where the code itself went on: said, but not made the cause.
            also = f"; the kernel killed {facts.oom_kills} of its processes at the memory limit of {limit}"
            return _exit_cause(report, also if facts.oom_kills else "")


def _exit_cause(report: RunnerReport, also: str) -> tuple[Reason, str]:
    if report.exception_type:
        return Reason.EXCEPTION, f"uncaught {report.exception_type}{also}"
    return Reason.EXIT_NONZERO, f"exited with code {report.exit_code}{also}"


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
