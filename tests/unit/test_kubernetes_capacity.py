"""The view of a cluster's room: what it says follows nodes, Pods and quotas, and is never a surprise to the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from crucible import names
from crucible.contracts import Fit
from crucible.dispatcher.kubernetes.capacity import ClusterCapacity, amounts_of, held_by
from crucible.dispatcher.kubernetes.errors import problem_of
from crucible.evaluation import Resources
from crucible.kubernetes.api import ApiError, ApiUnreachableError
from crucible.kubernetes.reflector import Change, ChangeKind
from crucible.limits import Limits
from crucible.quantity import GIB, MIB
from crucible.settings import KubernetesSettings

pytestmark = pytest.mark.unit

ID = "ev-00000000000000000000000001"
SMALL = Resources(cpu_millis=250, memory_bytes=256 * MIB)
LABELS = {names.LABEL_SANDBOX_NODE: "true", names.LABEL_GVISOR: names.GVISOR_READY}
READY = [{"type": "Ready", "status": "True"}]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """A view that is told of changes, as reflectors tell of them."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.view = ClusterCapacity(KubernetesSettings(**settings), Limits(), self.clock)

    def node(self, name: str, *, cpu: str = "2", memory: str = "2Gi", gone: bool = False, **parts: Any) -> None:
        allocatable = {"cpu": cpu, "memory": memory, "ephemeral-storage": "20Gi", "pods": "110"}
        node = {
            "metadata": {"name": name, "labels": parts.get("labels", LABELS)},
            "spec": parts.get("spec", {}),
            "status": {"allocatable": allocatable, "conditions": parts.get("conditions", READY)},
        }
        self.view.on_node(Change(ChangeKind.DELETED if gone else ChangeKind.MODIFIED, node, None))

    def pod(
        self, attempt: int, node: str | None = None, *, phase: str = "Pending", gone: bool = False, **status: Any
    ) -> None:
        requests = {"cpu": "250m", "memory": "256Mi", "ephemeral-storage": "344Mi"}
        pod = {
            "metadata": {
                "name": f"{ID}-{attempt}-x",
                "namespace": "n",
                "labels": {names.LABEL_EVALUATION: ID, names.LABEL_ATTEMPT: str(attempt)},
            },
            "spec": {
                "containers": [{"resources": {"requests": requests}}],
                "overhead": {"cpu": "50m", "memory": "96Mi"},
                **({"nodeName": node} if node else {}),
            },
            "status": {"phase": phase, **status},
        }
        self.view.on_pod(Change(ChangeKind.DELETED if gone else ChangeKind.MODIFIED, pod, None))

    def quota(self, used: dict[str, str] | None = None, **hard: str) -> None:
        named = {name.replace("_", ".").replace("count.jobs", "count/jobs"): each for name, each in hard.items()}
        quota = {
            "metadata": {"name": "q", "namespace": "n"},
            "spec": {"hard": named},
            "status": {"hard": named, "used": used or {}},
        }
        self.view.on_quota(Change(ChangeKind.MODIFIED, quota, None))

    def fit(self, wanted: Resources = SMALL) -> tuple[Fit, str]:
        answer = self.view.check(wanted)
        return answer.fit, answer.reason or ""


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.node("w1")
    cluster.node("w2", memory="4Gi")
    return cluster


def test_room_on_one_node_is_room(cluster: Cluster) -> None:
    assert cluster.fit() == (Fit.NOW, "")
    assert cluster.fit(Resources(cpu_millis=1000, memory_bytes=3 * GIB))[0] is Fit.NOW


def test_what_no_node_can_hold_with_its_sandbox_never_fits(cluster: Cluster) -> None:
    fit, reason = cluster.fit(Resources(cpu_millis=100, memory_bytes=4 * GIB))
    assert fit is Fit.NEVER
    assert reason.startswith(
        "asks for 100m CPU and 4Gi, which with its sandbox no node can hold; the largest has 2 CPU, 4Gi"
    )
    largest = cluster.view.check(SMALL).largest
    assert largest == Resources(cpu_millis=1950, memory_bytes=4 * GIB - 96 * MIB)
    assert cluster.fit(largest)[0] is Fit.NOW


def test_several_nodes_do_not_add_up(cluster: Cluster) -> None:
    assert cluster.fit(Resources(cpu_millis=2500, memory_bytes=GIB))[0] is Fit.NEVER


def test_pods_hold_their_nodes_room_until_they_have_ended(cluster: Cluster) -> None:
    for attempt in range(6):
        cluster.pod(attempt, "w1", phase="Running")
        cluster.pod(attempt + 100, "w2", phase="Running")
    fit, reason = cluster.fit()
    assert fit is Fit.LATER
    assert reason == "200m CPU and 1984Mi free now on the emptiest of 2 nodes; 12 sandboxes hold the rest"
    for attempt in (3, 4):
        cluster.pod(attempt, "w1", phase="Succeeded")
    assert cluster.fit()[0] is Fit.NOW
    cluster.pod(3, gone=True)
    assert cluster.view.sandboxes == 10


