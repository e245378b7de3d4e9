"""What is created for an attempt: its ConfigMaps and its Job. Pure: the same request always gives the same objects.

Everything that isolates an evaluation stands here in full, although the RuntimeClass, the admission policies and the quota would refuse
a Pod that lacks some of it: what asks for isolation and what insists on it must not be one and the same.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crucible import names
from crucible.dispatcher.interpreter import PYTHON_FLAGS
from crucible.dispatcher.seccomp import build_filter
from crucible.quantity import MIB, format_cpu, format_memory

if TYPE_CHECKING:
    from crucible.contracts import SandboxRequest
    from crucible.evaluation import Resources
    from crucible.kubernetes.api import Object
    from crucible.limits import Limits
    from crucible.settings import KubernetesSettings

# What a ConfigMap may hold (Kubernetes' MaxSecretSize, which bounds ConfigMaps too). Hence one for the code and one for the input.
CONFIG_MAP_BYTES = MIB
# From the node's acceptance of the Pod to the code's first instruction, pulling the image included.
START_SECONDS = 60
# The distroless convention's "nonroot"; the runner image has the same.
USER_ID = 65532
RUNNER = "/opt/crucible/run.py"
CODE_KEY, STDIN_KEY = "main.py", "stdin"
_CODE_FOLDER, _STDIN_FOLDER = "/code", "/input"
_MEMORY_FOLDERS = {"tmp": "/tmp", "shm": "/dev/shm"}  # noqa: S108 - the sandbox's own
_REPORT = "/dev/termination-log"
# What may be written outside of memory: the container's log, and the termination message, which is a file of the node.
_LOG_SPARE_BYTES = 16 * MIB
_STORAGE_SPARE_BYTES = 64 * MIB
# Each piece of output costs the log a header, base64 and the runtime's own prefix; many small pieces cost much more than their bytes.
_LOG_FACTOR = 2
# What kind of node it will be is not known yet. gVisor does not apply the Pod's seccomp profile to what runs in it (which would refuse
# the runner the code's own PID namespace, too); so the runner puts a filter on the code alone.
_FILTERS = {
    f"seccomp_{machine}": base64.b64encode(build_filter(machine, counted=True)).decode()
    for machine in ("x86_64", "aarch64")
}
# The Pod has nothing to end in order: its runner is killed and the code with it.
_TERMINATION_SECONDS = 2


@dataclass(frozen=True, slots=True)
class SandboxObjects:
    """The objects of one attempt, in the order in which they are created."""

    config_maps: tuple[Object, ...]
    job: Object


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sandbox takes from its node and from the quota, everything included that comes with it."""

    cpu_millis: int
    memory_bytes: int
    storage_bytes: int
    cpu_limit_millis: int
    config_maps: int = 1


def log_bytes(limits: Limits) -> int:
    """Return how large a sandbox's log may become on its node, bytes. The nodes' kubelets must not rotate it before that."""
    return _LOG_FACTOR * limits.output_bytes + _LOG_SPARE_BYTES


def storage_bytes(limits: Limits) -> int:
    """Return what a sandbox may write on its node's disk, bytes."""
    return log_bytes(limits) + limits.tmp_bytes + _STORAGE_SPARE_BYTES


def cpu_request_millis(resources: Resources, settings: KubernetesSettings) -> int:
    """Return the CPU that the scheduler sets aside, millicores."""
    return max(1, math.ceil(resources.cpu_millis * settings.cpu_request_percent / 100))


def demand_of(resources: Resources, settings: KubernetesSettings, limits: Limits, *, config_maps: int = 1) -> Demand:
    """Return what a sandbox with these limits takes, as the scheduler and the quota count it."""
    return Demand(
        cpu_millis=cpu_request_millis(resources, settings) + settings.overhead_cpu_millis,
        memory_bytes=resources.memory_bytes + settings.overhead_memory_bytes,
        storage_bytes=storage_bytes(limits),
        cpu_limit_millis=resources.cpu_millis + settings.overhead_cpu_millis,
        config_maps=config_maps,
    )


