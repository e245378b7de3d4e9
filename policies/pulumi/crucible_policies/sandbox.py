"""What isolates an evaluation: the same that policies/admission refuses in the cluster, in the same words, said before anything is applied.

The cluster's own rules hold for whoever applies what. These keep the program from what they would refuse later, and from weakening them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from crucible_policies import names
from crucible_policies.resource import Resource
from crucible_policies.rule import ResourceRule
from crucible_policies.workloads import Object, Pod, objects, pods

# policies/admission/evaluation-kinds.yaml
REFUSED_KINDS = {
    "Secret", "Service", "Endpoints", "ReplicationController", "PersistentVolumeClaim", "PodTemplate", "Deployment", "StatefulSet",
    "DaemonSet", "ReplicaSet", "CronJob", "Ingress", "EndpointSlice", "ResourceClaim", "ResourceClaimTemplate",
}  # fmt: skip
# Tokens whose objects the engine is not shown.
OPAQUE = re.compile(r"^kubernetes:helm\.sh/v[0-9]+:Release$")
# Taints that an evaluation may tolerate.
TOLERATED = {
    names.TAINT_SANDBOX,
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/memory-pressure",
}
OWN_ADMISSION = "crucible-"
_DIGEST = re.compile(r"^[^@]+@sha256:[0-9a-f]{64}$")
_HOST = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
_HOOKS = ("lifecycle", "livenessProbe", "readinessProbe", "startupProbe")
_BOUNDED = ("cpu", "memory", "ephemeral-storage")

Container = Mapping[str, Any]


def _security(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = holder.get("securityContext") or {}
    return found


def _containers(pod: Pod) -> list[Container]:
    return [each for _, each in pod.containers(init=False)]


# -- one function for each part of evaluation-pods.yaml; each message is one of its


def _boundary(pod: Pod) -> Iterator[str]:
    if pod.spec.get("runtimeClassName") != names.RUNTIME_CLASS:
        yield "an evaluation runs under gVisor, so its runtimeClassName must be gvisor"
    if any(pod.spec.get(key) for key in _HOST):
        yield "an evaluation has namespaces of its own, so hostNetwork, hostPID, hostIPC and shareProcessNamespace must not be set"
    if any(port.get("hostPort") for each in _containers(pod) for port in each.get("ports") or ()):
        yield "an evaluation has no port on its node, so hostPort must not be set"


def _identity(pod: Pod) -> Iterator[str]:
    if pod.spec.get("serviceAccountName") != names.SERVICE_ACCOUNT_EVALUATION:
        yield "an evaluation has the identity that may do nothing, so its serviceAccountName must be evaluation"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "an evaluation gets no service account token, so automountServiceAccountToken must be false"
    labels = pod.metadata.get("labels") or {}
    known = names.LABEL_EVALUATION in labels and names.LABEL_ATTEMPT in labels
    if not known or labels.get(names.LABEL_MANAGED_BY) != names.MANAGED_BY:
        yield (
            "an evaluation says which one it is, so it must have the labels crucible.dev/evaluation-id, crucible.dev/attempt and "
            "app.kubernetes.io/managed-by=crucible-dispatcher"
        )


def _content(pod: Pod) -> Iterator[str]:
    containers = _containers(pod)
    only = [each.get("name") for each in containers] == [names.CONTAINER]
    if not only or pod.spec.get("initContainers") or pod.spec.get("ephemeralContainers"):
        yield "an evaluation is the one container named evaluation, without init or ephemeral containers"
    if any(not _DIGEST.match(each.get("image") or "") for each in containers):
        yield "an image is named by its digest (name@sha256:...), which nobody can move"
    if any(key in each for each in containers for key in _HOOKS):
        yield "an evaluation has no probes and no lifecycle hooks, since its node would make their calls"
    if any(
        "envFrom" in each or any("valueFrom" in variable for variable in each.get("env") or ()) for each in containers
    ):
        yield (
            "an evaluation is told only what stands in its own spec, so env must have plain values, from no Secret, ConfigMap or field"
        )


def _reach(pod: Pod) -> Iterator[str]:
    if any(not _is_own(each) for each in pod.spec.get("volumes") or ()):
        yield "an evaluation mounts configMap and emptyDir volumes only, no hostPath, Secret, token, claim or other type"
    shared = pod.spec.get("resourceClaims") or any(
        each.get("volumeDevices") or any(_is_shared(mount) for mount in each.get("volumeMounts") or ())
        for each in _containers(pod)
    )
    if shared:
        yield "an evaluation has no devices and shares no mounts with its node"
    if any(_security(each).get("readOnlyRootFilesystem") is not True for each in _containers(pod)):
        yield "an evaluation's root is read-only, so readOnlyRootFilesystem must be true"


def _is_own(volume: Mapping[str, Any]) -> bool:
    sources = (volume.get("projected") or {}).get("sources") or ()
    return (
        "configMap" in volume
        or "emptyDir" in volume
        or (bool(sources) and all("configMap" in each for each in sources))
    )


def _is_shared(mount: Mapping[str, Any]) -> bool:
    return mount.get("mountPropagation") not in {None, "None"}


def _privileges(pod: Pod) -> Iterator[str]:
    securities = [_security(each) for each in _containers(pod)]
    if any(each.get("privileged") or each.get("allowPrivilegeEscalation") is not False for each in securities):
        yield "an evaluation has and gets no privileges, so privileged must not be set and allowPrivilegeEscalation must be false"
    capabilities = [each.get("capabilities") or {} for each in securities]
    if any("ALL" not in (each.get("drop") or ()) or each.get("add") for each in capabilities):
        yield "an evaluation has no capabilities, so capabilities must drop ALL and add none"
    if not _is_nobody(_security(pod.spec), securities):
        yield (
            "an evaluation is nobody, so the Pod's securityContext must have runAsNonRoot, and runAsUser and runAsGroup that are not 0; "
            "its container must not undo that"
        )
    profiles = [each.get("seccompProfile") or {} for each in (_security(pod.spec), *securities)]
    if profiles[0].get("type") != "RuntimeDefault" or any(
        each.get("type", "RuntimeDefault") != "RuntimeDefault" for each in profiles
    ):
        yield "an evaluation's system calls are filtered, so the Pod's seccompProfile must be RuntimeDefault"
    every = (_security(pod.spec), *securities)
    if any(each.get("sysctls") or "seLinuxOptions" in each or "appArmorProfile" in each for each in every) or any(
        each.get("procMount", "Default") != "Default" for each in securities
    ):
        yield "an evaluation keeps the node's defaults for sysctls, SELinux, AppArmor and /proc"


def _is_nobody(pod: Mapping[str, Any], containers: list[Mapping[str, Any]]) -> bool:
    named = pod.get("runAsNonRoot") is True and (pod.get("runAsUser") or 0) > 0 and (pod.get("runAsGroup") or 0) > 0
    grouped = pod.get("fsGroup") == 0 or any(each == 0 for each in pod.get("supplementalGroups") or ())
    undone = any(
        each.get("runAsNonRoot") is False or each.get("runAsUser") == 0 or each.get("runAsGroup") == 0
        for each in containers
    )
    return named and not grouped and not undone


def _bounds(pod: Pod) -> Iterator[str]:
    if any(not _is_bounded(each.get("resources") or {}) for each in _containers(pod)):
        yield (
            "an evaluation is bounded, so it must have limits of cpu, memory and ephemeral-storage, and request the memory of its limit"
        )
    if any("sizeLimit" not in each["emptyDir"] for each in pod.spec.get("volumes") or () if "emptyDir" in each):
        yield "an evaluation is bounded, so each emptyDir must have a sizeLimit"
    if "activeDeadlineSeconds" not in pod.spec:
        yield "an evaluation ends, so its Pod must have activeDeadlineSeconds"
    if pod.spec.get("restartPolicy") != "Never":
        yield "an evaluation runs once, so restartPolicy must be Never"
    if pod.spec.get("priorityClassName") != names.PRIORITY_EVALUATION:
        yield "an evaluation displaces nothing, so its priorityClassName must be crucible-evaluation"


def _is_bounded(resources: Mapping[str, Any]) -> bool:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    # Written the same way: what is one amount in two notations is the API server's to know.
    return all(each in limits for each in _BOUNDED) and requests.get("memory") == limits["memory"]


def _place(pod: Pod) -> Iterator[str]:
    if pod.spec.get("nodeName"):
        yield "an evaluation is placed by the scheduler, so nodeName must not be set"
    if pod.spec.get("schedulerName", "default-scheduler") != "default-scheduler":
        yield "an evaluation is placed by the cluster's own scheduler"
    if any(each.get("key") not in TOLERATED for each in pod.spec.get("tolerations") or ()):
        yield (
            "an evaluation runs on sandbox nodes only, so it may tolerate only the taints crucible.dev/sandbox, "
            "node.kubernetes.io/not-ready, unreachable and memory-pressure"
        )
    if pod.spec.get("enableServiceLinks") is not False or pod.spec.get("dnsPolicy") != "None":
        yield "an evaluation is told nothing of the cluster, so enableServiceLinks must be false and dnsPolicy None"


_PARTS: tuple[Callable[[Pod], Iterator[str]], ...] = (
    _boundary, _identity, _content, _reach, _privileges, _bounds, _place,
)  # fmt: skip


def weak_sandboxes(found: Resource) -> Iterator[str]:
    """Tell what an evaluation's Pod or Job lacks of its isolation."""
    for made in objects(found):
        if made.namespace != names.EVALUATION_NAMESPACE:
            continue
        for pod in pods(made):
            yield from (f"{pod.where}: {said}" for part in _PARTS for said in part(pod))
        if (made.group, made.kind) == ("batch", "Job"):
            yield from (f"{made.where}spec: {said}" for said in _attempt(made.content.get("spec") or {}))


