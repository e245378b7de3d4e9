"""Waiting for the workloads, and saying what hangs and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from crucible.names import PLATFORM_NAMESPACE
from tests.deployment.errors import DeployError
from tests.support.waits import WaitTimeoutError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.deployment.target import Target

Object = dict[str, Any]
WORKLOADS = "deployments,statefulsets,jobs"
_SELECTOR = "--selector=app.kubernetes.io/part-of=crucible"
_NAMESPACE = f"--namespace={PLATFORM_NAMESPACE}"
_LOG_LINES = 15
_EVENTS = 12
# Nothing mends these by waiting.
_HOPELESS = {"ErrImageNeverPull", "InvalidImageName", "ImageInspectError"}


def pending(workload: Object) -> str | None:
    """Return what a workload lacks, or None; a Job has what it needs once it has succeeded."""
    spec, status = workload["spec"], workload.get("status", {})
    if workload["kind"] == "Job":
        return None if status.get("succeeded") else "not done"
    wanted = spec.get("replicas", 1)
    if status.get("observedGeneration", 0) < workload["metadata"]["generation"]:
        return "not seen yet"
    updated, ready = status.get("updatedReplicas", 0), status.get("readyReplicas", 0)
    if updated < wanted:
        return f"{updated} of {wanted} updated"
    if ready < wanted:
        return f"{ready} of {wanted} ready"
    if status.get("replicas", 0) > wanted:
        return "old replicas still end"
    return None


def hopeless(workload: Object) -> bool:
    """Tell whether a Job has given up."""
    conditions = workload.get("status", {}).get("conditions") or []
    return any(found["type"] == "Failed" and found["status"] == "True" for found in conditions)


def wait_for_workloads(target: Target, *, seconds: float, say: Callable[[str], None]) -> None:
    """Return once every workload of the platform is as it should be.

    Raises:
        DeployError: one is not in time, or cannot be; with its Pods' states, logs and events.
    """
    said: list[str] = []

    def done() -> bool:
        workloads = target.get(WORKLOADS, _NAMESPACE, _SELECTOR)
        lacking = {_name(found): why for found in workloads if (why := pending(found))}
        line = ", ".join(f"{name} {why}" for name, why in sorted(lacking.items()))
        if line and line not in said:
            said.append(line)
            say(f"waiting for {line}")
        for found in workloads:
            if hopeless(found):
                raise DeployError(f"{_name(found)} failed\n{diagnosis(target)}")
        if any(reason in _HOPELESS for pod in _pods(target) for reason, _ in _waiting(pod)):
            raise DeployError(f"a Pod can never start\n{diagnosis(target)}")
        return not lacking

    try:
        wait_until(done, timeout=seconds, poll=1.0, describe="the platform to be ready")
    except WaitTimeoutError:
        raise DeployError(f"the platform is not ready after {seconds:g} s\n{diagnosis(target)}") from None


def _name(workload: Object) -> str:
    return f"{workload['kind'].lower()}/{workload['metadata']['name']}"


def _pods(target: Target) -> list[Object]:
    return target.get("pods", _NAMESPACE, _SELECTOR)


def _waiting(pod: Object) -> Iterator[tuple[str, str]]:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if waiting := container["state"].get("waiting"):
            yield waiting.get("reason", ""), waiting.get("message", "")


def is_ready(pod: Object) -> bool:
    """Tell whether a Pod serves, or has done what it was for."""
    status = pod.get("status", {})
    conditions = {found["type"]: found["status"] for found in status.get("conditions") or []}
    return status.get("phase") == "Succeeded" or conditions.get("Ready") == "True"


def diagnosis(target: Target) -> str:
    """Return what the cluster knows of each Pod that is not ready."""
    parts = [_about(target, pod) for pod in _pods(target) if not is_ready(pod)]
    for kind in ("replicasets", "statefulsets", "jobs"):
        parts += [
            f"{_name(found)}: {events}"
            for found in target.get(kind, _NAMESPACE, _SELECTOR)
            if not found.get("status", {}).get("replicas") and (events := _events(target, found, warnings=True))
        ]
    return "\n".join(parts) or "every Pod is ready"


def _about(target: Target, pod: Object) -> str:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    lines = [f"{name}: {status.get('phase')} on {pod['spec'].get('nodeName', 'no node')}"]
    lines += [f"  waits: {reason} {message}".rstrip() for reason, message in _waiting(pod)]
    lines += [
        f"  {found['type']} is {found['status']}: {found.get('reason', '')} {found.get('message', '')}"
        for found in status.get("conditions") or []
        if found["status"] != "True" and found.get("message")
    ]
    lines += [f"  event: {line}" for line in _events(target, pod).splitlines()]
    for previous in ("--previous", "--previous=false"):
        try:
            text = target.call("logs", _NAMESPACE, name, f"--tail={_LOG_LINES}", previous)
        except DeployError:
            continue
        lines += [f"  log{' before' if previous == '--previous' else ''}: {line}" for line in text.splitlines()]
    return "\n".join(lines)


def _events(target: Target, found: Object, *, warnings: bool = False) -> str:
    fields = f"--field-selector=involvedObject.uid={found['metadata']['uid']}" + (",type=Warning" if warnings else "")
    events = json.loads(target.call("get", "events", _NAMESPACE, fields, "--output=json"))["items"]
    return "\n".join(f"{event['reason']}: {event['message']}" for event in events[-_EVENTS:])
