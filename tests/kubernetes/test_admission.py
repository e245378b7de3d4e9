"""Nothing runs as an evaluation with less isolation than the dispatcher asks for, whoever asks for it.

The control is what the dispatcher really makes; each case changes one thing in it. A Job is refused by our admission alone, since Pod Security
only warns about Jobs; the same as a bare Pod is refused by whichever of the two comes first.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from crucible import names
from crucible.kubernetes.api import JOBS, PODS, ApiError, KubernetesApi, Resource, from_kubeconfig
from tests.support.policies import (
    LISTED_IMAGE,
    Object,
    allow_image,
    changed,
    make_objects,
    pod_of,
    try_kubectl,
)
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

EVALUATIONS = names.EVALUATION_NAMESPACE
CONTAINER = ("containers", 0)
SECURITY = (*CONTAINER, "securityContext")
DIGEST = "sha256:" + "b" * 64


@pytest.fixture(scope="module")
def guarded(guarded_cluster: Cluster) -> Cluster:
    """A cluster with the policies in force, and an image on the list."""
    cluster = guarded_cluster
    allow_image(cluster, "admission-test", LISTED_IMAGE)

    def admitted() -> bool:
        job = json.dumps(make_objects().job)
        return try_kubectl(cluster, "create", "--dry-run=server", "-f", "-", input=job)[0] == 0

    wait_until(admitted, timeout=15, describe="the new list of images to be in force")
    return cluster


def volume(**source: object) -> Object:
    return {"name": "more", **source}


def container(**more: object) -> Object:
    return {**make_objects().job["spec"]["template"]["spec"]["containers"][0], "name": "second", **more}


# What is asked for; where in the Pod's spec; what is put there; what the refusal says.
LESS = {
    "no runtime class": (("runtimeClassName",), ..., "runtimeClassName must be gvisor"),
    "another runtime class": (("runtimeClassName",), "unsafe", "runtimeClassName must be gvisor"),
    "the node's network": (("hostNetwork",), True, "hostNetwork"),
    "the node's processes": (("hostPID",), True, "hostPID"),
    "the node's IPC": (("hostIPC",), True, "hostIPC"),
    "shared processes": (("shareProcessNamespace",), True, "shareProcessNamespace"),
    "a port on the node": ((*CONTAINER, "ports"), [{"containerPort": 80, "hostPort": 80}], "hostPort must not be set"),
    "another identity": (("serviceAccountName",), "default", "serviceAccountName must be evaluation"),
    "a token": (("automountServiceAccountToken",), True, "automountServiceAccountToken must be false"),
    "a token by default": (("automountServiceAccountToken",), ..., "automountServiceAccountToken must be false"),
    "a second container": (("containers", 1), container(), "one container"),
    "an init container": (("initContainers",), [container()], "without init"),
    "another name for its container": ((*CONTAINER, "name"), "other", "named evaluation"),
    "an image that is not listed": ((*CONTAINER, "image"), f"crucible.local/runner@{DIGEST}", "not on the list"),
    "a listed digest under another name": (
        (*CONTAINER, "image"),
        LISTED_IMAGE.replace("crucible.local", "evil.example"),
        "not on the list",
    ),
    "an image by tag": ((*CONTAINER, "image"), "crucible.local/runner:dev", "named by its digest"),
    "a call by the node, as a probe": (
        (*CONTAINER, "livenessProbe"),
        {"httpGet": {"host": "169.254.169.254", "port": 80}},
        "no probes",
    ),
    "a call by the node, as a hook": (
        (*CONTAINER, "lifecycle"),
        {"postStart": {"httpGet": {"host": "169.254.169.254", "port": 80}}},
        "no lifecycle hooks",
    ),
    "a variable from a Secret": (
        (*CONTAINER, "env", 0),
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "key"}}},
        "plain values",
    ),
    "all variables from a Secret": ((*CONTAINER, "envFrom"), [{"secretRef": {"name": "keys"}}], "plain values"),
    "the node's name": (
        (*CONTAINER, "env", 0),
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        "plain values",
    ),
    "a folder of the node": (("volumes", 3), volume(hostPath={"path": "/"}), "no hostPath"),
    "a Secret": (("volumes", 3), volume(secret={"secretName": "keys"}), "no hostPath, Secret"),
    "a token in a volume": (
        ("volumes", 3),
        volume(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]}),
        "token, claim or other type",
    ),
    "a Secret in a projected volume": (
        ("volumes", 3),
        volume(projected={"sources": [{"configMap": {"name": "code"}}, {"secret": {"name": "keys"}}]}),
        "no hostPath, Secret",
    ),
    "a claim": (("volumes", 3), volume(persistentVolumeClaim={"claimName": "data"}), "claim or other type"),
    "an ephemeral claim": (
        ("volumes", 3),
        volume(
            ephemeral={
                "volumeClaimTemplate": {
                    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
                }
            }
        ),
        "claim or other type",
    ),
    "a CSI volume": (("volumes", 3), volume(csi={"driver": "secrets-store.csi.k8s.io"}), "claim or other type"),
    "facts of the Pod": (
        ("volumes", 3),
        volume(downwardAPI={"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}),
        "claim or other type",
    ),
    "an NFS volume": (("volumes", 3), volume(nfs={"server": "10.0.0.1", "path": "/"}), "claim or other type"),
    "an image as a volume": (("volumes", 3), volume(image={"reference": LISTED_IMAGE}), "claim or other type"),
    "a writable root": ((*SECURITY, "readOnlyRootFilesystem"), False, "readOnlyRootFilesystem must be true"),
    "a writable root by default": ((*SECURITY, "readOnlyRootFilesystem"), ..., "readOnlyRootFilesystem must be true"),
    # The API server itself refuses them together with the promise not to gain any.
    "privileges": (
        SECURITY,
        {"privileged": True, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "privileged must not be set",
    ),
    "privileges to be gained": (
        (*SECURITY, "allowPrivilegeEscalation"),
        True,
        "allowPrivilegeEscalation must be false",
    ),
    "privileges to be gained, by default": (
        (*SECURITY, "allowPrivilegeEscalation"),
        ...,
        "allowPrivilegeEscalation must be false",
    ),
    "a capability": ((*SECURITY, "capabilities", "add"), ["NET_RAW"], "drop ALL and add none"),
    "default capabilities": ((*SECURITY, "capabilities"), ..., "drop ALL and add none"),
    "all capabilities but one": ((*SECURITY, "capabilities", "drop"), ["SYS_ADMIN"], "drop ALL and add none"),
    "root": (("securityContext", "runAsUser"), 0, "runAsUser"),
    "root in the container": ((*SECURITY, "runAsUser"), 0, "its container must not undo that"),
    "root's group": (("securityContext", "runAsGroup"), 0, "runAsGroup"),
    "root's group besides": (("securityContext", "supplementalGroups"), [0], "runAsGroup"),
    "whatever user the image has": (("securityContext", "runAsUser"), ..., "runAsUser"),
    "root to be allowed": (("securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
    "root to be allowed in the container": ((*SECURITY, "runAsNonRoot"), False, "its container must not undo that"),
    "unfiltered system calls": (
        ("securityContext", "seccompProfile"),
        {"type": "Unconfined"},
        "seccompProfile must be RuntimeDefault",
    ),
    "unfiltered system calls by default": (
        ("securityContext", "seccompProfile"),
        ...,
        "seccompProfile must be RuntimeDefault",
    ),
    "unfiltered system calls in the container": (
        (*SECURITY, "seccompProfile"),
        {"type": "Unconfined"},
        "seccompProfile must be RuntimeDefault",
    ),
    "a sysctl": (
        ("securityContext", "sysctls"),
        [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}],
        "node's defaults",
    ),
    "another SELinux type": ((*SECURITY, "seLinuxOptions"), {"type": "spc_t"}, "node's defaults"),
    "no AppArmor": ((*SECURITY, "appArmorProfile"), {"type": "Unconfined"}, "node's defaults"),
    "no CPU limit": ((*CONTAINER, "resources", "limits", "cpu"), ..., "limits of cpu"),
    "no memory limit": ((*CONTAINER, "resources", "limits", "memory"), ..., "limits of cpu, memory"),
    "no storage limit": ((*CONTAINER, "resources", "limits", "ephemeral-storage"), ..., "ephemeral-storage"),
    "memory that is promised twice": ((*CONTAINER, "resources", "requests", "memory"), "32Mi", "memory of its limit"),
    "no limits": ((*CONTAINER, "resources"), ..., "limits of cpu, memory and ephemeral-storage"),
    "a memory volume without a size": (("volumes", 1, "emptyDir"), {"medium": "Memory"}, "must have a sizeLimit"),
    "no deadline": (("activeDeadlineSeconds",), ..., "activeDeadlineSeconds"),
    "to be restarted": (("restartPolicy",), "OnFailure", "restartPolicy must be Never"),
    "the platform's priority": (("priorityClassName",), names.PRIORITY_PLATFORM, "must be crucible-evaluation"),
    "the cluster's priority": (("priorityClassName",), "system-node-critical", "must be crucible-evaluation"),
    "the default priority": (("priorityClassName",), ..., "must be crucible-evaluation"),
    "a node of its choice": (("nodeName",), "w1", "nodeName must not be set"),
    "another scheduler": (("schedulerName",), "mine", "the cluster's own scheduler"),
    "a node of the control plane": (
        ("tolerations", 0),
        {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"},
        "may tolerate only",
    ),
    "any node": (("tolerations", 0), {"operator": "Exists"}, "may tolerate only"),
    "a node whose gVisor is not proven": (
        ("tolerations", 0),
        {"key": names.TAINT_NOT_READY, "operator": "Exists"},
        "may tolerate only",
    ),
    "the cluster's names": (("dnsPolicy",), "ClusterFirst", "dnsPolicy None"),
    "the services' addresses": (("enableServiceLinks",), True, "enableServiceLinks must be false"),
    "a mount that its node sees": (
        (*CONTAINER, "volumeMounts", 0, "mountPropagation"),
        "HostToContainer",
        "shares no mounts",
    ),
}


CONTROL = "what the dispatcher makes"
UNNAMED = [names.LABEL_EVALUATION, names.LABEL_ATTEMPT, names.LABEL_MANAGED_BY]
NOT_ONE_ATTEMPT = {"backoffLimit": 1, "parallelism": 2, "completions": 2, "ttlSecondsAfterFinished": 10}
STRANGER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "stranger", "namespace": "default"},
    "spec": {"containers": [{"name": "a", "image": "a"}]},
}
PRIORITIES = [names.PRIORITY_PLATFORM, names.PRIORITY_EVALUATION]


def questions() -> Iterator[tuple[tuple[str, str], Resource, Object]]:
    """Everything that the API server is asked whether it would take it: what it is called, and what it is."""
    job = make_objects(stdin="some input").job
    yield (CONTROL, "Job"), JOBS, job
    yield (CONTROL, "Pod"), PODS, pod_of(job)
    job = make_objects().job
    for name, (path, value, _) in LESS.items():
        yield (name, "Job"), JOBS, changed(job, ("spec", "template", "spec", *path), value)
        yield (name, "Pod"), PODS, changed(pod_of(job), ("spec", *path), value)
    for label in UNNAMED:
        yield (label, "Job"), JOBS, changed(job, ("spec", "template", "metadata", "labels", label), ...)
    for field, value in NOT_ONE_ATTEMPT.items():
        yield (field, "Job"), JOBS, changed(job, ("spec", field), value)
    for priority in PRIORITIES:
        yield (priority, "Pod"), PODS, changed(STRANGER, ("spec", "priorityClassName"), priority)


@pytest.fixture(scope="module")
def refusals(guarded: Cluster) -> dict[tuple[str, str], str]:
    """Why the API server refuses each; empty where it does not. All are asked at once, since that takes two seconds and not a minute."""

    async def ask() -> dict[tuple[str, str], str]:
        async with KubernetesApi(from_kubeconfig(guarded.kubeconfig)) as api:
            asked = list(questions())
            at_once = asyncio.Semaphore(16)
            said = await asyncio.gather(*(refusal(api, resource, thing, at_once) for _, resource, thing in asked))
            return {name: why for (name, _, _), why in zip(asked, said, strict=True)}

    return asyncio.run(ask())


async def refusal(api: KubernetesApi, resource: Resource, thing: Object, at_once: asyncio.Semaphore) -> str:
    """Ask the API server to create something, without doing it, and return why it refuses; empty if it does not."""
    try:
        async with at_once:
            await api.create(resource, thing, thing["metadata"]["namespace"], dry_run=True)
    except ApiError as error:
        if error.status not in {403, 422}:
            raise
        return error.message
    return ""


Refusals = dict[tuple[str, str], str]


@pytest.mark.parametrize("kind", ["Job", "Pod"])
def test_what_the_dispatcher_makes_is_admitted(refusals: Refusals, kind: str) -> None:
    assert refusals[CONTROL, kind] == ""


@pytest.mark.parametrize("name", LESS)
def test_a_job_that_asks_for_less_isolation_is_refused_and_told_why(refusals: Refusals, name: str) -> None:
    said = refusals[name, "Job"]
    assert "crucible-evaluation-pods" in said, said
    assert LESS[name][2] in said


@pytest.mark.parametrize("name", LESS)
def test_a_pod_that_asks_for_less_isolation_is_refused(refusals: Refusals, name: str) -> None:
    assert refusals[name, "Pod"]


@pytest.mark.parametrize("label", UNNAMED)
def test_an_evaluation_says_which_one_it_is(refusals: Refusals, label: str) -> None:
    assert "says which one it is" in refusals[label, "Job"]


@pytest.mark.parametrize("field", NOT_ONE_ATTEMPT)
def test_a_job_is_one_attempt_that_stays_until_it_is_recorded(refusals: Refusals, field: str) -> None:
    assert "crucible-evaluation-jobs" in refusals[field, "Job"]


@pytest.mark.parametrize("priority", PRIORITIES)
def test_our_priorities_are_for_our_namespaces(refusals: Refusals, priority: str) -> None:
    assert f"the priority {priority} is for" in refusals[priority, "Pod"]


# --- who may --------------------------------------------------------------------------------------------------------------


def as_user(user: str, *groups: str) -> list[str]:
    return [f"--as={user}", *(f"--as-group={group}" for group in groups)]


DISPATCHER = as_user("system:serviceaccount:crucible:dispatcher", "system:serviceaccounts", "system:authenticated")


@pytest.fixture(scope="module")
def editor(guarded: Cluster) -> list[str]:
    """Someone with the cluster's own role `edit` in the namespace: may create Jobs and Pods, as far as RBAC goes."""
    where = ("--namespace", EVALUATIONS)
    try_kubectl(guarded, "create", "rolebinding", "admission-test", *where, "--clusterrole=edit", "--user=editor")
    return as_user("editor", "system:authenticated")


