"""The steps of a deployment, and of taking it away again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from crucible.names import EVALUATION_NAMESPACE, NODE_NAMESPACE, PLATFORM_NAMESPACE
from tests.deployment import images, manifests
from tests.deployment.errors import DeployError
from tests.deployment.rollout import WORKLOADS, diagnosis, wait_for_workloads
from tests.deployment.secret_values import Values, read_secrets, secret_objects, secret_values
from tests.deployment.target import Target, run
from tests.support.waits import WaitTimeoutError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.deployment.images import Image

Object = dict[str, Any]

_PART_OF = "app.kubernetes.io/part-of=crucible"
_SETUP = "crucible-setup"
# What runs; all else is there before it.
_RUNS = {"Deployment", "StatefulSet", "Job"}
_FIRST = {"StatefulSet", "Job"}
_ANSWER_SECONDS = 30


@dataclass(frozen=True)
class Deployed:
    """A platform that is up."""

    url: str
    api_key: str


def deploy(
    target: Target,
    *,
    built: Sequence[Image] | None = None,
    timeout: float = 600.0,
    say: Callable[[str], None] = lambda _: None,
) -> Deployed:
    """Put the platform of this checkout on a cluster, or bring the one that is there to it; `built` are its images if they are known.

    Raises:
        DeployError: it cannot be done, or does not come up in time.
    """
    started = time.monotonic()
    _check_nodes(target)
    say("images")
    built = built or images.build()
    target.take(built)
    say("objects")
    objects = manifests.build(target.kubectl, built, target.registry)
    target.apply([found for found in objects if found["kind"] == "Namespace"])
    make_secrets(target)
    target.apply([found for found in objects if found["kind"] not in _RUNS])
    say("Calico's policies")
    _apply_calico(target)
    say("servers")
    namespace = f"--namespace={PLATFORM_NAMESPACE}"
    target.call("delete", "job", _SETUP, namespace, "--ignore-not-found", "--cascade=foreground")
    target.apply([found for found in objects if found["kind"] in _FIRST])
    # Storage ends where it finds no database, and is started again with growing pauses: it is quicker to wait here.
    _wait_for_database(target, timeout)
    say("services")
    target.apply([found for found in objects if found["kind"] in _RUNS - _FIRST])
    left = timeout - (time.monotonic() - started)
    wait_for_workloads(target, seconds=max(left, 1.0), say=say)
    return find_deployed(target)


def make_secrets(target: Target) -> None:
    """Make every Secret of the platform that is not there yet, in a namespace that is, or that is made."""
    # One that is there has labels that guard it, which applying one without them would take away.
    if PLATFORM_NAMESPACE not in {found["metadata"]["name"] for found in target.get("namespaces")}:
        target.call("create", "namespace", PLATFORM_NAMESPACE)
    target.apply(secret_objects(secret_values(_present_secrets(target))))


def find_deployed(target: Target) -> Deployed:
    """Return the platform that is on a cluster, once it answers.

    Raises:
        DeployError: there is none, or it does not answer.
    """
    present = _present_secrets(target).get(_SETUP)
    if present is None:
        raise DeployError(f"{target.description} has no platform: `make deploy` puts one there")
    deployed = Deployed(target.api_url, present["CRUCIBLE_ADMIN_KEY"])
    _check_answers(target, deployed)
    return deployed


def _present_secrets(target: Target) -> Values:
    return read_secrets(target.get("secrets", f"--namespace={PLATFORM_NAMESPACE}", f"--selector={_PART_OF}"))


def _check_nodes(target: Target) -> None:
    """Refuse a cluster on which the platform would wait for ever.

    Raises:
        DeployError: no node has what evaluations need.
    """
    nodes = target.get("nodes")
    if not any(node["metadata"]["labels"].get("topology.kubernetes.io/zone") for node in nodes):
        raise DeployError(
            "no node has a label topology.kubernetes.io/zone, over which the services are spread: label them"
        )
    if not any(node["metadata"]["labels"].get("crucible.dev/gvisor") == "ready" for node in nodes):
        raise DeployError(
            "no node has the label crucible.dev/gvisor=ready: install gVisor (docs/gvisor.md), or nothing could ever run"
        )


def _apply_calico(target: Target) -> None:
    with target.environment() as environment:
        run([str(images.ROOT / "scripts" / "policies"), "apply"], environment=environment)


def _wait_for_database(target: Target, seconds: float) -> None:
    where = (f"--namespace={PLATFORM_NAMESPACE}", f"--timeout={seconds:.0f}s")
    try:
        target.call("rollout", "status", "statefulset/postgres", *where)
    except DeployError as error:
        raise DeployError(f"{error}\n{diagnosis(target)}") from None


def _check_answers(target: Target, deployed: Deployed) -> None:
    def answers() -> bool:
        headers = {"Authorization": f"Bearer {deployed.api_key}"}
        return httpx.get(f"{deployed.url}/v1/me", headers=headers, timeout=5, trust_env=False).is_success

    try:
        wait_until(
            answers, timeout=_ANSWER_SECONDS, poll=0.5, describe="the API to answer", tolerate=(httpx.HTTPError,)
        )
    except WaitTimeoutError as error:
        raise DeployError(f"{deployed.url}: {error}\n{diagnosis(target)}") from None


def remove(target: Target, *, data: bool, say: Callable[[str], None] = lambda _: None) -> None:
    """Take the platform away. Without `data`, volumes and secrets stay, and the next deployment goes on with them."""
    namespace = f"--namespace={PLATFORM_NAMESPACE}"
    if not data:
        say("workloads")
        target.call("delete", WORKLOADS, namespace, f"--selector={_PART_OF}", "--cascade=foreground", "--timeout=300s")
        return
    say("evaluations")
    _release_evaluations(target)
    say("namespaces")
    # Nothing here is to be handed over: the broker's nodes need not wait for each other.
    target.call("delete", "pods", "--all", namespace, "--grace-period=1", "--wait=false")
    spaces = (EVALUATION_NAMESPACE, PLATFORM_NAMESPACE, NODE_NAMESPACE)
    target.call("delete", "namespace", *spaces, "--ignore-not-found", "--timeout=300s")


def _release_evaluations(target: Target) -> None:
    """End evaluations without anybody recording it: whoever would is going away, and their Pods would wait for it."""
    space = f"--namespace={EVALUATION_NAMESPACE}"
    target.call("delete", "jobs", "--all", space, "--cascade=background", "--wait=false")
    for pod in target.get("pods", space):
        if pod["metadata"].get("finalizers"):
            released = json.dumps({"metadata": {"finalizers": None}})
            target.call("patch", "pod", pod["metadata"]["name"], space, "--type=merge", f"--patch={released}")
