"""A sandbox that is really started on this node, and what it saw of its kernel.

The Pod is the `gvisor-probe` PodTemplate of the installer's namespace, bound to the node directly: the node is not yet open to
the scheduler. It runs this image's own `sandbox` command, so no second image is needed and what it says can be believed.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from crucible.nodes.problems import InconclusiveError, NotReadyError, Reason

TEMPLATE = "gvisor-probe"
# gVisor's kernel log begins so; the other lines are drawn by lot.
GREETING = "Starting gVisor"
# What the kubelet says of a Pod for which the node has no room or no time: nothing about gVisor.
_NOT_ABOUT_GVISOR = {
    "OutOfcpu",
    "OutOfmemory",
    "OutOfpods",
    "OutOfephemeral-storage",
    "Evicted",
    "Preempting",
    "NodeShutdown",
    "Terminated",
}

Object = dict[str, Any]


def pod(template: Object, *, node: str, image: str, owner: Object) -> Object:
    """Return the probe's Pod.

    Args:
        template: the PodTemplate.
        node: the node's name.
        image: the installer's own image, which the node therefore has.
        owner: the installer's Pod; when it goes, so does what it started.
    """
    made: Object = copy.deepcopy(template["template"])
    made["apiVersion"], made["kind"] = "v1", "Pod"
    made.setdefault("metadata", {})["generateName"] = f"{TEMPLATE}-"
    made["metadata"]["ownerReferences"] = [
        {"apiVersion": "v1", "kind": "Pod", "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
    ]
    made["spec"]["nodeName"] = node
    made["spec"]["containers"][0]["image"] = image
    return made


def is_over(made: Object) -> bool:
    """Tell whether the Pod has ended, well or not."""
    return made.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def judge(made: Object, *, node_kernel: str) -> str:
    """Return the release of the kernel inside, if the ended Pod proves to have run in gVisor.

    Raises:
        NotReadyError: it ran elsewhere, or did not run.
        InconclusiveError: the node had no room for it.
    """
    status = made.get("status", {})
    if status.get("reason") in _NOT_ABOUT_GVISOR:
        raise InconclusiveError(f"the probe found no room: {status['reason']} {status.get('message', '')}".strip())
    ended = [container["state"].get("terminated") or {} for container in status.get("containerStatuses", [])]
    if status.get("phase") != "Succeeded" or len(ended) != 1:
        said = [
            status.get("reason"),
            status.get("message"),
            *(part for end in ended for part in (end.get("reason"), end.get("message"))),
        ]
        raise NotReadyError(
            Reason.PROBE_FAILED, f"the probe's Pod failed: {'; '.join(str(part) for part in said if part)}"
        )
    try:
        seen = json.loads(ended[0].get("message", ""))
        kernel, log = str(seen["kernel"]), str(seen["log"])
    except (ValueError, KeyError, TypeError) as error:
        raise NotReadyError(Reason.PROBE_FAILED, "the probe ended without saying what it saw") from error
    if GREETING not in log or kernel == node_kernel:
        raise NotReadyError(
            Reason.NOT_GVISOR,
            f"the probe ran on kernel {kernel} (the node's is {node_kernel}) whose log begins {log[:80]!r}: that is not gVisor",
        )
    return kernel


def delay(made: Object, events: list[Object]) -> str:
    """Return what keeps a Pod from ending, as far as it and its events tell."""
    waiting = [
        container["state"]["waiting"]
        for container in made.get("status", {}).get("containerStatuses", [])
        if "waiting" in container.get("state", {})
    ]
    warnings = [event.get("message", "") for event in events if event.get("type") == "Warning"]
    told = [*warnings[-1:], *(f"{wait.get('reason', '')} {wait.get('message', '')}".strip() for wait in waiting)]
    return next((text for text in told if text), f"it is {made.get('status', {}).get('phase', 'unknown')}")