def test_the_dispatcher_may_make_jobs_and_only_with_their_isolation(guarded: Cluster) -> None:
    job = make_objects().job
    create = ("create", "--dry-run=server", "-f", "-", *DISPATCHER)
    assert try_kubectl(guarded, *create, input=json.dumps(job))[0] == 0
    bare = changed(job, ("spec", "template", "spec", "runtimeClassName"), ...)
    code, said = try_kubectl(guarded, *create, input=json.dumps(bare))
    assert code != 0
    assert "runtimeClassName must be gvisor" in said


@pytest.mark.parametrize("kind", ["Job", "Pod"])
def test_the_right_to_create_jobs_and_pods_is_not_enough_to_make_evaluations(
    guarded: Cluster, editor: list[str], kind: str
) -> None:
    job = make_objects().job
    thing = json.dumps(job if kind == "Job" else pod_of(job))
    code, said = try_kubectl(guarded, "create", "--dry-run=server", "-f", "-", *editor, input=thing)
    assert code != 0
    assert "editor may not make evaluations" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("secret", "generic", "keys"),
        ("service", "clusterip", "door", "--tcp=80"),
        ("deployment", "server", "--image=server"),
        ("cronjob", "again", "--image=again", "--schedule=* * * * *"),
        ("ingress", "door", "--rule=a.example/=door:80"),
        ("token", "evaluation"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_else_is_made_in_the_namespace(guarded: Cluster, arguments: tuple[str, ...]) -> None:
    dry_run = () if arguments[0] == "token" else ("--dry-run=server",)
    code, said = try_kubectl(guarded, "create", *arguments, "--namespace", EVALUATIONS, *dry_run)
    assert code != 0
    assert "holds Jobs, their Pods and their ConfigMaps only" in said


@pytest.fixture(scope="module")
def waiting_pod(guarded: Cluster) -> str:
    """An evaluation's Pod that no node takes."""
    pod = changed(pod_of(make_objects().job), ("spec", "nodeSelector"), {"no": "node"})
    pod["metadata"].pop("finalizers")
    guarded.kubectl("create", "-f", "-", input=json.dumps(pod))
    return str(pod["metadata"]["name"])


def test_a_container_cannot_be_added_later(guarded: Cluster, waiting_pod: str) -> None:
    extra = {"name": "debug", "image": LISTED_IMAGE, "targetContainerName": names.CONTAINER}
    patch = json.dumps({"spec": {"ephemeralContainers": [extra]}})
    how = ("--subresource=ephemeralcontainers", "--type=strategic", "--patch", patch)
    code, said = try_kubectl(guarded, "patch", "pod", waiting_pod, "--namespace", EVALUATIONS, *how)
    assert code != 0
    assert "init or ephemeral containers" in said or "violates PodSecurity" in said


def test_its_image_cannot_be_changed_later(guarded: Cluster, waiting_pod: str) -> None:
    other = {"name": names.CONTAINER, "image": f"crucible.local/other@{DIGEST}"}
    patch = json.dumps({"spec": {"containers": [other]}})
    how = ("--namespace", EVALUATIONS, "--type=strategic", "--patch", patch)
    code, said = try_kubectl(guarded, "patch", "pod", waiting_pod, *how)
    assert code != 0
    assert "not on the list" in said


def test_what_leaves_the_spec_alone_passes_even_when_its_image_is_no_longer_listed(
    guarded: Cluster, waiting_pod: str
) -> None:
    where = ("--namespace", EVALUATIONS)
    guarded.kubectl("annotate", "pod", waiting_pod, *where, "seen=yes", "--overwrite")
    images = (
        "patch",
        "configmap",
        "evaluation-images",
        "--namespace",
        names.PLATFORM_NAMESPACE,
        "--type=merge",
        "--patch",
    )
    guarded.kubectl(*images, json.dumps({"data": {"admission-test": None}}))
    try:
        job = json.dumps(make_objects().job)

        def refused() -> bool:
            return "not on the list" in try_kubectl(guarded, "create", "--dry-run=server", "-f", "-", input=job)[1]

        wait_until(refused, timeout=15, describe="the shorter list to be in force")
        guarded.kubectl("annotate", "pod", waiting_pod, *where, "seen=again", "--overwrite")
    finally:
        allow_image(guarded, "admission-test", LISTED_IMAGE)


@pytest.mark.parametrize("verb", ["exec", "attach", "port-forward"])
def test_only_operators_go_into_an_evaluation(guarded: Cluster, waiting_pod: str, verb: str) -> None:
    rest = {"exec": ("--", "true"), "attach": (), "port-forward": ("8080:80",)}[verb]
    call = (verb, waiting_pod, "--namespace", EVALUATIONS)
    # The administrator of everything, who is no operator.
    code, said = try_kubectl(guarded, *call, *rest)
    if verb == "port-forward":
        # kubectl looks at the Pod first and goes no further than that with one that does not run.
        said = connect(guarded, f"{waiting_pod}/portforward?ports=80")
    assert code != 0
    assert "that is for members of the group crucible:operators" in said


def connect(cluster: Cluster, path: str, *who: str) -> str:
    return try_kubectl(
        cluster, "create", "--raw", f"/api/v1/namespaces/{EVALUATIONS}/pods/{path}", "-f", "-", *who, input="{}"
    )[1]


def test_an_operator_gets_as_far_as_the_pod_itself(guarded: Cluster, waiting_pod: str) -> None:
    operator = as_user("ann", "crucible:operators", "system:authenticated")
    said = connect(guarded, f"{waiting_pod}/exec?command=true&stdout=true", *operator)
    assert "crucible:operators" not in said
    assert "does not have a host assigned" in said


# --- what evaluations' rules take for granted ------------------------------------------------------------------------------


def test_gvisor_cannot_be_made_to_mean_something_else(guarded: Cluster) -> None:
    # A handler cannot be changed, so it would be made anew under its name: that is a create, and refused whatever is there.
    fake = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "gvisor"}, "handler": "runc"}
    create = ("create", "--dry-run=server", "-f", "-")
    code, said = try_kubectl(guarded, *create, input=json.dumps(fake))
    assert code != 0
    assert "its handler must be runsc" in said
    other = changed(fake, ("metadata", "name"), "plain")
    assert try_kubectl(guarded, *create, input=json.dumps(other))[0] == 0


@pytest.mark.parametrize(("value", "policy"), [(5, "Never"), (-5, "PreemptLowerPriority")])
def test_evaluations_cannot_be_made_to_displace_others(guarded: Cluster, value: int, policy: str) -> None:
    fake = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": names.PRIORITY_EVALUATION},
        "value": value,
        "preemptionPolicy": policy,
    }
    code, said = try_kubectl(guarded, "create", "--dry-run=server", "-f", "-", input=json.dumps(fake))
    assert code != 0
    assert "below all else" in said