def test_what_was_just_asked_for_counts_until_its_pod_does(cluster: Cluster) -> None:
    big = Resources(cpu_millis=1900, memory_bytes=GIB)
    assert [cluster.view.reserve(f"{ID}-{n}", big).fit for n in range(3)] == [Fit.NOW, Fit.NOW, Fit.LATER]
    assert cluster.view.reserve(f"{ID}-1", big).fit is Fit.NOW, "asked again by a caller who lost the answer"
    cluster.pod(0, "w1")
    assert cluster.view.sandboxes == 2
    assert cluster.fit(big)[0] is Fit.LATER
    cluster.view.release(f"{ID}-1")
    assert cluster.fit(big)[0] is Fit.NOW


def test_a_pod_that_never_appears_does_not_hold_room_for_ever(cluster: Cluster) -> None:
    big = Resources(cpu_millis=1900, memory_bytes=GIB)
    for n in range(2):
        cluster.view.reserve(f"{ID}-{n}", big)
    cluster.clock.now = 61
    assert cluster.view.reserve(f"{ID}-3", big).fit is Fit.NOW


def container(**state: Any) -> dict[str, Any]:
    """The status of a Pod that has a node and a container in this state."""
    scheduled = {"type": "PodScheduled", "status": "True"}
    return {"conditions": [scheduled], "containerStatuses": [{"name": "runner", "state": state}]}


STARTING = container(waiting={"reason": "ContainerCreating"})


def test_only_so_many_start_at_a_time_and_each_that_has_started_makes_way() -> None:
    cluster = Cluster(starting_per_node=2)
    cluster.node("w1", cpu="16", memory="64Gi")
    for attempt in range(2):
        assert cluster.view.reserve(f"{ID}-{attempt}", SMALL).fit is Fit.NOW
    assert cluster.fit() == (Fit.LATER, "2 sandboxes are starting, as many as 1 nodes start at a time")
    cluster.node("w2", cpu="16", memory="64Gi")
    assert cluster.fit()[0] is Fit.NOW
    cluster.node("w2", gone=True)
    cluster.pod(0, "w1", **STARTING)
    cluster.pod(1, "w1", **STARTING)
    assert cluster.fit()[0] is Fit.LATER
    cluster.pod(0, "w1", phase="Running", **container(running={}))
    assert cluster.view.starting == 1
    assert cluster.fit()[0] is Fit.NOW


@pytest.mark.parametrize(
    "status",
    [
        # Over before the kubelet has said that it ran.
        container(terminated={"exitCode": 0}),
        container(waiting={"reason": "ImagePullBackOff"}),
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]},
        {"phase": "Running"},
        {"phase": "Failed"},
    ],
)
def test_what_is_not_coming_up_is_in_nobodys_way(status: Any) -> None:
    cluster = Cluster(starting_per_node=1)
    cluster.node("w1", cpu="16", memory="64Gi")
    cluster.pod(0, "w1", **STARTING)
    assert cluster.fit()[0] is Fit.LATER
    cluster.pod(0, "w1", **status)
    assert cluster.fit()[0] is Fit.NOW


def test_a_pod_that_never_comes_up_is_in_the_way_for_a_while_only_however_often_it_is_heard_of() -> None:
    cluster = Cluster(starting_per_node=1)
    cluster.node("w1", cpu="16", memory="64Gi")
    for cluster.clock.now in (0, 30, 59):
        cluster.pod(0, "w1", **STARTING)
        assert cluster.fit()[0] is Fit.LATER
    cluster.clock.now = 61
    assert cluster.fit()[0] is Fit.NOW
    cluster.pod(0, "w1", **STARTING)
    assert cluster.fit()[0] is Fit.NOW


def test_pods_without_a_node_are_given_room_first(cluster: Cluster) -> None:
    for attempt in range(12):
        cluster.pod(attempt)
    assert cluster.fit()[0] is Fit.LATER


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spec": {"unschedulable": True}}, "w1: cordoned"),
        ({"conditions": [{"type": "Ready", "status": "Unknown"}]}, "w1: not ready"),
        ({"spec": {"taints": [{"key": names.TAINT_NOT_READY, "effect": "NoSchedule"}]}}, "w1: tainted"),
        ({"labels": {names.LABEL_SANDBOX_NODE: "true"}}, "w1: gVisor is not ready"),
    ],
)
def test_a_node_that_takes_no_sandboxes_has_no_room_now_and_may_have_later(change: Any, word: str) -> None:
    cluster = Cluster()
    cluster.node("w1", **change)
    fit, reason = cluster.fit()
    assert fit is Fit.LATER
    assert word in reason
    assert [node.free_memory_bytes for node in cluster.view.report().nodes] == [0]
    cluster.node("w1", spec={"taints": [{"key": names.TAINT_SANDBOX, "effect": "NoSchedule"}]})
    assert cluster.fit() == (Fit.NOW, "")


