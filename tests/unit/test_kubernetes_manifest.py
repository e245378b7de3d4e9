"""What is created for an attempt, held whole: a field that is lost here would be a hole in the sandbox."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from crucible import contracts as c
from crucible import names
from crucible.dispatcher.kubernetes.manifest import (
    CONFIG_MAP_BYTES,
    SandboxObjects,
    demand_of,
    log_bytes,
    sandbox_objects,
    storage_bytes,
)
from crucible.dispatcher.seccomp import build_filter
from crucible.evaluation import EvaluationRequest, resolve
from crucible.limits import Limits
from crucible.quantity import MIB, parse_cpu, parse_memory
from crucible.runner.run import Plan
from crucible.settings import KubernetesSettings

pytestmark = pytest.mark.unit

POLICIES = Path(__file__).parents[2] / "policies"
ID = "ev-01jd3v8q6m0c3r5x7z9b1d3f5h"
IMAGE = "registry.example/runner@sha256:" + "a" * 64
SETTINGS = KubernetesSettings(images={"python": IMAGE})
LABELS = {
    "app.kubernetes.io/managed-by": "crucible-dispatcher",
    "app.kubernetes.io/component": "evaluation",
    "app.kubernetes.io/part-of": "crucible",
    "crucible.dev/evaluation-id": ID,
    "crucible.dev/attempt": "2",
    "crucible.dev/size-class": "small",
}
ANNOTATIONS = {
    "crucible.dev/memory-bytes": str(256 * MIB),
    "crucible.dev/timeout-seconds": "30",
    "crucible.dev/owner": "Ada L.",
    "crucible.dev/traceparent": "00-1-2-01",
}


def made(settings: KubernetesSettings = SETTINGS, limits: Limits | None = None, **request: Any) -> SandboxObjects:
    limits = limits or Limits()
    wanted = {"code": "print('\N{SNOWMAN}')\r\n", "stdin": "in", "timeout_seconds": 30, **request}
    spec = resolve(EvaluationRequest(**wanted), limits)
    asked = c.SandboxRequest(attempt=2, worker="w", owner="Ada L.", spec=spec, traceparent="00-1-2-01")
    return sandbox_objects(ID, asked, settings, limits, grace_seconds=4.5)


def encoded(program: bytes) -> str:
    return base64.b64encode(program).decode()


def container_of(objects: SandboxObjects) -> Any:
    return objects.job["spec"]["template"]["spec"]["containers"][0]


def test_the_whole_pod() -> None:
    assert made().job["spec"]["template"] == {
        "metadata": {"labels": LABELS, "annotations": ANNOTATIONS, "finalizers": ["crucible.dev/output"]},
        "spec": {
            "runtimeClassName": "gvisor",
            "priorityClassName": "crucible-evaluation",
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 95,
            "terminationGracePeriodSeconds": 2,
            "serviceAccountName": "evaluation",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "hostname": "sandbox",
            "dnsPolicy": "None",
            "dnsConfig": {
                "nameservers": ["127.0.0.1"],
                "options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}],
            },
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "nodeSelector": {"crucible.dev/sandbox": "true"},
            "tolerations": [
                {"key": "crucible.dev/sandbox", "operator": "Exists", "effect": "NoSchedule"},
                {
                    "key": "node.kubernetes.io/not-ready",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 10,
                },
                {
                    "key": "node.kubernetes.io/unreachable",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 10,
                },
            ],
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": key,
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "evaluation"}},
                }
                for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
            ],
            "containers": [
                {
                    "name": "evaluation",
                    "image": IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-I", "-S", "-B", "-u", "/opt/crucible/run.py"],
                    "args": [
                        "frames=1",
                        "encoding=lines",
                        "pid_namespace=1",
                        "report=/dev/termination-log",
                        "code=/code/main.py",
                        "timeout_ms=30000",
                        "output_bytes=104857600",
                        "log_bytes=226492416",
                        "processes=64",
                        "open_files=256",
                        "file_bytes=67108864",
                        "stdin=/input/stdin",
                        f"seccomp_x86_64={encoded(build_filter('x86_64', counted=True))}",
                        f"seccomp_aarch64={encoded(build_filter('aarch64', counted=True))}",
                    ],
                    "workingDir": "/tmp",
                    "env": [
                        {"name": "EVALUATION_ID", "value": ID},
                        {"name": "EVAL_ID", "value": ID},
                        {"name": "HOME", "value": "/tmp"},
                        {"name": "LANG", "value": "C.UTF-8"},
                        {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
                        {"name": "PYTHONUNBUFFERED", "value": "1"},
                        {"name": "TMPDIR", "value": "/tmp"},
                    ],
                    "resources": {
                        "requests": {"cpu": "250m", "memory": "256Mi", "ephemeral-storage": "344Mi"},
                        "limits": {"cpu": "250m", "memory": "256Mi", "ephemeral-storage": "344Mi"},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "privileged": False,
                        "readOnlyRootFilesystem": True,
                        "runAsNonRoot": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "terminationMessagePath": "/dev/termination-log",
                    "terminationMessagePolicy": "File",
                    "volumeMounts": [
                        {"name": "code", "mountPath": "/code", "readOnly": True},
                        {"name": "input", "mountPath": "/input", "readOnly": True},
                        {"name": "tmp", "mountPath": "/tmp"},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "code", "configMap": {"name": f"{ID}-2", "defaultMode": 0o444}},
                {"name": "input", "configMap": {"name": f"{ID}-2-stdin", "defaultMode": 0o444}},
                {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
            ],
        },
    }


def test_the_job_around_it_is_tried_once_and_stays_until_it_is_recorded() -> None:
    job = made().job
    assert job["metadata"] == {
        "name": f"{ID}-2",
        "namespace": "crucible-evaluations",
        "labels": LABELS,
        "annotations": ANNOTATIONS,
    }
    del job["spec"]["template"]
    assert job["spec"] == {"completions": 1, "parallelism": 1, "backoffLimit": 0, "podReplacementPolicy": "Failed"}


def test_code_and_input_travel_as_they_are_in_config_maps_that_nobody_can_change() -> None:
    code, given = made().config_maps
    assert (code["metadata"]["name"], given["metadata"]["name"]) == (f"{ID}-2", f"{ID}-2-stdin")
    assert base64.b64decode(code["binaryData"]["main.py"]) == "print('\N{SNOWMAN}')\r\n".encode()
    assert base64.b64decode(given["binaryData"]["stdin"]) == b"in"
    for each in (code, given):
        assert each["immutable"] is True
        assert each["metadata"]["labels"] == LABELS
    assert Limits().code_bytes <= CONFIG_MAP_BYTES
    assert Limits().stdin_bytes <= CONFIG_MAP_BYTES


def test_without_input_there_is_nothing_of_it() -> None:
    objects = made(stdin="")
    assert [each["metadata"]["name"] for each in objects.config_maps] == [f"{ID}-2"]
    pod = objects.job["spec"]["template"]["spec"]
    assert "input" not in {each["name"] for each in pod["volumes"]}
    assert "input" not in {each["name"] for each in container_of(objects)["volumeMounts"]}
    assert not [argument for argument in container_of(objects)["args"] if argument.startswith("stdin=")]


def test_the_runner_understands_its_arguments() -> None:
    plan = Plan(container_of(made())["args"])
    assert (plan.frames, plan.lines, plan.pid_namespace, plan.timeout_seconds) == (1, True, True, 30)
    assert plan.seccomp
    assert plan.log_bytes == log_bytes(Limits()) < 256 * MIB, "what the nodes' kubelets let a log grow to"
    assert plan.output_bytes * 4 / 3 < plan.log_bytes < storage_bytes(Limits())


def test_cpu_may_be_promised_twice_and_memory_never() -> None:
    objects = made(SETTINGS.model_copy(update={"cpu_request_percent": 10}))
    resources = container_of(objects)["resources"]
    assert (resources["requests"]["cpu"], resources["limits"]["cpu"]) == ("25m", "250m")
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "256Mi"


def test_what_it_takes_is_what_the_scheduler_counts() -> None:
    spec = resolve(EvaluationRequest(code="pass"), Limits())
    demand = demand_of(spec.resources, SETTINGS, Limits())
    overhead = policy("admission/runtime-class.yaml")["overhead"]["podFixed"]
    assert demand.cpu_millis == 250 + parse_cpu(overhead["cpu"])
    assert demand.memory_bytes == 256 * MIB + parse_memory(overhead["memory"])


def policy(name: str) -> Any:
    return yaml.safe_load((POLICIES / name).read_text(encoding="utf-8"))


def test_the_policies_speak_of_the_same_things() -> None:
    runtime_class = policy("admission/runtime-class.yaml")
    assert (runtime_class["metadata"]["name"], runtime_class["handler"]) == (
        names.RUNTIME_CLASS,
        names.RUNTIME_HANDLER,
    )
    assert runtime_class["scheduling"]["nodeSelector"] == {names.LABEL_GVISOR: names.GVISOR_READY}
    classes = yaml.safe_load_all((POLICIES / "quota/priority-classes.yaml").read_text(encoding="utf-8"))
    assert {each["metadata"]["name"] for each in classes} == {names.PRIORITY_PLATFORM, names.PRIORITY_EVALUATION}
    admission = (POLICIES / "admission/evaluation-pods.yaml").read_text(encoding="utf-8")
    for word in (
        names.RUNTIME_CLASS,
        names.SERVICE_ACCOUNT_EVALUATION,
        names.PRIORITY_EVALUATION,
        names.CONTAINER,
        names.LABEL_EVALUATION,
        names.LABEL_ATTEMPT,
        names.MANAGED_BY,
        names.TAINT_SANDBOX,
    ):
        assert f"'{word}'" in admission, word
    biggest = policy("quota/limit-range.yaml")["spec"]["limits"][0]["max"]
    assert parse_memory(biggest["memory"]) == Limits().memory_max_bytes
    assert parse_cpu(biggest["cpu"]) == Limits().cpu_max_millis
    assert parse_memory(biggest["ephemeral-storage"]) >= storage_bytes(Limits())
