"""What tests make in a cluster, and its removal: by the test's own label, and nothing else.

    with KubernetesResourceManager(cluster, "my-test", namespace="default") as made:
        made.create(config_map)

Every object gets the label `crucible.dev/test-id`, the Pods of a Job too, and only what carries this test's value is ever deleted:
another suite's objects in the same namespace are safe. What a killed run has left is found by the label and its age (`reap`).
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import ContextDecorator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from crucible import names
from tests.support.policies import try_kubectl
from tests.support.waits import WaitTimeoutError, wait_until

if TYPE_CHECKING:
    from types import TracebackType

    from tests.support.policies import HasKubectl

Object = dict[str, Any]

LABEL_TEST = f"{names.DOMAIN}/test-id"
# In the order in which they are removed: first what would make the others anew.
KINDS = ("deployments.apps", "daemonsets.apps", "jobs.batch", "pods", "services", "configmaps", "secrets")
REAP_SECONDS = 30 * 60.0
GONE_SECONDS = 60.0


class CleanupLevel(StrEnum):
    """What to remove after a test."""

    NONE = "none"
    PODS = "pods"
    ALL = "all"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of object that are removed."""
        return {CleanupLevel.NONE: (), CleanupLevel.PODS: ("pods",), CleanupLevel.ALL: KINDS}[self]


class StillThereError(Exception):
    """What was to be removed could not be; the message names it."""


@dataclass(frozen=True)
class Found:
    """An object that a test made."""

    kind: str
    name: str
    age_seconds: float
    finalizers: tuple[str, ...]


def label_value(test: str) -> str:
    """Return a test's name as a label's value may be: at most 63 characters, of few kinds."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", test)[-63:].strip("-_.")


class KubernetesResourceManager(ContextDecorator):
    """The objects of one test: made through it, removed by it at the end of a `with` block or of the function that it decorates."""

    def __init__(
        self,
        cluster: HasKubectl,
        test_id: str,
        *,
        namespace: str,
        level: CleanupLevel = CleanupLevel.ALL,
        keep_failed: bool = False,
    ) -> None:
        """Begin with nothing made.

        Args:
            cluster: where.
            test_id: the label's value, the test's own.
            namespace: where objects that name no other are made, and where they are removed.
            level: what to remove.
            keep_failed: leave everything where it is if the test has failed.
        """
        self.test_id = label_value(test_id)
        self.failed = False
        self._cluster = cluster
        self._namespace = namespace
        self._level = level
        self._keep_failed = keep_failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.failed = self.failed or kind is not None
        self.cleanup()

    @property
    def selector(self) -> str:
        """Selects what this test made."""
        return f"{LABEL_TEST}={self.test_id}"

    def labelled(self, document: Object) -> Object:
        """Return a document with the test's label on it and on the Pods that it makes."""
        made = copy.deepcopy(document)
        made["metadata"].setdefault("namespace", self._namespace)
        owners = [made["metadata"]]
        if template := made.get("spec", {}).get("template"):
            owners.append(template.setdefault("metadata", {}))
        for metadata in owners:
            metadata.setdefault("labels", {})[LABEL_TEST] = self.test_id
        return made

    def create(self, document: Object) -> Object:
        """Make an object, and return it as the cluster has it."""
        said = self._cluster.kubectl("create", "-f", "-", "-o", "json", input=json.dumps(self.labelled(document)))
        return dict(json.loads(said))

    def found(self) -> list[Found]:
        """Return what of this test is in the cluster."""
        return find(self._cluster, self._namespace, self.selector)

    def cleanup(self) -> list[Found]:
        """Remove what the level says, and return what was removed.

        Raises:
            StillThereError: something could not be removed.
        """
        if self.failed and self._keep_failed:
            return []
        going = [one for one in self.found() if one.kind in self._level.kinds]
        remove(self._cluster, self._namespace, going)
        return going


def find(cluster: HasKubectl, namespace: str, selector: str, *, now: datetime | None = None) -> list[Found]:
    """Return the objects that a selector chooses, in the order in which they should be removed."""
    listed = json.loads(
        cluster.kubectl("get", ",".join(KINDS), "--namespace", namespace, "--selector", selector, "-o", "json")
    )
    kinds = {kind.partition(".")[0].removesuffix("s"): kind for kind in KINDS}
    now = now or datetime.now(UTC)
    found = [
        Found(
            kind=kinds[item["kind"].lower()],
            name=item["metadata"]["name"],
            age_seconds=(now - datetime.fromisoformat(item["metadata"]["creationTimestamp"])).total_seconds(),
            finalizers=tuple(item["metadata"].get("finalizers", ())),
        )
        for item in listed["items"]
    ]
    return sorted(found, key=lambda one: KINDS.index(one.kind))


def remove(cluster: HasKubectl, namespace: str, going: list[Found]) -> None:
    """Remove these objects and wait until they are gone; a Pod that waits for its output to be recorded waits no longer.

    Raises:
        StillThereError: some could not be removed.
    """
    for one in going:
        if names.FINALIZER_OUTPUT in one.finalizers:
            patch = json.dumps({"metadata": {"finalizers": None}})
            how = ("--namespace", namespace, "--type=merge", "--patch", patch)
            cluster.kubectl("patch", one.kind, one.name, *how, check=False)
    if not going:
        return
    words = [f"{one.kind}/{one.name}" for one in going]
    where = ("--namespace", namespace, "--ignore-not-found")
    _, said = try_kubectl(cluster, "delete", *where, "--cascade=foreground", "--grace-period=1", "--wait=false", *words)

    def gone() -> bool:
        return not cluster.kubectl("get", *where, "-o", "name", *words).split()

    try:
        # A Job's Pod waits for the Job controller, which takes its time over a Job that has failed.
        wait_until(gone, timeout=GONE_SECONDS, poll=0.5, describe="everything to be gone")
    except WaitTimeoutError:
        left = cluster.kubectl("get", *where, "-o", "name", *words).split()
        raise StillThereError(f"could not be removed from {namespace}: {', '.join(left)}; {said.strip()}") from None


def reap(
    cluster: HasKubectl, namespace: str, *, older_than: float = REAP_SECONDS, now: datetime | None = None
) -> list[Found]:
    """Remove what tests that are no more have left: everything with the label, of whatever test, that is older than so many seconds."""
    old = [one for one in find(cluster, namespace, LABEL_TEST, now=now) if one.age_seconds > older_than]
    remove(cluster, namespace, old)
    return old
