"""The repository's policies on a test cluster, and evaluations as the dispatcher would make them there."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from crucible import names
from crucible.contracts import SandboxRequest
from crucible.dispatcher.kubernetes.manifest import SandboxObjects, sandbox_objects
from crucible.evaluation import EvaluationSpec, Resources, make_evaluation_id
from crucible.limits import Limits, SizeClass
from crucible.quantity import MIB
from crucible.settings import KubernetesSettings
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "policies"
IMAGES = "evaluation-images"
# On the list in tests whose Pods are never run.
LISTED_IMAGE = f"crucible.local/admission-test@sha256:{'a' * 64}"

Object = dict[str, Any]


class HasKubectl(Protocol):
    """What is needed of a cluster."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - subprocess' word
        """Run kubectl and return its standard output."""

    def kubectl_command(self, *arguments: str) -> list[str | Path]:
        """Return the command line that runs kubectl."""


def apply_policies(cluster: HasKubectl, *, environment: str = "local") -> None:
    """Put everything in `policies/` that the API server validates into the cluster, with an environment's figures; done again, it changes nothing."""
    cluster.kubectl("apply", "-k", str(POLICIES))
    quota = (POLICIES / "quota" / "environments" / environment / "resource-quota.yaml").read_text(encoding="utf-8")
    where = ("--namespace", names.EVALUATION_NAMESPACE)
    cluster.kubectl("patch", "resourcequota", "evaluations", *where, "--type=merge", "--patch", quota)
    wait_until(lambda: _in_force(cluster), timeout=15, describe="the admission policies to be in force")


def _in_force(cluster: HasKubectl) -> bool:
    """Whether the API server goes by the policies already; it takes a second or two to compile new ones."""
    where = ("--namespace", names.EVALUATION_NAMESPACE, "--dry-run=server")
    said = try_kubectl(cluster, "create", "service", "clusterip", "probe", "--tcp=80", *where)[1]
    return "crucible-evaluation-kinds" in said


def allow_image(cluster: HasKubectl, name: str, reference: str) -> None:
    """Put an image on the list of those that may run as an evaluation."""
    patch = json.dumps({"data": {name: reference}})
    cluster.kubectl(
        "patch", "configmap", IMAGES, "--namespace", names.PLATFORM_NAMESPACE, "--type=merge", "--patch", patch
    )


def try_kubectl(cluster: HasKubectl, *arguments: str, input: str | None = None) -> tuple[int, str]:  # noqa: A002 - the same
    """Run kubectl and return its exit status and all that it wrote."""
    command = [str(word) for word in cluster.kubectl_command(*arguments)]
    done = subprocess.run(command, input=input, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def run_script(cluster: HasKubectl, *arguments: str) -> tuple[int, str]:
    """Run `scripts/policies` against the cluster and return its exit status and what it said."""
    tools = Path(cluster.kubectl_command()[0]).parent
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(ROOT / "scripts" / "policies"), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def make_objects(
    code: str = "print(1)",
    *,
    stdin: str = "",
    image: str = LISTED_IMAGE,
    evaluation_id: str | None = None,
    attempt: int = 1,
    timeout_seconds: int = 60,
    settings: KubernetesSettings | None = None,
) -> SandboxObjects:
    """Return what the dispatcher would create for an attempt."""
    evaluation_id = evaluation_id or make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))
    spec = EvaluationSpec(
        code=code,
        stdin=stdin,
        priority=5,
        timeout_seconds=timeout_seconds,
        resources=Resources(cpu_millis=100, memory_bytes=64 * MIB),
        size_class=SizeClass.SMALL,
        image="python",
    )
    request = SandboxRequest(attempt=attempt, worker="test", owner="test", spec=spec)
    settings = settings or KubernetesSettings(images={"python": image})
    return sandbox_objects(evaluation_id, request, settings, Limits(), grace_seconds=5)


def pod_of(job: Object) -> Object:
    """Return the Pod that a Job would make."""
    template = copy.deepcopy(job["spec"]["template"])
    metadata = {**template["metadata"], "name": job["metadata"]["name"], "namespace": job["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def changed(thing: Object, path: Sequence[str | int], value: object) -> Object:
    """Return a copy with one value put at a path; `...` removes what is there."""
    result = copy.deepcopy(thing)
    place: Any = result
    for step in path[:-1]:
        if isinstance(place, dict) and step not in place:
            place[step] = {}
        place = place[step]
    last = path[-1]
    if value is ...:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return result
