"""What cleanup may remove and how: its pure rules, and the queue of what it looks at."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crucible import names
from crucible.cleanup.queue import WorkQueue
from crucible.cleanup.rules import (
    COLLECTOR_S,
    RELEASE_AFTER_S,
    Attempt,
    Step,
    Why,
    attempt_of,
    node_lost,
    obstacle,
    orphan_age,
    pod_step,
    why_over,
    youngest_seconds,
)
from crucible.contracts import EvaluationRecord
from crucible.evaluation import Resources, State
from crucible.limits import SizeClass
from tests.support.waits import pass_time

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ID = "ev-01jd3v8q6m0c3r5x7z9b1d3f5h"


def record(state: State, attempt: int) -> EvaluationRecord:
    times = dict.fromkeys(("queued_at", "provisioning_at", "started_at", "finished_at"))
    return EvaluationRecord(
        id=ID,
        owner="test",
        state=state,
        priority=5,
        effective_priority=5,
        size_class=SizeClass.SMALL,
        resources=Resources(cpu_millis=100, memory_bytes=2**26),
        image="python",
        labels={},
        timeout_seconds=60,
        queue_timeout_seconds=None,
        code_sha256="",
        seq=3,
        attempt=attempt,
        submitted_at=NOW,
        **times,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("known", "why"),
    [
        (None, Why.UNKNOWN),
        (record(State.PROVISIONING, 2), None),
        (record(State.RUNNING, 2), None),
        (record(State.RUNNING, 3), Why.VOID),
        (record(State.RUNNING, 1), Why.VOID),
        (record(State.QUEUED, 2), Why.VOID),
        (record(State.COMPLETED, 2), Why.ENDED),
        (record(State.CANCELLED, 2), Why.ENDED),
        (record(State.COMPLETED, 3), Why.VOID),
    ],
    ids=lambda value: f"{value.state}-{value.attempt}" if isinstance(value, EvaluationRecord) else str(value),
)
def test_an_attempt_is_over_unless_storage_holds_that_very_attempt(
    known: EvaluationRecord | None, why: Why | None
) -> None:
    assert why_over(known, Attempt(ID, 2)) == why


@pytest.mark.parametrize(
    "labels",
    [
        None,
        {},
        {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "1"},
        {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "1", names.LABEL_MANAGED_BY: "someone"},
        {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "one", names.LABEL_MANAGED_BY: names.MANAGED_BY},
        {names.LABEL_ATTEMPT: "1", names.LABEL_MANAGED_BY: names.MANAGED_BY},
    ],
)
def test_what_does_not_carry_all_our_labels_is_not_ours(labels: dict[str, str] | None) -> None:
    assert attempt_of({"metadata": {"name": f"{ID}-1", "labels": labels}}) is None


def test_an_object_of_ours_names_its_attempt() -> None:
    labels = {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "7", names.LABEL_MANAGED_BY: names.MANAGED_BY}
    assert attempt_of({"metadata": {"labels": labels}}) == Attempt(ID, 7)


def test_orphans_are_as_old_as_their_youngest_object_and_less_suffices_above_the_high_water_mark() -> None:
    made = [{"metadata": {"creationTimestamp": (NOW - timedelta(seconds=age)).isoformat()}} for age in (900, 30)]
    assert youngest_seconds(made, NOW) == 30
    assert orphan_age(900, objects=2000, high_water=2000) == 900
    assert orphan_age(900, objects=2001, high_water=2000) == 450


def pod(
    *, ours: bool = False, terminating: bool = False, node: str | None = "w1", owner: str | None = None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "a", "finalizers": [names.FINALIZER_OUTPUT] if ours else []}
    if terminating:
        metadata["deletionTimestamp"] = NOW.isoformat()
    if owner:
        metadata["ownerReferences"] = [{"kind": "Job", "name": owner}]
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}}


def node(ready: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": "Ready", "status": ready}]}}


UP, DOWN = {"w1": node("True")}, {"w1": node("Unknown")}
LATE = 100.0


@pytest.mark.parametrize(
    ("thing", "nodes", "owned", "waited", "step"),
    [
        # Its Job goes, and it with it.
        (pod(), UP, True, 0.0, Step.WAIT),
        # It has gone, and the garbage collector is on its way.
        (pod(owner="a"), UP, False, 0.0, Step.WAIT),
        (pod(owner="a"), UP, False, COLLECTOR_S, Step.DELETE),
        # Nobody else will.
        (pod(), UP, False, 0.0, Step.DELETE),
        # Kept by us: the watcher takes the finalizer away; only one that died leaves it.
        (pod(ours=True, terminating=True), UP, False, 0.0, Step.WAIT),
        (pod(ours=True, terminating=True), DOWN, False, RELEASE_AFTER_S, Step.RELEASE),
        # Its node has time to end it, and is not hurried while it answers.
        (pod(terminating=True), UP, False, LATE, Step.WAIT),
        (pod(terminating=True), DOWN, False, 5.0, Step.WAIT),
        (pod(terminating=True), DOWN, False, LATE, Step.FORCE),
        (pod(terminating=True), {}, False, LATE, Step.FORCE),
        # Never placed, so no node has a word in it.
        (pod(terminating=True, node=None), UP, False, LATE, Step.WAIT),
    ],
)
def test_a_pod_is_removed_without_its_nodes_word_only_once_recorded_and_the_node_is_lost(
    thing: dict[str, Any], nodes: dict[str, Any], owned: bool, waited: float, step: Step
) -> None:
    assert pod_step(thing, nodes, owned=owned, waited=waited, node_lost_seconds=10.0) == step


def test_a_node_is_lost_when_it_is_gone_or_not_heard() -> None:
    assert [node_lost(found) for found in (None, node("Unknown"), node("False"), {}, node("True"))] == [True] * 4 + [
        False
    ]


def test_an_obstacle_is_named() -> None:
    kept = {"metadata": {"finalizers": ["a/b"], "deletionTimestamp": "now"}}
    assert obstacle(kept) == "is kept by the finalizers a/b"
    assert "node w1" in obstacle(pod(terminating=True))
    assert obstacle({"metadata": {}}) == "is not being deleted"


# --- the queue ------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_urgent_comes_first_and_each_key_is_with_one_worker_at_a_time() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock())
    queue.add("orphan", urgent=False)
    queue.add("recorded")
    queue.add("recorded")
    assert await queue.get() == "recorded"
    queue.add("recorded")
    assert await queue.get() == "orphan"
    queue.done("orphan")
    waiting = asyncio.ensure_future(queue.get())
    await pass_time(0)
    assert not waiting.done()
    queue.done("recorded")
    # It changed while it was looked at.
    assert await waiting == "recorded"
    assert not queue.empty.is_set()
    queue.done("recorded")
    assert queue.empty.is_set()


async def test_what_failed_waits_longer_each_time_unless_it_changes() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a")
    pauses = []
    for _ in range(9):
        began = clock.now
        await queue.get()
        queue.retry("a")
        while True:
            clock.now += 0.05
            if any(due <= clock.now for _, due in queue._due.values()):
                break
        pauses.append(round(clock.now - began, 1))
    assert pauses == sorted(pauses)
    assert 0.2 <= pauses[0] <= 0.3
    assert pauses[-1] == pytest.approx(15, abs=0.2)
    await queue.get()
    queue.add("a")
    queue.retry("a")
    assert await queue.get() == "a"
