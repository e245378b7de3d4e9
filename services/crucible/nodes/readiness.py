"""What the cluster is told about a node: one label, one taint and one condition, changed only where they differ. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crucible import names
from crucible.nodes.problems import Reason

Object = dict[str, Any]
TAINT = {"key": names.TAINT_NOT_READY, "effect": "NoSchedule"}


@dataclass(frozen=True)
class Verdict:
    """Whether sandboxes may start on the node, and why."""

    ready: bool
    reason: Reason
    message: str


def is_ready(node: Object) -> bool:
    """Tell whether the cluster already sends sandboxes to this node on a verdict of an installer."""
    status = (condition(node) or {}).get("status")
    return status == "True" and marks_patch(node, ready=True) is None


def condition(node: Object) -> Object | None:
    """Return the node's condition that is ours, if it has it."""
    found = [c for c in node.get("status", {}).get("conditions", []) if c["type"] == names.CONDITION_GVISOR]
    return found[0] if found else None


def marks_patch(node: Object, *, ready: bool) -> Object | None:
    """Return the merge patch that makes label and taint say `ready`, or None where they do.

    Taints are one list, so the patch carries the version that it was computed from: a taint that another set meanwhile is not lost.
    """
    labels = node["metadata"].get("labels", {})
    taints = node.get("spec", {}).get("taints", [])
    others = [taint for taint in taints if taint["key"] != names.TAINT_NOT_READY]
    wanted_taints = others if ready else [*others, TAINT]
    wanted_label = names.GVISOR_READY if ready else None
    if labels.get(names.LABEL_GVISOR) == wanted_label and len(taints) == len(wanted_taints):
        return None
    return {
        "metadata": {
            "resourceVersion": node["metadata"]["resourceVersion"],
            "labels": {names.LABEL_GVISOR: wanted_label},
        },
        "spec": {"taints": wanted_taints or None},
    }


def condition_patch(node: Object, verdict: Verdict, *, now: str) -> Object | None:
    """Return the strategic merge patch of the node's status that states the verdict, or None where it is stated.

    Args:
        node: as last read.
        verdict: what to say.
        now: RFC 3339, UTC.
    """
    status = "True" if verdict.ready else "False"
    before = condition(node) or {}
    if (before.get("status"), before.get("reason"), before.get("message")) == (
        status,
        verdict.reason.value,
        verdict.message,
    ):
        return None
    since = before.get("lastTransitionTime", now) if before.get("status") == status else now
    stated = {
        "type": names.CONDITION_GVISOR,
        "status": status,
        "reason": verdict.reason.value,
        "message": verdict.message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": since,
    }
    return {"status": {"conditions": [stated]}}


def runtime_version(node: Object) -> str:
    """Return the container runtime and its version as the kubelet reports them."""
    return str(node.get("status", {}).get("nodeInfo", {}).get("containerRuntimeVersion", ""))


def kernel_version(node: Object) -> str:
    """Return the release of the node's own kernel."""
    return str(node.get("status", {}).get("nodeInfo", {}).get("kernelVersion", ""))


def knows_runtime(node: Object) -> bool:
    """Tell whether the kubelet has learnt from containerd that it can run gVisor (Kubernetes >= 1.31 reports this)."""
    handlers = node.get("status", {}).get("runtimeHandlers") or []
    return any(handler.get("name") == names.RUNTIME_HANDLER for handler in handlers)