def _attempt(spec: Mapping[str, Any]) -> Iterator[str]:
    if (spec.get("backoffLimit"), spec.get("parallelism"), spec.get("completions")) != (0, 1, 1):
        yield "a Job is one attempt, so backoffLimit must be 0, and parallelism and completions 1"
    if "ttlSecondsAfterFinished" in spec:
        yield "a Job stays until it is recorded, so ttlSecondsAfterFinished must not be set"


def strange_kinds(found: Resource) -> Iterator[str]:
    """Tell what does not belong into the namespace of the evaluations."""
    if OPAQUE.match(found.type) and found.properties.get("namespace") == names.EVALUATION_NAMESPACE:
        yield f"a Helm release {_NOT_HERE}"
    for made in objects(found):
        if made.namespace == names.EVALUATION_NAMESPACE and made.kind in REFUSED_KINDS:
            yield f"a {made.kind} {_NOT_HERE}"


_NOT_HERE = "cannot be made in the namespace of the evaluations, which holds Jobs, their Pods and their ConfigMaps only"


def weakened_guards(found: Resource) -> Iterator[str]:
    """Tell what would take the ground from under the rules of the cluster."""
    for made in objects(found):
        metadata = made.content.get("metadata") or {}
        if check := _GUARDS.get(made.kind):
            yield from (f"{made.where}{said}" for said in check(made, str(metadata.get("name") or "")))