def sandbox_objects(
    evaluation_id: str,
    request: SandboxRequest,
    settings: KubernetesSettings,
    limits: Limits,
    *,
    grace_seconds: float,
) -> SandboxObjects:
    """Return the objects of an attempt.

    Args:
        evaluation_id: whose attempt.
        request: what to run; its image must be one that `settings.images` knows.
        settings: where and how.
        limits: what a sandbox may use.
        grace_seconds: time beyond the evaluation's limit after which its node ends it.
    """
    maker = _Maker(evaluation_id, request, settings, limits, grace_seconds)
    return SandboxObjects(tuple(maker.config_maps()), maker.job())


class _Maker:
    """One attempt's objects, part by part."""

    def __init__(
        self,
        evaluation_id: str,
        request: SandboxRequest,
        settings: KubernetesSettings,
        limits: Limits,
        grace_seconds: float,
    ) -> None:
        self._id = evaluation_id
        self._request = request
        self._spec = request.spec
        self._settings = settings
        self._limits = limits
        self._longest = self._spec.timeout_seconds + grace_seconds
        self._name = names.sandbox_name(evaluation_id, request.attempt)
        self._stdin_name = f"{self._name}-stdin"

    def _labels(self) -> dict[str, str]:
        return {
            names.LABEL_MANAGED_BY: names.MANAGED_BY,
            names.LABEL_COMPONENT: names.COMPONENT_EVALUATION,
            names.LABEL_PART_OF: names.PART_OF,
            names.LABEL_EVALUATION: self._id,
            names.LABEL_ATTEMPT: str(self._request.attempt),
            names.LABEL_SIZE_CLASS: self._limits.size_class(self._spec.resources.memory_bytes),
        }

    def _annotations(self) -> dict[str, str]:
        facts = {
            names.ANNOTATION_MEMORY_BYTES: str(self._spec.resources.memory_bytes),
            names.ANNOTATION_TIMEOUT_SECONDS: str(self._spec.timeout_seconds),
            names.ANNOTATION_OWNER: self._request.owner,
        }
        if self._request.traceparent:
            facts[names.ANNOTATION_TRACEPARENT] = self._request.traceparent
        return facts

    # -- what it runs

    def config_maps(self) -> list[Object]:
        """Return the code, and the input if there is any."""
        maps = [self._config_map(self._name, CODE_KEY, self._spec.code)]
        if self._spec.stdin:
            maps.append(self._config_map(self._stdin_name, STDIN_KEY, self._spec.stdin))
        return maps

    def _config_map(self, name: str, key: str, text: str) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": self._settings.namespace, "labels": self._labels()},
            "immutable": True,
            # Not `data`, which holds only what is valid YAML text.
            "binaryData": {key: base64.b64encode(text.encode()).decode()},
        }

    # -- the Job

    def job(self) -> Object:
        """Return the Job. It is tried once: another attempt is storage's decision, and another Job."""
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": self._name,
                "namespace": self._settings.namespace,
                "labels": self._labels(),
                "annotations": self._annotations(),
            },
            "spec": {
                "completions": 1,
                "parallelism": 1,
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "template": {
                    "metadata": {
                        "labels": self._labels(),
                        "annotations": self._annotations(),
                        "finalizers": [names.FINALIZER_OUTPUT],
                    },
                    "spec": self._pod(),
                },
            },
        }

    def _pod(self) -> Object:
        return {
            "runtimeClassName": self._settings.runtime_class,
            "priorityClassName": names.PRIORITY_EVALUATION,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": math.ceil(self._longest) + START_SECONDS,
            "terminationGracePeriodSeconds": _TERMINATION_SECONDS,
            # -- it is nobody, and is told nothing
            "serviceAccountName": names.SERVICE_ACCOUNT_EVALUATION,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "hostname": "sandbox",
            # "None" demands a server. Nothing listens there, and one short try says so at once.
            "dnsPolicy": "None",
            "dnsConfig": {
                "nameservers": ["127.0.0.1"],
                "options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}],
            },
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # -- where it runs
            "nodeSelector": {names.LABEL_SANDBOX_NODE: "true"},
            "tolerations": self._tolerations(),
            "topologySpreadConstraints": [
                _spread("topology.kubernetes.io/zone"),
                _spread("kubernetes.io/hostname"),
            ],
            "containers": [self._container()],
            "volumes": self._volumes(),
        }

    def _tolerations(self) -> list[Object]:
        lost = [
            {
                "key": f"node.kubernetes.io/{state}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": self._settings.node_lost_seconds,
            }
            for state in ("not-ready", "unreachable")
        ]
        return [{"key": names.TAINT_SANDBOX, "operator": "Exists", "effect": "NoSchedule"}, *lost]

    def _container(self) -> Object:
        return {
            "name": names.CONTAINER,
            "image": self._settings.images[self._spec.image],
            "imagePullPolicy": "IfNotPresent",
            "command": ["python3", *PYTHON_FLAGS, RUNNER],
            "args": [f"{name}={value}" for name, value in self._arguments().items()],
            "workingDir": "/tmp",  # noqa: S108 - the sandbox's own
            "env": [{"name": name, "value": value} for name, value in self._environment().items()],
            "resources": self._resources(),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "terminationMessagePath": _REPORT,
            # Never the log's end: it is output, which anything may stand in.
            "terminationMessagePolicy": "File",
            "volumeMounts": self._mounts(),
        }

    def _arguments(self) -> dict[str, object]:
        """Return the runner's arguments: frames as lines on its standard output, and gVisor's kernel, which does not protect PID 1."""
        arguments: dict[str, object] = {
            "frames": 1,
            "encoding": "lines",
            "pid_namespace": 1,
            "report": _REPORT,
            "code": f"{_CODE_FOLDER}/{CODE_KEY}",
            "timeout_ms": self._spec.timeout_seconds * 1000,
            "output_bytes": self._limits.output_bytes,
            "log_bytes": log_bytes(self._limits),
            "processes": self._limits.processes,
            "open_files": self._limits.open_files,
            "file_bytes": self._limits.tmp_bytes,
        }
        if self._spec.stdin:
            arguments["stdin"] = f"{_STDIN_FOLDER}/{STDIN_KEY}"
        return arguments | _FILTERS

    def _environment(self) -> dict[str, str]:
        return {
            "EVALUATION_ID": self._id,
            "EVAL_ID": self._id,
            "HOME": "/tmp",  # noqa: S108 - the sandbox's own
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        }

    def _resources(self) -> Object:
        resources = self._spec.resources
        memory, storage = format_memory(resources.memory_bytes), format_memory(storage_bytes(self._limits))
        return {
            # CPU can be taken away again and memory cannot, so only CPU may be promised twice.
            "requests": {
                "cpu": format_cpu(cpu_request_millis(resources, self._settings)),
                "memory": memory,
                "ephemeral-storage": storage,
            },
            "limits": {"cpu": format_cpu(resources.cpu_millis), "memory": memory, "ephemeral-storage": storage},
        }

    # -- files

    def _volumes(self) -> list[Object]:
        volumes: list[Object] = [{"name": "code", "configMap": {"name": self._name, "defaultMode": 0o444}}]
        if self._spec.stdin:
            volumes.append({"name": "input", "configMap": {"name": self._stdin_name, "defaultMode": 0o444}})
        size = format_memory(min(self._limits.tmp_bytes, self._spec.resources.memory_bytes))
        return volumes + [
            {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": size}} for name in _MEMORY_FOLDERS
        ]

    def _mounts(self) -> list[Object]:
        mounts: list[Object] = [{"name": "code", "mountPath": _CODE_FOLDER, "readOnly": True}]
        if self._spec.stdin:
            mounts.append({"name": "input", "mountPath": _STDIN_FOLDER, "readOnly": True})
        return mounts + [{"name": name, "mountPath": path} for name, path in _MEMORY_FOLDERS.items()]


def _spread(key: str) -> Object:
    """Prefer the place of this kind that has the fewest evaluations."""
    return {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {names.LABEL_COMPONENT: names.COMPONENT_EVALUATION}},
    }
