"""The Pods in whatever runs Pods, and what every container of any namespace must have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crucible_policies.resource import Resource
from crucible_policies.rule import ResourceRule

# Where the template of a kind's Pods is, from the object on.
TEMPLATES = {
    ("core", "PodTemplate"): ("template",),
    ("core", "ReplicationController"): ("spec", "template"),
    ("apps", "Deployment"): ("spec", "template"),
    ("apps", "StatefulSet"): ("spec", "template"),
    ("apps", "DaemonSet"): ("spec", "template"),
    ("apps", "ReplicaSet"): ("spec", "template"),
    ("batch", "Job"): ("spec", "template"),
    ("batch", "CronJob"): ("spec", "jobTemplate", "spec", "template"),
}
_TYPE = re.compile(r"^kubernetes:(?P<group>[^/:]+)/[^:]+:(?P<kind>\w+)$")
_BOUNDED = ("cpu", "memory")


@dataclass(frozen=True)
class Object:
    """An object of Kubernetes.

    Attributes:
        group: such as apps; that of Pods is core.
        kind: such as Deployment.
        namespace: the one it is made in.
        content: the manifest.
        where: its path within the resource: empty but for a member of a list.
    """

    group: str
    kind: str
    namespace: str
    content: Mapping[str, Any]
    where: str = ""


@dataclass(frozen=True)
class Pod:
    """A Pod, or the template of one.

    Attributes:
        metadata: its own, or the template's.
        spec: what runs in it.
        where: the spec's path within the resource.
    """

    metadata: Mapping[str, Any]
    spec: Mapping[str, Any]
    where: str

    def containers(self, *, init: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Return its containers, each with its path."""
        for key in ("containers", "initContainers") if init else ("containers",):
            for number, each in enumerate(self.spec.get(key) or ()):
                yield f"{self.where}.{key}[{number}]", each


def objects(found: Resource) -> Iterator[Object]:
    """Return the object that a resource is, or those of a list. Of patches there is no telling what they will be part of."""
    match = _TYPE.match(found.type)
    if not match or match["kind"].endswith("Patch"):
        return
    kind, content = match["kind"], found.properties
    if kind.endswith("List"):
        for number, each in enumerate(content.get("items") or ()):
            yield Object(match["group"], kind.removesuffix("List"), _namespace(each, found), each, f"items[{number}].")
    else:
        yield Object(match["group"], kind, _namespace(content, found), content)


def _namespace(content: Mapping[str, Any], found: Resource) -> str:
    said = (content.get("metadata") or {}).get("namespace") or found.provider.get("namespace") or "default"
    return str(said)


def pods(made: Object) -> Iterator[Pod]:
    """Return the Pod that an object is, or makes."""
    if (made.group, made.kind) == ("core", "Pod"):
        path: tuple[str, ...] = ()
    elif (made.group, made.kind) in TEMPLATES:
        path = TEMPLATES[made.group, made.kind]
    else:
        return
    content = made.content
    for key in path:
        content = content.get(key) or {}
    yield Pod(content.get("metadata") or {}, content.get("spec") or {}, made.where + ".".join((*path, "spec")))


def unbounded_containers(found: Resource) -> Iterator[str]:
    """Tell which containers may take all that their node has."""
    for pod in (pod for made in objects(found) for pod in pods(made)):
        whole = (pod.spec.get("resources") or {}).get("limits") or {}
        for where, container in pod.containers():
            limits = (container.get("resources") or {}).get("limits") or {}
            if missing := [what for what in _BOUNDED if what not in limits and what not in whole]:
                yield f"{where} ({container.get('name')}).resources.limits lacks {' and '.join(missing)}; say how much it may take"


RULES = (
    ResourceRule(
        "container-limits",
        "a container, init containers included, without limits of CPU and memory",
        "one that leaks takes its node with it, and all evaluations on it",
        "`resources.limits.cpu` and `.memory`, of the container or of the whole Pod",
        unbounded_containers,
    ),
)
