"""What may be removed, and how. Pure: objects and records in, decisions out.

Storage is the judge of whether an attempt is over; the cluster only says what is there. An object is removed because its Job is marked
as collected, or because it is old and storage does not hold its attempt, and for no other reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from crucible import names
from crucible.evaluation import HELD_STATES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crucible.contracts import EvaluationRecord

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One attempt at one evaluation: what a Job, its Pods and its ConfigMaps have in common."""

    evaluation_id: str
    number: int

    def __str__(self) -> str:
        return names.sandbox_name(self.evaluation_id, self.number)

    @property
    def selector(self) -> str:
        """The label selector of its objects."""
        return f"{names.OWN_SELECTOR}={self.evaluation_id},{names.LABEL_ATTEMPT}={self.number}"


def attempt_of(thing: Object) -> Attempt | None:
    """Return the attempt that an object belongs to; None if it is not one of ours, whatever it looks like."""
    labels = thing["metadata"].get("labels") or {}
    evaluation_id, number = labels.get(names.LABEL_EVALUATION), labels.get(names.LABEL_ATTEMPT, "")
    if labels.get(names.LABEL_MANAGED_BY) != names.MANAGED_BY or not evaluation_id or not number.isdecimal():
        return None
    return Attempt(evaluation_id, int(number))


class Why(StrEnum):
    """Why the objects of an attempt may go."""

    COLLECTED = "collected"
    ENDED = "ended"
    VOID = "void"
    UNKNOWN = "unknown"

    @property
    def words(self) -> str:
        """The same for people."""
        return _WORDS[self]


_WORDS = {
    Why.COLLECTED: "everything about it is recorded",
    Why.ENDED: "its evaluation has ended",
    Why.VOID: "storage does not hold this attempt",
    Why.UNKNOWN: "storage knows no such evaluation",
}


def why_over(record: EvaluationRecord | None, attempt: Attempt) -> Why | None:
    """Return why an attempt is over by storage's word; None while it is under way."""
    if record is None:
        return Why.UNKNOWN
    if record.attempt != attempt.number:
        return Why.VOID
    if record.state in HELD_STATES:
        return None
    return Why.ENDED if record.state.terminal else Why.VOID


def is_collected(jobs: Iterable[Object]) -> bool:
    """Whether a watcher has said that everything about the attempt is recorded."""
    return any((job["metadata"].get("labels") or {}).get(names.LABEL_COLLECTED) == "true" for job in jobs)


def youngest_seconds(things: Iterable[Object], now: datetime) -> float:
    """Return the age of the youngest object, by the cluster's clock of creation and ours of now, which agree to seconds."""
    return min(
        (now - datetime.fromisoformat(thing["metadata"]["creationTimestamp"])).total_seconds() for thing in things
    )


def orphan_age(limit: float, objects: int, high_water: int) -> float:
    """Return how old an orphan must be, seconds: half of the limit while there are too many objects."""
    return limit / 2 if objects > high_water else limit


# --- Pods -----------------------------------------------------------------------------------------------------------------


class Step(StrEnum):
    """What to do about an object now."""

    DELETE = "delete"
    RELEASE = "release"  # take our finalizer away
    FORCE = "force"  # remove without its node's word
    WAIT = "wait"


# A watcher takes the finalizer away before it marks the Job as collected; this is for a Pod that nobody watched.
RELEASE_AFTER_S = 10.0
# Within it the cluster's garbage collector has taken along what the Job owned.
COLLECTOR_S = 5.0


def terminating(thing: Object) -> bool:
    """Whether its deletion has begun."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def node_lost(node: Object | None) -> bool:
    """Whether a node cannot say what became of its Pods: it is gone, or the cluster does not hear it."""
    if node is None:
        return True
    conditions = {condition["type"]: condition["status"] for condition in node.get("status", {}).get("conditions", ())}
    return conditions.get("Ready") != "True"


def pod_step(pod: Object, nodes: Mapping[str, Object], *, owned: bool, waited: float, node_lost_seconds: float) -> Step:
    """Return what to do about a Pod of an attempt that is over.

    Args:
        pod: the Pod.
        nodes: the cluster's nodes by name.
        owned: its Job is still there, whose deletion takes the Pod along.
        waited: how long its removal has been going on, seconds.
        node_lost_seconds: how long a lost node is waited for.
    """
    if names.FINALIZER_OUTPUT in pod["metadata"].get("finalizers", ()):
        if waited >= RELEASE_AFTER_S:
            return Step.RELEASE
        return Step.WAIT if owned or terminating(pod) else Step.DELETE
    if not terminating(pod):
        being_taken = bool(pod["metadata"].get("ownerReferences")) and waited < COLLECTOR_S
        return Step.WAIT if owned or being_taken else Step.DELETE
    node = pod["spec"].get("nodeName")
    if node and waited >= node_lost_seconds and node_lost(nodes.get(node)):
        return Step.FORCE
    return Step.WAIT


def obstacle(thing: Object) -> str:
    """Say what an object that should be gone waits for."""
    metadata = thing["metadata"]
    if finalizers := metadata.get("finalizers"):
        return f"is kept by the finalizers {', '.join(finalizers)}"
    if node := thing.get("spec", {}).get("nodeName"):
        return f"waits for node {node} to say that its processes have ended"
    return "is being deleted" if terminating(thing) else "is not being deleted"
