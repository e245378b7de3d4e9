"""Why an evaluation waits, in words and numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from crucible.api.waiting import estimate, explain, fits_ever, fits_now
from crucible.contracts import CapacityReport, EvaluationRecord, NodeCapacity, QueuePosition, QueueReport
from crucible.evaluation import Resources, State
from crucible.limits import SizeClass
from crucible.quantity import GIB, MIB

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 31, tzinfo=UTC)


def record(state: State, **changes: Any) -> EvaluationRecord:
    fields: dict[str, Any] = {
        "id": "ev-01jd3v8q6m0c3r5x7z9b1d3f5h",
        "owner": "someone",
        "state": state,
        "priority": 5,
        "effective_priority": 5,
        "size_class": SizeClass.SMALL,
        "resources": Resources(cpu_millis=250, memory_bytes=256 * MIB),
        "image": "python",
        "labels": {},
        "timeout_seconds": 60,
        "queue_timeout_seconds": None,
        "code_sha256": "0" * 64,
        "seq": 2,
        "attempt": 0,
        "submitted_at": NOW,
        "queued_at": NOW,
        "provisioning_at": None,
        "started_at": None,
        "finished_at": None,
    }
    return EvaluationRecord(**{**fields, **changes})


def nodes(*free: tuple[int, int]) -> CapacityReport:
    return CapacityReport(
        nodes=[
            NodeCapacity(
                name=f"node-{index}",
                runtime="test",
                total=Resources(cpu_millis=2000, memory_bytes=GIB),
                free_cpu_millis=cpu,
                free_memory_bytes=memory,
                sandboxes=1,
            )
            for index, (cpu, memory) in enumerate(free)
        ]
    )


def place(position: int, mean: float | None = 2.0) -> QueuePosition:
    return QueuePosition(position=position, size_class=SizeClass.SMALL, mean_hold_seconds=mean)


def busy(running: int) -> QueueReport:
    return QueueReport(bands=[], running={SizeClass.SMALL: running}, mean_hold_seconds={})


ROOM, FULL = nodes((2000, GIB)), nodes((100, GIB), (2000, 100 * MIB))


@pytest.mark.parametrize("state", [State.RUNNING, State.COMPLETED, State.FAILED, State.TIMEOUT, State.CANCELLED])
def test_what_runs_or_has_ended_waits_for_nothing(state: State) -> None:
    assert explain(record(state)) is None


def test_a_queued_one_says_how_many_go_before_it_and_how_long_that_takes() -> None:
    waiting = explain(record(State.QUEUED), position=place(4), queue=busy(2), capacity=FULL)
    assert waiting is not None
    assert (waiting.reason, waiting.position, waiting.ahead) == ("position", 4, 3)
    assert waiting.detail == "3 ahead of it in the small queue; 2 are running"
    assert waiting.estimated_wait_seconds == 4.0


def test_the_next_one_says_that_it_waits_for_room_where_no_node_has_both_parts_free() -> None:
    waiting = explain(record(State.QUEUED), position=place(1), queue=busy(1), capacity=FULL)
    assert waiting is not None
    assert waiting.reason == "capacity"
    assert waiting.detail == "next in the small queue; no node has 256Mi memory and 250m CPU free now; 1 is running"


def test_aging_is_told() -> None:
    waiting = explain(record(State.QUEUED, effective_priority=7), position=place(1), queue=busy(0), capacity=ROOM)
    assert waiting is not None
    assert "counts as priority 7" in waiting.detail


def test_without_any_knowledge_of_the_queue_it_still_says_which() -> None:
    for position in (None, place(0)):
        waiting = explain(record(State.QUEUED), position=position)
        assert waiting is not None
        assert (waiting.reason, waiting.position, waiting.detail) == ("position", None, "in the small queue")


def test_a_claimed_one_is_starting_or_waits_for_a_node() -> None:
    starting = explain(record(State.PROVISIONING), capacity=ROOM)
    held = explain(record(State.PROVISIONING), capacity=FULL)
    assert starting is not None
    assert held is not None
    assert (starting.reason, held.reason) == ("starting", "capacity")


@pytest.mark.parametrize("state", [State.PROVISIONING, State.RUNNING])
def test_one_that_is_being_cancelled_says_so(state: State) -> None:
    waiting = explain(record(state, cancel_requested=True))
    assert waiting is not None
    assert waiting.reason == "cancelling"


@pytest.mark.parametrize(
    ("ahead", "running", "mean", "expected"),
    [(0, 0, 2.0, 0.0), (0, 4, 2.0, 0.5), (7, 4, 2.0, 4.0), (3, 0, 2.0, 6.0), (3, 2, None, None)],
)
def test_the_estimate_spreads_the_mean_over_the_busy_slots(
    ahead: int, running: int, mean: float | None, expected: float | None
) -> None:
    assert estimate(ahead, running, mean) == expected


def test_a_request_fits_only_where_one_node_has_all_of_it() -> None:
    wanted = Resources(cpu_millis=1000, memory_bytes=512 * MIB)
    assert fits_now(wanted, ROOM)
    assert not fits_now(wanted, FULL)
    assert fits_ever(wanted, FULL)
    assert not fits_ever(Resources(cpu_millis=2001, memory_bytes=MIB), ROOM)
    assert not fits_ever(Resources(cpu_millis=1, memory_bytes=GIB + 1), ROOM)
    assert fits_ever(Resources(cpu_millis=10**6, memory_bytes=10**15), nodes())
