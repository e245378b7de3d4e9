"""What the command line tells people of an evaluation."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from crucible.cli import explain

pytestmark = pytest.mark.unit


def evaluation(**fields: Any) -> dict[str, Any]:
    """An evaluation as the API shows it."""
    base = {
        "id": "ev-01jd3v8q6m0c3r5x7z9b1d3f5h",
        "state": "completed",
        "reason": "exit_zero",
        "detail": "the code ran to its end",
        "priority": 5,
        "effective_priority": 5,
        "size_class": "small",
        "memory_limit": "256Mi",
        "cpu_limit": "250m",
        "timeout_seconds": 60,
        "labels": {},
        "attempt": 1,
        "submitted_at": "2026-01-31T12:00:00Z",
        "queue_wait_seconds": 0.5,
        "run_seconds": 1.25,
        "exit_code": 0,
        "stdout": {"size": 0},
        "stderr": {"size": 0},
    }
    return base | fields


def told(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(explain.explain(found))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_queued_one_says_why_it_waits_where_it_stands_and_for_how_long() -> None:
    waiting = {
        "reason": "position",
        "detail": "2 ahead of it in the small queue; 4 are running",
        "position": 3,
        "estimated_wait_seconds": 75,
    }
    text = told(evaluation(state="queued", reason=None, detail=None, waiting=waiting, exit_code=None, run_seconds=None))
    assert "2 ahead of it in the small queue; 4 are running" in text
    assert "3 in the small queue" in text
    assert "about 1 min 15 s" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "failed", "reason": "oom_killed"}, "failed: oom_killed"),
        ({"state": "failed", "reason": "oom_killed"}, "--memory"),
        ({"state": "failed", "reason": "exit_nonzero", "exit_code": 3}, "failed: exit_nonzero 3"),
        ({"state": "failed", "reason": "exception", "exception_type": "KeyError"}, "failed: exception KeyError"),
        ({"state": "failed", "reason": "signal", "signal": 11}, "failed: signal SIGSEGV"),
        ({"state": "failed", "reason": "signal", "signal": 63}, "failed: signal 63"),
        ({"state": "timeout", "reason": "wall_clock"}, "--timeout"),
        ({"state": "failed", "reason": "node_lost"}, "lies with the platform"),
        ({"effective_priority": 7}, "counts as 7"),
        ({"attempt": 2}, "attempts"),
        ({"labels": {"suite": "nightly"}}, "suite=nightly"),
    ],
)
def test_an_ended_one_says_how_why_and_what_to_do(fields: dict[str, Any], words: str) -> None:
    assert words in told(evaluation(**fields))


def test_words_that_the_code_chose_cannot_steer_the_terminal() -> None:
    text = told(evaluation(state="failed", reason="exception", exception_type="\x1b[2J[bold]Evil\r"))
    assert "\x1b" not in text
    assert r"\x1b[2J[bold]Evil\x0d" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (268435456, "256.0 MiB"), (3 * 1024**3, "3.0 GiB")],
)
def test_sizes_are_printed_for_people(value: float | None, text: str) -> None:
    assert explain.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.1234, "0.12 s"), (59.99, "59.99 s"), (3725, "1 h 2 min")])
def test_durations_are_printed_for_people(value: float | None, text: str) -> None:
    assert explain.seconds(value) == text