def _runtime_class(made: Object, name: str) -> Iterator[str]:
    if name == names.RUNTIME_CLASS and made.content.get("handler") != names.RUNTIME_HANDLER:
        yield "handler: the RuntimeClass gvisor stands for gVisor, so its handler must be runsc"


def _priority_class(made: Object, name: str) -> Iterator[str]:
    lowest = (made.content.get("value") or 0) < 0 and made.content.get("preemptionPolicy") == "Never"
    if name == names.PRIORITY_EVALUATION and not lowest:
        yield (
            "value: the PriorityClass crucible-evaluation is below all else, so its value must be negative and its preemptionPolicy Never"
        )


def _namespace(made: Object, name: str) -> Iterator[str]:
    labels = (made.content.get("metadata") or {}).get("labels") or {}
    if name == names.EVALUATION_NAMESPACE and labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "metadata.labels: the namespace of the evaluations must have pod-security.kubernetes.io/enforce=restricted"


def _admission_policy(made: Object, name: str) -> Iterator[str]:
    if name.startswith(OWN_ADMISSION) and (made.content.get("spec") or {}).get("failurePolicy", "Fail") != "Fail":
        yield "spec.failurePolicy: a rule that cannot be evaluated must refuse; set it to Fail"


def _admission_binding(made: Object, name: str) -> Iterator[str]:
    if name.startswith(OWN_ADMISSION) and "Deny" not in (
        (made.content.get("spec") or {}).get("validationActions") or ()
    ):
        yield "spec.validationActions: a rule that only warns holds nothing; add Deny"


_GUARDS = {
    "RuntimeClass": _runtime_class,
    "PriorityClass": _priority_class,
    "Namespace": _namespace,
    "ValidatingAdmissionPolicy": _admission_policy,
    "ValidatingAdmissionPolicyBinding": _admission_binding,
}

RULES = (
    ResourceRule(
        "sandbox-pods",
        "a Pod or Job of evaluations that lacks a part of its isolation: gVisor, no token, no host, not root, read-only root, no capabilities, "
        "limits, one attempt ...",
        "the code in it is hostile; each part holds where another has a hole",
        "as `policies/admission/evaluation-pods.yaml` and `evaluation-jobs.yaml` say, in the same words",
        weak_sandboxes,
    ),
    ResourceRule(
        "sandbox-kinds",
        "Secrets, Services, Deployments, claims, Helm releases and whatever else is no Job, Pod or ConfigMap in the namespace of the evaluations",
        "what is not there cannot be reached, read or held on to from a sandbox",
        "another namespace",
        strange_kinds,
    ),
    ResourceRule(
        "sandbox-guards",
        "a RuntimeClass `gvisor` that is not gVisor, the evaluations' priority above others, their namespace without Pod Security `restricted`, an "
        "admission rule of ours that does not deny",
        "the other rules believe in these names",
        "as `policies/` has them",
        weakened_guards,
    ),
)