def test_what_a_node_that_went_away_could_hold_waits_for_a_while() -> None:
    cluster = Cluster()
    assert cluster.fit() == (Fit.LATER, "there is no node for sandboxes now")
    cluster.node("w1")
    cluster.node("w2", memory="4Gi")
    cluster.node("w2", gone=True)
    large = Resources(cpu_millis=100, memory_bytes=3 * GIB)
    assert cluster.fit(large)[0] is Fit.LATER
    cluster.clock.now = 1801
    assert cluster.fit(large)[0] is Fit.NEVER


def test_a_quota_that_is_used_up_is_no_room_now_and_one_too_small_is_none_ever(cluster: Cluster) -> None:
    cluster.quota({"requests.memory": "900Mi"}, requests_memory="1Gi")
    assert cluster.fit() == (Fit.LATER, "the quota q is used up: 900Mi of 1Gi requests.memory")
    cluster.quota({"requests.memory": "0"}, requests_memory="300Mi")
    assert cluster.fit() == (Fit.NEVER, "asks for 250m CPU and 256Mi; the quota q allows 300Mi requests.memory in all")


def test_a_quota_counts_what_was_just_asked_for(cluster: Cluster) -> None:
    cluster.quota(pods="2")
    assert [cluster.view.reserve(f"{ID}-{n}", SMALL).fit for n in range(3)] == [Fit.NOW, Fit.NOW, Fit.LATER]


def test_less_cpu_set_aside_makes_room_for_more() -> None:
    cluster = Cluster(cpu_request_percent=10, reserve_memory_bytes=GIB, starting_per_node=100)
    cluster.node("w1", memory="64Gi")
    fits = [cluster.view.reserve(f"{ID}-{n}", SMALL).fit for n in range(60)]
    # Each takes 25m and the sandbox's own 50m of 2 CPU.
    assert fits.count(Fit.NOW) == 26
    [node] = cluster.view.report().nodes
    assert (node.total.memory_bytes, node.runtime) == (63 * GIB, "kubernetes")


def test_quantities_as_the_api_server_writes_them() -> None:
    amounts = amounts_of({"cpu": "1930m", "memory": "3388364Ki", "ephemeral-storage": "18242267924", "pods": "58"})
    assert amounts == (1930, 3388364 * 1024, 18242267924, 58)
    assert held_by({"spec": {"containers": [{}]}}) == (0, 0, 0, 1)


NO_RIGHT = 'jobs.batch is forbidden: User "x" cannot create resource "jobs" in API group "batch"'
TERMINATING = {"causes": [{"reason": "NamespaceTerminating"}]}


@pytest.mark.parametrize(
    ("error", "slug"),
    [
        (ApiError(403, "Forbidden", 'jobs.batch "j" is forbidden: exceeded quota: q, requested: 1'), "no-capacity"),
        (ApiError(403, "Forbidden", "ValidatingAdmissionPolicy 'x' denied request: no gVisor"), "sandbox-refused"),
        (ApiError(422, "Invalid", "spec.template: Invalid value"), "sandbox-refused"),
        (ApiError(413, "RequestEntityTooLarge", "limit is 3145728"), "sandbox-refused"),
        (ApiError(403, "Forbidden", NO_RIGHT), "cluster-unavailable"),
        (ApiError(403, "Forbidden", "it takes the right to create sandboxes.crucible.dev"), "cluster-unavailable"),
        (ApiError(403, "Forbidden", "the namespace is being terminated", TERMINATING), "cluster-unavailable"),
        (ApiError(401, "Unauthorized", "Unauthorized"), "cluster-unavailable"),
        (ApiError(404, "NotFound", 'namespaces "crucible-evaluations" not found'), "cluster-unavailable"),
        (ApiError(429, "TooManyRequests", "slow down", {"retryAfterSeconds": 3}), "cluster-unavailable"),
        (ApiError(500, "InternalError", "etcdserver: leader changed"), "cluster-unavailable"),
        (ApiUnreachableError("connection refused"), "cluster-unavailable"),
    ],
)
def test_only_what_is_the_sandboxs_own_fault_is_final(error: ApiError, slug: str) -> None:
    problem = problem_of(error)
    assert problem.kind.slug == slug
    assert (problem.retry_after == 3) == (error.status == 429)
