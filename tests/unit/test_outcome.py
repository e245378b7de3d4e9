"""How an evaluation ended: the decision is total, follows the evidence, and never guesses a number."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crucible.evaluation import RETRYABLE_REASONS, Reason, State, check_transition, terminal_state_of
from crucible.outcome import OWN_DOING, Outcome, RunnerReport, RunnerStatus, SandboxFacts, decide, plain_text
from crucible.quantity import MIB

pytestmark = pytest.mark.unit

_COUNTS = st.none() | st.integers(0, 2**63 - 1)
_SECONDS = st.none() | st.floats(0, 1e9)
_HOSTILE = st.none() | st.text(st.characters(exclude_categories=()), max_size=1200)
_OUTSIDE = st.none() | st.sampled_from(sorted(set(Reason) - OWN_DOING))


@st.composite
def reports(draw: st.DrawFn) -> RunnerReport:
    """Any report that validates."""
    status = draw(st.sampled_from(RunnerStatus))
    codes = st.integers(0, 255)
    return RunnerReport(
        status=status,
        exit_code=draw(codes if status is RunnerStatus.EXITED else st.none() | codes),
        signal=draw(st.none() | st.integers(1, 64)),
        exception_type=draw(_HOSTILE),
        peak_memory_bytes=draw(_COUNTS),
        cpu_seconds=draw(_SECONDS),
        run_seconds=draw(st.floats(0, 1e9)),
        detail=draw(_HOSTILE),
    )


FACTS = st.builds(
    SandboxFacts,
    oom_kills=st.integers(0, 3),
    peak_memory_bytes=_COUNTS,
    cpu_seconds=_SECONDS,
    deadline_exceeded=st.booleans(),
    cancelled=_OUTSIDE,
    lost=_OUTSIDE,
    exit_description=_HOSTILE,
)


def end(report: RunnerReport | None = None, **facts: object) -> Outcome:
    return decide(report, SandboxFacts.model_validate(facts), memory_limit=256 * MIB, timeout_seconds=60)


def exited(code: int, **fields: object) -> RunnerReport:
    return RunnerReport.model_validate({"status": "exited", "exit_code": code, **fields})


@given(st.none() | reports(), FACTS)
def test_every_combination_of_evidence_has_an_outcome_that_follows_from_it(
    report: RunnerReport | None, facts: SandboxFacts
) -> None:
    outcome = decide(report, facts, memory_limit=256 * MIB, timeout_seconds=60)
    assert outcome.state is terminal_state_of(outcome.reason)
    assert outcome.detail.isprintable()
    assert outcome.detail
    # Whatever was decided can be recorded from where an attempt stands.
    if outcome.state is not State.COMPLETED:
        check_transition(State.PROVISIONING, outcome.state, outcome.reason)
    check_transition(State.RUNNING, outcome.state, outcome.reason)
    # Numbers come from a witness or not at all.
    assert outcome.exit_code is None or (report is not None and outcome.exit_code == report.exit_code)
    assert outcome.signal is None or (report is not None and outcome.signal == report.signal)
    assert outcome.exit_code is None or outcome.signal is None
    assert report is not None or outcome.run_seconds is None
    # Success needs the runner's word, and a zero.
    if outcome.reason is Reason.EXIT_ZERO:
        assert report is not None
        assert (report.status, report.exit_code, outcome.exit_code) == (RunnerStatus.EXITED, 0, 0)
    if report is None:
        assert outcome.reason not in {Reason.EXIT_ZERO, Reason.EXIT_NONZERO, Reason.EXCEPTION, Reason.SIGNAL}
    # The outcome survives its way through JSON, and its texts fit the column.
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome
    assert "\x00" not in (outcome.detail + (outcome.exception_type or ""))


@pytest.mark.parametrize(
    ("report", "facts", "reason", "exit_code", "signal"),
    [
        (exited(0), {}, Reason.EXIT_ZERO, 0, None),
        (exited(3), {}, Reason.EXIT_NONZERO, 3, None),
        (exited(1, exception_type="ValueError"), {}, Reason.EXCEPTION, 1, None),
        (RunnerReport(status=RunnerStatus.SIGNALLED, signal=11), {}, Reason.SIGNAL, None, 11),
        (RunnerReport(status=RunnerStatus.SIGNALLED), {}, Reason.SIGNAL, None, None),
        (RunnerReport(status=RunnerStatus.WALL_CLOCK), {}, Reason.WALL_CLOCK, None, None),
        (RunnerReport(status=RunnerStatus.OUTPUT_LIMIT), {}, Reason.OUTPUT_LIMIT, None, None),
        (RunnerReport(status=RunnerStatus.MEMORY_LIMIT), {}, Reason.OOM_KILLED, None, None),
        (RunnerReport(status=RunnerStatus.RUNNER_ERROR), {}, Reason.SANDBOX_ERROR, None, None),
        # The kernel's memory killer, seen from outside, explains the signal that the runner saw, and a runner that fell silent.
        (RunnerReport(status=RunnerStatus.SIGNALLED, signal=9), {"oom_kills": 1}, Reason.OOM_KILLED, None, 9),
        (None, {"oom_kills": 1}, Reason.OOM_KILLED, None, None),
        (None, {"oom_kills": 1, "deadline_exceeded": True}, Reason.OOM_KILLED, None, None),
        # A child that was killed is not the code's end.
        (exited(0), {"oom_kills": 1}, Reason.EXIT_ZERO, 0, None),
        (exited(2), {"oom_kills": 1}, Reason.EXIT_NONZERO, 2, None),
        # Silence is evidence, never a number.
        (None, {}, Reason.SANDBOX_ERROR, None, None),
        (None, {"deadline_exceeded": True}, Reason.DEADLINE, None, None),
        (None, {"lost": Reason.NODE_LOST}, Reason.NODE_LOST, None, None),
        # What had ended well before a cancel or a loss stays so; any other end may be their effect.
        (exited(0), {"cancelled": Reason.CANCELLED_BY_USER}, Reason.EXIT_ZERO, 0, None),
        (exited(0), {"lost": Reason.NODE_LOST}, Reason.EXIT_ZERO, 0, None),
        (exited(1), {"cancelled": Reason.CANCELLED_BY_USER}, Reason.CANCELLED_BY_USER, 1, None),
        (
            None,
            {"cancelled": Reason.CANCELLED_BY_OPERATOR, "lost": Reason.EVICTED},
            Reason.CANCELLED_BY_OPERATOR,
            None,
            None,
        ),
        (None, {"cancelled": Reason.PREEMPTED}, Reason.PREEMPTED, None, None),
    ],
)
def test_the_cause_follows_from_the_evidence(
    report: RunnerReport | None, facts: dict[str, object], reason: Reason, exit_code: int | None, signal: int | None
) -> None:
    outcome = end(report, **facts)
    assert (outcome.reason, outcome.exit_code, outcome.signal) == (reason, exit_code, signal)


def test_a_child_killed_for_memory_is_told_beside_the_codes_own_end() -> None:
    assert "killed 2 of its processes at the memory limit of 256Mi" in end(exited(2), oom_kills=2).detail


def test_an_end_that_the_platform_imposed_is_not_called_a_request() -> None:
    assert end(None, cancelled=Reason.PREEMPTED).detail == "the platform ended the sandbox"
    assert end(None, cancelled=Reason.CANCELLED_BY_USER).detail == "cancelled on request"


def test_a_lost_sandbox_may_be_tried_again_and_a_silent_one_too() -> None:
    assert end(None).reason in RETRYABLE_REASONS
    assert end(None, deadline_exceeded=True).reason not in RETRYABLE_REASONS


def test_nobody_outside_can_claim_what_only_the_code_can_do() -> None:
    for reason, fact in product(OWN_DOING, ["cancelled", "lost"]):
        with pytest.raises(ValidationError, match="own doing"):
            SandboxFacts.model_validate({fact: reason})


def test_the_larger_peak_and_the_kernels_own_processor_time_are_kept() -> None:
    report = exited(0, peak_memory_bytes=5, cpu_seconds=1.0)
    outcome = end(report, peak_memory_bytes=7, cpu_seconds=2.0)
    assert (outcome.peak_memory_bytes, outcome.cpu_seconds) == (7, 2.0)
    assert (end(report).peak_memory_bytes, end(report).cpu_seconds) == (5, 1.0)
    assert end(None, peak_memory_bytes=0).peak_memory_bytes is None


# --- the report -----------------------------------------------------------------------------------------------------------


def test_a_hostile_exception_name_is_cleaned_and_does_not_void_the_report() -> None:
    report = exited(1, exception_type="Bad\x00\x1b[31m\ud800\u202e\n" + "x" * 500)
    assert report.exception_type is not None
    assert report.exception_type.startswith("Bad??[31m?? xxx")
    assert len(report.exception_type) == 200
    assert end(report).reason is Reason.EXCEPTION


IMPOSSIBLE: list[dict[str, Any]] = [
    {"status": "exited"},
    {"status": "exited", "exit_code": 256},
    {"status": "exited", "exit_code": -1},
    {"status": "signalled", "signal": 65},
    {"status": "signalled", "signal": 0},
    {"status": "fine", "exit_code": 0},
    {"status": "exited", "exit_code": 0, "peak_memory_bytes": 2**63},
    {"status": "exited", "exit_code": 0, "run_seconds": float("inf")},
    {"status": "exited", "exit_code": 0, "cpu_seconds": float("nan")},
    {"exit_code": 0},
]


def test_a_report_that_cannot_be_true_is_no_report() -> None:
    for fields in IMPOSSIBLE:
        with pytest.raises(ValidationError):
            RunnerReport.model_validate(fields)


def test_members_of_a_later_runner_are_no_obstacle() -> None:
    assert RunnerReport.model_validate({"status": "exited", "exit_code": 0, "new": 1}).exit_code == 0


@given(st.text(st.characters(exclude_categories=())), st.integers(0, 50))
def test_plain_text_is_printable_utf8_of_bounded_length(text: str, longest: int) -> None:
    plain = plain_text(text, longest)
    assert plain.isprintable()
    assert len(plain) <= longest
    plain.encode()
    assert plain_text(plain, longest) == plain
