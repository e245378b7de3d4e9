"""The names by which the parts of a cluster know each other: namespaces, labels, finalizers, taints, classes.

One place for all, since a label that two sides spell differently fails in silence. The YAML in `policies/` and `gitops/` repeats
them by necessity; a test holds the two together.
"""

from __future__ import annotations

import re

DOMAIN = "crucible.dev"

PLATFORM_NAMESPACE = "crucible"
EVALUATION_NAMESPACE = "crucible-evaluations"
NODE_NAMESPACE = "crucible-node"  # what works on the nodes themselves, and so needs privileges: the gVisor installer

# On every Job, ConfigMap and Pod of an evaluation.
LABEL_EVALUATION = f"{DOMAIN}/evaluation-id"
LABEL_ATTEMPT = f"{DOMAIN}/attempt"
LABEL_SIZE_CLASS = f"{DOMAIN}/size-class"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_PART_OF = "app.kubernetes.io/part-of"
MANAGED_BY = "crucible-dispatcher"
COMPONENT_EVALUATION = "evaluation"
PART_OF = "crucible"
# Selects exactly what the dispatcher made. Nothing else is ever deleted.
OWN_SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_EVALUATION}"

# On a Job: everything about it is recorded in storage, so it may be deleted.
LABEL_COLLECTED = f"{DOMAIN}/collected"
# On a Job: why someone had it stopped; a `Reason`.
ANNOTATION_STOP = f"{DOMAIN}/stop"
# On a Job and its Pod: facts that the monitor needs and that labels cannot hold.
ANNOTATION_MEMORY_BYTES = f"{DOMAIN}/memory-bytes"
ANNOTATION_TIMEOUT_SECONDS = f"{DOMAIN}/timeout-seconds"
ANNOTATION_OWNER = f"{DOMAIN}/owner"
ANNOTATION_TRACEPARENT = f"{DOMAIN}/traceparent"
# On a Pod: its output and its end are not yet recorded, so Kubernetes must keep it.
FINALIZER_OUTPUT = f"{DOMAIN}/output"

RUNTIME_CLASS = "gvisor"
RUNTIME_HANDLER = "runsc"
PRIORITY_PLATFORM = "crucible-platform"
PRIORITY_EVALUATION = "crucible-evaluation"
SERVICE_ACCOUNT_EVALUATION = "evaluation"
CONTAINER = "evaluation"

# Nodes that are for sandboxes, and kept free of all else.
LABEL_SANDBOX_NODE = f"{DOMAIN}/sandbox"
TAINT_SANDBOX = f"{DOMAIN}/sandbox"
# Every sandbox node starts with it; the gVisor installer lifts it once a sandbox has really run there.
TAINT_NOT_READY = f"{DOMAIN}/gvisor-not-ready"
LABEL_GVISOR = f"{DOMAIN}/gvisor"
GVISOR_READY = "ready"
CONDITION_GVISOR = "CrucibleGvisorReady"

LEASE_LEADER = "crucible-monitor"
LABEL_WATCHER_LEASE = f"{DOMAIN}/watcher"

_OBJECT_NAME = re.compile(r"(?P<id>ev-[0-9a-hjkmnp-tv-z]{26})-(?P<attempt>[0-9]{1,9})")


def sandbox_name(evaluation_id: str, attempt: int) -> str:
    """Return the name of an attempt's Job and ConfigMaps: the same for every try at creating them, and another for each attempt."""
    return f"{evaluation_id}-{attempt}"


def parse_sandbox_name(name: str) -> tuple[str, int] | None:
    """Return evaluation id and attempt of a name that `sandbox_name` made, or None."""
    match = _OBJECT_NAME.fullmatch(name)
    return (match["id"], int(match["attempt"])) if match else None
