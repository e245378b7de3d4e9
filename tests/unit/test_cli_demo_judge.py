"""The demo's verdict: it passes only what is exactly as expected, and names whatever is not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import pytest

from crucible.cli import demo_plan as plan
from crucible.cli.demo_judge import Result, judge
from crucible.evaluation import TERMINAL_REASONS, EvaluationRequest, Reason, State, resolve
from crucible.limits import Limits

pytestmark = pytest.mark.unit

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
BATCH = plan.programs("127.0.0.1 1\n", "/secret\n")


def result(program: plan.Program, place: int, **fields: Any) -> Result:
    """What the platform shows of a program that went as it must, taken as number `place` from the queue."""
    ending = program.endings[0]
    output = (program.stdout or "").encode()
    evaluation = {
        "id": f"ev-{program.name}",
        "state": ending.state,
        "reason": ending.reason,
        "exit_code": ending.exit_code,
        "signal": ending.signal,
        "exception_type": ending.exception_type,
        "priority": program.priority,
        "size_class": "medium" if program.memory_limit == "512Mi" else "small",
        "attempt": 1,
        "provisioning_at": (START + timedelta(milliseconds=100 * place)).isoformat(),
        "stdout": {"size": len(output), "sha256": hashlib.sha256(output).hexdigest()},
    }
    return Result(replace(program, stdout_sha256=None), evaluation | fields, output)


def perfect() -> list[Result]:
    """The batch as strict priority gives it out."""
    ordered = sorted(BATCH, key=lambda program: -program.priority)
    return [result(program, place) for place, program in enumerate(ordered)]


def altered(name: str, **fields: Any) -> list[Result]:
    """The perfect batch with one evaluation changed."""
    return [replace(one, evaluation=one.evaluation | fields) if one.program.name == name else one for one in perfect()]


def test_a_batch_that_went_as_it_must_is_good() -> None:
    verdict = judge(perfect())
    assert verdict.good
    assert not verdict.differences
    assert not verdict.order


@pytest.mark.parametrize("name", [program.name for program in BATCH])
def test_any_program_that_ends_otherwise_is_named(name: str) -> None:
    verdict = judge(altered(name, state="failed", reason="sandbox_error", exit_code=None, signal=None))
    assert not verdict.good
    assert list(verdict.differences) == [name]
    assert "sandbox_error" in " ".join(verdict.differences[name])


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("exit_three", {"exit_code": 1}, "exit_code is 1 and not 3"),
        ("killed_by_signal", {"signal": 9}, "signal is 9 and not 11"),
        (
            "division_by_zero",
            {"exception_type": "ValueError"},
            "exception_type is ValueError and not ZeroDivisionError",
        ),
        ("infinite_loop", {"reason": "deadline"}, "reason is deadline and not wall_clock"),
        ("hello", {"attempt": 2}, "it took 2 attempts"),
        ("hello", {"stdout": {"size": 0, "sha256": "0" * 64}}, "the platform recorded SHA-256 000"),
    ],
)
def test_a_difference_in_one_field_is_named(name: str, fields: dict[str, Any], words: str) -> None:
    assert words in " ".join(judge(altered(name, **fields)).differences[name])


def test_a_lost_byte_of_output_is_named() -> None:
    text = "0123456789" * 10
    program = plan.Program("big_output", 5, stdout_sha256=hashlib.sha256(text.encode()).hexdigest())
    whole, cut = text.encode(), text[1:].encode()
    seen = result(program, 0).evaluation
    for output, good in ((whole, True), (cut, False)):
        told = seen | {"stdout": {"size": len(output), "sha256": hashlib.sha256(output).hexdigest()}}
        assert judge([Result(program, told, output)]).good is good


def test_either_of_two_right_endings_is_accepted() -> None:
    assert judge(altered("fork_bomb", state="failed", reason="exception", exit_code=1)).good


def test_a_lower_priority_that_was_taken_first_is_named() -> None:
    early = (START - timedelta(seconds=1)).isoformat()
    verdict = judge(altered("hello", provisioning_at=early))
    assert not verdict.good
    assert verdict.order == [
        "in the small queue hello (priority 0) was taken before sleeper (priority 10)",
    ]


def test_size_classes_do_not_wait_for_each_other() -> None:
    assert judge(altered("fork_bomb", provisioning_at=(START - timedelta(seconds=1)).isoformat())).good
    assert judge(altered("cpu_work", provisioning_at=(START + timedelta(hours=1)).isoformat())).good


def test_those_taken_at_the_same_time_have_no_order() -> None:
    same = [replace(one, evaluation=one.evaluation | {"provisioning_at": START.isoformat()}) for one in perfect()]
    assert judge(same).good


def test_times_are_compared_as_times_and_not_as_text() -> None:
    first = result(plan.Program("first", 9), 0, provisioning_at="2026-01-31T12:00:00Z")
    second = result(plan.Program("second", 1), 1, provisioning_at="2026-01-31T12:00:00.5Z")
    assert judge([first, second]).good


def test_what_was_submitted_apart_is_judged_by_its_outcome_but_not_by_its_order() -> None:
    late = result(plan.afterwards(), 1000)
    assert judge(perfect(), [late]).good
    broken = replace(late, evaluation=late.evaluation | {"state": "queued", "reason": None})
    assert list(judge(perfect(), [broken]).differences) == ["hello_afterwards"]


@pytest.mark.parametrize("program", [*BATCH, *plan.blockers(), plan.afterwards()], ids=lambda program: program.name)
def test_every_program_is_a_request_that_the_default_limits_accept(program: plan.Program) -> None:
    spec = resolve(EvaluationRequest.model_validate(program.body("00000000")), Limits())
    assert spec.priority == program.priority
    for ending in program.endings:
        assert Reason(ending.reason) in TERMINAL_REASONS[State(ending.state)]


def test_the_batch_spans_all_priorities_and_is_not_submitted_in_their_order() -> None:
    priorities = [program.priority for program in BATCH]
    assert set(priorities) == set(range(11))
    assert priorities != sorted(priorities, reverse=True)
    assert len({program.name for program in BATCH}) == len(BATCH)


def test_the_known_digest_of_the_big_output_is_that_of_the_program() -> None:
    program = next(program for program in BATCH if program.name == "big_output")
    path = files("crucible.cli") / "demo_programs" / "big_output.py"
    output = subprocess.run([sys.executable, "-I", "-S", str(path)], capture_output=True, check=True).stdout
    assert len(output) == 5_000_000
    assert hashlib.sha256(output).hexdigest() == program.stdout_sha256


def test_every_file_of_the_demo_is_used() -> None:
    used = {program.file or f"{program.name}.py" for program in [*BATCH, *plan.blockers(), plan.afterwards()]}
    there = {entry.name for entry in (files("crucible.cli") / "demo_programs").iterdir() if entry.is_file()}
    assert used == there
