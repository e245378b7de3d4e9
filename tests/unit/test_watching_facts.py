"""What the cluster says of a sandbox, state by state: what is over, why, what may pass, and what nobody knows."""

from __future__ import annotations

from typing import Any

import pytest

from crucible import names
from crucible.evaluation import Reason, State
from crucible.outcome import Outcome, RunnerReport, RunnerStatus, decide
from crucible.watching.facts import Patience, Reading, holds_output, is_collected, read, sandbox_of, wanted_of
from crucible.watching.watching import owner_of

pytestmark = pytest.mark.unit

Object = dict[str, Any]

ID = "ev-01kb3v8q6m0c3r5x7z9b1d3f5h"
PATIENCE = Patience(scheduling=300, node_lost=10)
STARTED = "2026-11-30T12:00:01Z"
LABELS = {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "2"}
NODES = {
    "up": {
        "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-30T11:00:00Z"}]}
    },
    "silent": {"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}},
    "unwell": {"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "KubeletNotReady"}]}},
    "new": {"status": {}},
}
RUNNING = {"running": {"startedAt": STARTED}}


def job(*conditions: Object, stop: str = "", deleted: bool = False, collected: bool = False) -> Object:
    metadata: Object = {"name": f"{ID}-2", "labels": {**LABELS}, "annotations": {}}
    if stop:
        metadata["annotations"][names.ANNOTATION_STOP] = stop
    if deleted:
        metadata["deletionTimestamp"] = STARTED
    if collected:
        metadata["labels"][names.LABEL_COLLECTED] = "true"
    return {"metadata": metadata, "status": {"conditions": list(conditions)}}


def pod(
    state: Object | None = None,
    *,
    node: str | None = "up",
    deleted: bool = False,
    conditions: Object | None = None,
    **status: Any,
) -> Object:
    """A Pod with a container in a state; `conditions` maps types to reasons of those that are true."""
    metadata: Object = {"name": "p", "uid": "u", "labels": LABELS, "creationTimestamp": STARTED}
    if deleted:
        metadata["deletionTimestamp"] = STARTED
    told = [{"type": kind, "status": "True", "reason": reason} for kind, reason in (conditions or {}).items()]
    spec = {"nodeName": node} if node else {}
    containers = [{"name": "other"}, {"name": names.CONTAINER, "state": state}] if state is not None else []
    return {
        "metadata": metadata,
        "spec": spec,
        "status": {"conditions": told, "containerStatuses": containers, **status},
    }


def terminated(reason: str, code: int, **more: Any) -> Object:
    return {"terminated": {"reason": reason, "exitCode": code, "startedAt": STARTED, **more}}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def look(job: Object | None, pod: Object | None, *, age: float = 0.0, last_job: Object | None = None) -> Reading:
    return read(job, pod, NODES, PATIENCE, age_seconds=age, last_job=last_job)


def end_of(reading: Reading, report: RunnerReport | None = None) -> Outcome:
    """What would be recorded if it stayed so."""
    facts = reading.facts if reading.over or not reading.doubt else reading.doubt.facts
    return decide(report, facts, memory_limit=2**28, timeout_seconds=30)


OVER: dict[str, tuple[Object | None, Object | None, Reason, str]] = {
    # name: Job, Pod, reason without a report, words of the detail
    "killed for its memory, by gVisor": (job(), pod(terminated("OOMKilled", 128)), Reason.OOM_KILLED, "memory limit"),
    "killed for its memory, by runc": (job(), pod(terminated("OOMKilled", 137)), Reason.OOM_KILLED, "memory limit"),
    "killed by who knows what": (job(), pod(terminated("Error", 137)), Reason.SANDBOX_ERROR, "exit code 137"),
    "ended with 0 and no report": (job(), pod(terminated("Completed", 0)), Reason.SANDBOX_ERROR, "exit code 0"),
    "could not be started": (job(), pod(terminated("StartError", 128)), Reason.SANDBOX_ERROR, "StartError"),
    "its end was not seen": (job(), pod(terminated("ContainerStatusUnknown", 137)), Reason.NODE_LOST, "does not know"),
    "its end was not seen by containerd": (job(), pod(terminated("Unknown", 255)), Reason.NODE_LOST, "does not know"),
    "deadline": (
        job(),
        pod(terminated("Error", 137), phase="Failed", reason="DeadlineExceeded"),
        Reason.DEADLINE,
        "did not end by itself",
    ),
    "deadline before it began": (
        job(),
        pod(waiting("ContainerCreating"), phase="Failed", reason="DeadlineExceeded"),
        Reason.SANDBOX_ERROR,
        "did not start",
    ),
    "deadline and killed for its memory": (
        job(),
        pod(terminated("OOMKilled", 137), phase="Failed", reason="DeadlineExceeded"),
        Reason.OOM_KILLED,
        "memory limit",
    ),
    "evicted": (
        job(),
        pod(terminated("Error", 137), phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        Reason.EVICTED,
        "low on resource",
    ),
    "evicted for its disk": (
        job(),
        pod(phase="Failed", reason="Evicted", message="Pod ephemeral local storage usage exceeds the total limit"),
        Reason.EVICTED,
        "ephemeral local storage",
    ),
    "evicted, as a condition alone says": (
        job(),
        pod(terminated("Error", 137), conditions={"DisruptionTarget": "EvictionByEvictionAPI"}, deleted=True),
        Reason.PREEMPTED,
        "EvictionByEvictionAPI",
    ),
    "preempted": (
        job(),
        pod(terminated("Error", 137), conditions={"DisruptionTarget": "PreemptionByScheduler"}, deleted=True),
        Reason.PREEMPTED,
        "PreemptionByScheduler",
    ),
    "its node shuts down in order": (
        job(),
        pod(terminated("Error", 137), phase="Failed", reason="Terminated"),
        Reason.PREEMPTED,
        "Terminated",
    ),
    "given up by the taint manager": (
        job(),
        pod(RUNNING, node="silent", conditions={"DisruptionTarget": "DeletionByTaintManager"}, deleted=True),
        Reason.NODE_LOST,
        "DeletionByTaintManager",
    ),
    "given up with its node": (
        job(),
        pod(RUNNING, node="gone", conditions={"DisruptionTarget": "DeletionByPodGC"}, phase="Failed", deleted=True),
        Reason.NODE_LOST,
        "DeletionByPodGC",
    ),
    "refused by its node": (
        job(),
        pod(phase="Failed", reason="OutOfcpu", message="Node didn't have enough resource: cpu"),
        Reason.SANDBOX_ERROR,
        "OutOfcpu: Node didn't have enough",
    ),
    "deleted by hand": (job(), pod(terminated("Error", 137), deleted=True), Reason.SANDBOX_ERROR, "Pod was deleted"),
    "deleted by hand before it had a node": (job(), pod(node=None, deleted=True), Reason.SANDBOX_ERROR, "Pod was deleted"),
    "all of it deleted by hand": (None, None, Reason.SANDBOX_ERROR, "deleted from the cluster"),
    "its Job deleted before it had a Pod": (job(deleted=True), None, Reason.SANDBOX_ERROR, "Job was deleted"),
    "cancelled while it ran": (
        job(stop="cancelled_by_user"),
        pod(terminated("Error", 137), deleted=True),
        Reason.CANCELLED_BY_USER,
        "cancelled on request",
    ),
    "cancelled by an operator while it was given up": (
        job(stop="cancelled_by_operator"),
        pod(RUNNING, node="silent", conditions={"DisruptionTarget": "DeletionByTaintManager"}, deleted=True),
        Reason.CANCELLED_BY_OPERATOR,
        "cancelled on request",
    ),
    "stopped by a worker that stops": (
        job(stop="preempted"),
        pod(terminated("Error", 137), deleted=True),
        Reason.PREEMPTED,
        "",
    ),
    "stopped before it had a Pod": (job(stop="cancelled_by_user"), None, Reason.CANCELLED_BY_USER, "cancelled"),
    "stopped for no reason that there is": (
        job(stop="exit_zero"),
        pod(terminated("Error", 137), deleted=True),
        Reason.SANDBOX_ERROR,
        "Pod was deleted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER)
def test_what_is_over_has_its_reason_and_no_exit_code(name: str) -> None:
    job, pod, reason, words = OVER[name]
    reading = look(job, pod)
    assert reading.over
    outcome = end_of(reading)
    assert (outcome.reason, outcome.exit_code, outcome.signal) == (reason, None, None)
    assert words in outcome.detail


DOUBTS: dict[str, tuple[Object | None, Object | None, str, float, Reason]] = {
    # name: Job, Pod, kind of doubt, seconds that it may last, reason if it lasts
    "no Pod yet": (job(), None, "no pod", 300, Reason.SCHEDULING),
    "its Pod is gone, and the Job has failed": (
        job({"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}), None, "pod gone", 2, Reason.SANDBOX_ERROR,
    ),
    "no node has taken it": (job(), pod(node=None), "scheduling", 300, Reason.SCHEDULING),
    "its node has not begun": (job(), pod(), "start", 60, Reason.SANDBOX_ERROR),
    "its sandbox is not made": (job(), pod(waiting("ContainerCreating")), "start", 60, Reason.SANDBOX_ERROR),
    "no such image": (job(), pod(waiting("ErrImageNeverPull")), "image", 0, Reason.IMAGE_ERROR),
    "no such name": (job(), pod(waiting("InvalidImageName")), "image", 0, Reason.IMAGE_ERROR),
    "image not pulled": (job(), pod(waiting("ErrImagePull")), "image", 10, Reason.IMAGE_ERROR),
    "image still not pulled": (job(), pod(waiting("ImagePullBackOff")), "image", 10, Reason.IMAGE_ERROR),
    "container not made": (job(), pod(waiting("CreateContainerError")), "container", 10, Reason.SANDBOX_ERROR),
    "no ConfigMap": (job(), pod(waiting("CreateContainerConfigError")), "container", 10, Reason.SANDBOX_ERROR),
    "container not run": (job(), pod(waiting("RunContainerError")), "container", 10, Reason.SANDBOX_ERROR),
    "node silent": (job(), pod(RUNNING, node="silent"), "node lost", 10, Reason.NODE_LOST),
    "node unwell": (job(), pod(RUNNING, node="unwell"), "node lost", 10, Reason.NODE_LOST),
    "node has told nothing": (job(), pod(RUNNING, node="new"), "node lost", 10, Reason.NODE_LOST),
    "node not known": (job(), pod(RUNNING, node="gone"), "node unknown", 5, Reason.NODE_LOST),
    "node silent before its log was read": (
        job(), pod(terminated("Completed", 0), node="silent"), "node lost", 10, Reason.NODE_LOST,
    ),
    "node silent, and it was asked to stop": (
        job(stop="cancelled_by_user"), pod(RUNNING, node="silent"), "node lost", 10, Reason.CANCELLED_BY_USER,
    ),
    "deleted, and still running": (job(), pod(RUNNING, deleted=True), "ending", 10, Reason.SANDBOX_ERROR),
    "deleted before it ran": (job(), pod(waiting("ContainerCreating"), deleted=True), "ending", 10, Reason.SANDBOX_ERROR),
    "past its deadline, and still running": (
        job(), pod(RUNNING, phase="Failed", reason="DeadlineExceeded"), "ending", 10, Reason.DEADLINE,
    ),
    "evicted, and still running": (
        job(), pod(RUNNING, phase="Failed", reason="Evicted"), "ending", 10, Reason.EVICTED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_what_may_pass_is_awaited_for_its_time_and_then_is_the_end(name: str) -> None:
    job, pod, kind, seconds, reason = DOUBTS[name]
    reading = look(job, pod)
    assert not reading.over
    assert reading.doubt is not None
    assert (reading.doubt.kind, reading.doubt.seconds) == (kind, seconds)
    assert end_of(reading).reason is reason
    assert reading.doubt.seconds_left(seconds) <= 0


def test_the_time_without_a_node_counts_from_the_jobs_beginning_whoever_watches() -> None:
    for waits in (look(job(), None, age=299), look(job(), pod(node=None), age=299)):
        assert waits.doubt is not None
        assert waits.doubt.seconds_left(0) == 1


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing", "SomethingNew"])
def test_a_sandbox_that_is_made_may_pull_its_image_for_as_long_as_its_deadline(reason: str) -> None:
    reading = look(job(), pod(waiting(reason), conditions={"PodReadyToStartContainers": ""}))
    assert (reading.over, reading.doubt) == (False, None)


def test_what_runs_is_read_and_not_doubted() -> None:
    reading = look(job(), pod(RUNNING))
    assert (reading.over, reading.readable, reading.exited, reading.doubt) == (False, True, False, None)
    assert reading.started_at is not None
    assert reading.started_at.isoformat() == "2026-11-30T12:00:01+00:00"


def test_a_log_is_read_only_where_something_ran_and_its_node_answers() -> None:
    assert look(job(), pod(terminated("Error", 1))).readable
    assert not look(job(), pod(terminated("StartError", 128))).readable
    assert not look(job(), pod(terminated("Error", 1), node="silent")).readable
    assert not look(job(), pod(waiting("ErrImagePull"))).readable


def test_a_node_that_was_away_makes_an_open_stream_suspect() -> None:
    before, back = look(job(), pod(RUNNING)), NODES["up"]["status"]["conditions"][0]
    again = {"up": {"status": {"conditions": [{**back, "lastTransitionTime": "2026-11-30T12:00:30Z"}]}}}
    assert read(job(), pod(RUNNING), again, PATIENCE, age_seconds=0).log_era != before.log_era


def test_only_a_container_that_ended_well_is_believed_to_have_written_its_message() -> None:
    forged = '{"status":"exited","exit_code":0}'
    assert look(job(), pod(terminated("Completed", 0, message=forged))).message == forged
    for reason, code in (("OOMKilled", 128), ("Error", 137), ("Completed", 1), ("ContainerStatusUnknown", 0)):
        assert look(job(), pod(terminated(reason, code, message=forged))).message is None


def test_a_job_that_is_gone_still_says_why_it_was_stopped() -> None:
    stopped = job(stop="cancelled_by_user")
    assert end_of(look(None, None, last_job=stopped)).state is State.CANCELLED
    assert end_of(look(None, pod(terminated("Error", 137), deleted=True), last_job=stopped)).state is State.CANCELLED


def test_a_report_is_believed_before_a_deletion_and_after_a_loss() -> None:
    report = RunnerReport(status=RunnerStatus.EXITED, exit_code=3)
    deleted = look(job(), pod(terminated("Completed", 0), deleted=True))
    assert end_of(deleted, report).exit_code == 3
    assert end_of(deleted, report).reason is Reason.EXIT_NONZERO
    lost = look(job(), pod(RUNNING, node="silent"))
    assert end_of(lost, report).reason is Reason.NODE_LOST
    assert end_of(lost, RunnerReport(status=RunnerStatus.EXITED, exit_code=0)).reason is Reason.EXIT_ZERO


def test_what_a_node_says_is_cleaned_and_cut() -> None:
    said = look(job(), pod(phase="Failed", reason="Evicted", message="\x1b[2J" + "x" * 5000)).facts.exit_description
    assert said is not None
    assert said.startswith("Evicted: ?[2Jxx")
    assert len(said) == 1000


def test_names_marks_and_wishes_are_read_from_the_objects() -> None:
    assert sandbox_of(job()) == f"{ID}-2"
    assert sandbox_of({"metadata": {"name": "x"}}) is None
    assert sandbox_of({"metadata": {"labels": {names.LABEL_EVALUATION: "nonsense", names.LABEL_ATTEMPT: "1"}}}) is None
    assert sandbox_of({"metadata": {"labels": {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: "one"}}}) is None
    assert is_collected(job(collected=True))
    assert not is_collected(job())
    assert not is_collected(None)
    kept = pod()
    assert not holds_output(kept)
    kept["metadata"]["finalizers"] = ["batch.kubernetes.io/job-tracking", names.FINALIZER_OUTPUT]
    assert holds_output(kept)
    kept["metadata"]["annotations"] = {names.ANNOTATION_MEMORY_BYTES: "1024", names.ANNOTATION_TIMEOUT_SECONDS: "7"}
    wanted = wanted_of(None, kept)
    assert (wanted.memory_bytes, wanted.timeout_seconds) == (1024, 7)
    assert wanted_of(job(stop="x"), None).memory_bytes == 0


def test_each_sandbox_has_one_owner_and_keeps_it_when_another_member_comes_or_goes() -> None:
    sandboxes = [f"{ID}-{number}" for number in range(300)]
    three = {name: owner_of(name, ["a", "b", "c"]) for name in sandboxes}
    assert three == {name: owner_of(name, ["c", "a", "b"]) for name in sandboxes}
    assert all(70 < list(three.values()).count(member) < 130 for member in "abc")
    two = {name: owner_of(name, ["a", "b"]) for name in sandboxes}
    assert all(two[name] == owner for name, owner in three.items() if owner != "c")
    assert owner_of(sandboxes[0], []) is None
