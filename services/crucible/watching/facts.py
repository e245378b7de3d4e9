"""What a cluster says of a sandbox, read as facts: a pure function of its Job, its Pod and its node.

Kubernetes has no one place that says how a Pod ended. It is read here in order of authority: what we ourselves asked for, what the control
plane did to the Pod, what its node's kubelet said of it, what the container ended with. What nobody said stays unknown.

Some states may pass (an image that cannot be pulled just now, a node that is silent for a moment): those are doubts, which become
the end only if they last. A container's exit code is never the code's: the runner reports that, and a runner that was killed reports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from crucible import names
from crucible.evaluation import RETRYABLE_REASONS, Reason, State, terminal_state_of
from crucible.outcome import SandboxFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crucible.kubernetes.api import Object

# No retry mends these.
_IMAGE_FINAL = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_IMAGE_TROUBLE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"}
)
_CONTAINER_TROUBLE = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"}
)
_DISRUPTIONS = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "EvictionByEvictionAPI": Reason.PREEMPTED,  # a drain: giving way on purpose
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
}
# `status.reason` of a Pod that its kubelet ended.
_POD_REASONS = {
    "Evicted": Reason.EVICTED,
    "Preempting": Reason.PREEMPTED,
    "Terminated": Reason.PREEMPTED,  # the node shuts down in order
    "NodeShutdown": Reason.PREEMPTED,
    "Shutdown": Reason.PREEMPTED,
    "NodeLost": Reason.NODE_LOST,
}
# The container's end was not seen by anybody: its node was restarted under it.
_UNWITNESSED = frozenset({"ContainerStatusUnknown", "Unknown"})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long each kind of doubt may last, seconds."""

    scheduling: float
    node_lost: float
    image: float = 10.0
    container: float = 10.0
    # From having a node to having a sandbox on it; a node under load needs seconds.
    start: float = 60.0
    # From a deletion or a verdict of the kubelet to the container's end. Longer than any grace period that we set.
    ending: float = 10.0
    # A node that is not in our copy of the nodes may be so new that we have not heard of it.
    node_unknown: float = 5.0


@dataclass(frozen=True, slots=True)
class Doubt:
    """It is over if this lasts. `kind` tells one doubt from the next, so that each has its own time."""

    kind: str
    seconds: float
    facts: SandboxFacts
    # Where the cluster tells it; otherwise whoever watches counts.
    lasted: float | None = None

    def seconds_left(self, watched: float) -> float:
        """Return how long it may still last, if it has been watched for so many seconds."""
        return self.seconds - (watched if self.lasted is None else max(watched, self.lasted))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the objects say together.

    Attributes:
        facts: what was done to the sandbox from outside, as far as it is known now.
        over: nothing more can happen to it.
        readable: there is a container that has run, on a node that answers, and so a log.
        exited: the container has ended, so that its log grows no more.
        doubt: what ends it if it lasts.
        message: the termination message, only of a container that ended by itself with 0; any other may be the code's forgery.
        started_at: when the container was started, by its node's clock and to the second.
        log_era: changes whenever a stream of the log that was open before may have gone deaf.
    """

    facts: SandboxFacts
    over: bool = False
    readable: bool = False
    exited: bool = False
    doubt: Doubt | None = None
    message: str | None = None
    started_at: datetime | None = None
    log_era: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the sandbox's maker wrote on it, for the explanation of its end."""

    memory_bytes: int
    timeout_seconds: int


def wanted_of(*things: Object | None) -> Wanted:
    """Read what was asked for from the annotations of the Job or the Pod."""
    annotations = _annotations(*things)

    def number(name: str) -> int:
        text = annotations.get(name, "")
        return int(text) if text.isascii() and text.isdigit() else 0

    return Wanted(number(names.ANNOTATION_MEMORY_BYTES), number(names.ANNOTATION_TIMEOUT_SECONDS))


def sandbox_of(thing: Object) -> str | None:
    """Return the name of the sandbox that a Job or Pod belongs to, from its labels."""
    labels = thing["metadata"].get("labels") or {}
    evaluation_id, attempt = labels.get(names.LABEL_EVALUATION), labels.get(names.LABEL_ATTEMPT, "")
    if not evaluation_id or not attempt.isdigit():
        return None
    name = names.sandbox_name(evaluation_id, int(attempt))
    return name if names.parse_sandbox_name(name) else None


def is_collected(job: Object | None) -> bool:
    """Whether everything about a Job is recorded."""
    return job is not None and (job["metadata"].get("labels") or {}).get(names.LABEL_COLLECTED) == "true"


def holds_output(pod: Object) -> bool:
    """Whether a Pod is kept for its output."""
    return names.FINALIZER_OUTPUT in (pod["metadata"].get("finalizers") or [])


def read(
    job: Object | None,
    pod: Object | None,
    nodes: Mapping[str, Object],
    patience: Patience,
    *,
    age_seconds: float,
    last_job: Object | None = None,
) -> Reading:
    """Read the objects of one sandbox.

    Args:
        job: its Job, None if there is none (any more).
        pod: its Pod, None if there is none (yet, or any more).
        nodes: all nodes by name.
        patience: how long doubts may last.
        age_seconds: since the Job was created.
        last_job: the Job as it was last seen, which still says what was asked for.
    """
    base = _asked(job or last_job, pod)
    if pod is None:
        return _without_pod(job, base, patience, age_seconds)
    reading = _with_container(pod, _container(pod), _disrupted(pod, base), patience, age_seconds)
    return _on_node(pod, nodes, reading, patience)


# -- what we asked for


def _annotations(*things: Object | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for thing in things:
        if thing is not None:
            found = {**(thing["metadata"].get("annotations") or {}), **found}
    return found


def _asked(job: Object | None, pod: Object | None) -> SandboxFacts:
    """Return why someone had it stopped, if someone had."""
    try:
        reason = Reason(_annotations(job, pod).get(names.ANNOTATION_STOP, ""))
    except ValueError:
        return SandboxFacts()
    if terminal_state_of(reason) is State.CANCELLED:
        return SandboxFacts(cancelled=reason)
    if reason in RETRYABLE_REASONS:
        return SandboxFacts(lost=reason)
    return SandboxFacts()


def _lost(facts: SandboxFacts, reason: Reason, description: str) -> SandboxFacts:
    """Add a loss, unless a stop was asked for or an earlier cause is known."""
    if facts.lost or facts.cancelled:
        return facts
    return facts.model_copy(update={"lost": reason, "exit_description": _plain(description)})


def _described(facts: SandboxFacts, description: str) -> SandboxFacts:
    if facts.exit_description:
        return facts
    return facts.model_copy(update={"exit_description": _plain(description)})


def _plain(text: str) -> str:
    # Validated anew, since `model_copy` does not: what a node says is cut and cleaned like all that is told.
    return SandboxFacts(exit_description=text).exit_description or ""


# -- no Pod


def _without_pod(job: Object | None, base: SandboxFacts, patience: Patience, age: float) -> Reading:
    if job is None:
        return Reading(_described(base, "it was deleted from the cluster"), over=True)
    if base.cancelled or base.lost:
        return Reading(_described(base, "stopped before it had begun"), over=True)
    if job["metadata"].get("deletionTimestamp"):
        return Reading(_described(base, "its Job was deleted before it had a Pod"), over=True)
    ended = _true_condition(job, ("Failed", "FailureTarget", "Complete"))
    if ended:
        # A moment for the Pod itself, which says more.
        why = f"its Pod is gone ({ended.get('reason') or ended['type']}: {ended.get('message') or 'no more is known'})"
        return Reading(base, doubt=Doubt("pod gone", 2.0, _described(base, why)))
    why = "the cluster did not make a Pod for it in time; its namespace's quota and its events say why"
    return Reading(base, doubt=Doubt("no pod", patience.scheduling, _lost(base, Reason.SCHEDULING, why), age))


# -- what was done to the Pod


def _disrupted(pod: Object, base: SandboxFacts) -> SandboxFacts:
    """Return what the control plane, and then the kubelet, say that they did."""
    status = pod.get("status", {})
    reason, message = status.get("reason") or "", status.get("message") or ""
    if known := _POD_REASONS.get(reason):
        return _lost(base, known, f"{reason}: {message}" if message else reason)
    target = _true_condition(pod, ("DisruptionTarget",))
    if target and (known := _DISRUPTIONS.get(target.get("reason") or "")):
        return _lost(base, known, f"{target['reason']}: {target.get('message') or 'no more is known'}")
    if pod["metadata"].get("deletionTimestamp"):
        return _described(base, "its Pod was deleted")
    return base


def _with_container(pod: Object, container: Object, facts: SandboxFacts, patience: Patience, age: float) -> Reading:
    status = pod.get("status", {})
    state = container.get("state") or {}
    terminated, running, waiting = (state.get(name) for name in ("terminated", "running", "waiting"))
    started_at = _moment((terminated or running or {}).get("startedAt"))
    if terminated:
        return _terminated(terminated, _deadline(status, facts, ran=True), started_at)
    ended = status.get("phase") in ("Failed", "Succeeded")
    if ended:
        facts = _deadline(status, facts, ran=bool(running))
    deleted = bool(pod["metadata"].get("deletionTimestamp"))
    if running:
        reading = Reading(facts, readable=True, started_at=started_at)
        if not ended and not deleted:
            return reading
        why = "its container's end was not told after the Pod's"
        return replace(reading, doubt=Doubt("ending", patience.ending, _described(facts, why)))
    if ended:
        why = f"{status.get('reason') or 'it failed'}: {status.get('message') or 'its container never ran'}"
        return Reading(_described(facts, why), over=True)
    if deleted:
        # Its node, if it has one already, says when nothing of it is left.
        at_once = not pod["spec"].get("nodeName")
        return Reading(facts, over=at_once, doubt=None if at_once else Doubt("ending", patience.ending, facts))
    doubt = _waiting(waiting, facts, patience) if waiting else None
    return Reading(facts, doubt=doubt or _not_begun(pod, facts, patience, age))


def _deadline(status: Object, facts: SandboxFacts, *, ran: bool) -> SandboxFacts:
    if status.get("reason") != "DeadlineExceeded":
        return facts
    if ran:
        return facts.model_copy(update={"deadline_exceeded": True})
    return _lost(facts, Reason.SANDBOX_ERROR, "its container did not start before the Pod's deadline")


def _terminated(terminated: Object, facts: SandboxFacts, started_at: datetime | None) -> Reading:
    reason, code = terminated.get("reason") or "no reason", terminated.get("exitCode")
    message = None
    if reason == "OOMKilled":
        # The reason and not the code: under gVisor it reads 128, elsewhere 137.
        facts = facts.model_copy(update={"oom_kills": 1})
    elif reason in _UNWITNESSED and not facts.deadline_exceeded:
        facts = _lost(facts, Reason.NODE_LOST, f"its node does not know how its container ended ({reason})")
    elif reason == "Completed" and code == 0:
        message = terminated.get("message")
    facts = _described(facts, f"its container ended with {reason}, exit code {code}")
    # A container that could not even be started has no log.
    began = started_at is not None and started_at.year > 1970 and reason != "StartError"
    return Reading(facts, over=True, exited=True, readable=began, message=message, started_at=started_at)


def _waiting(waiting: Object, facts: SandboxFacts, patience: Patience) -> Doubt | None:
    reason = waiting.get("reason") or ""
    why = f"{reason}: {waiting.get('message') or 'no more is known'}"
    if reason in _IMAGE_FINAL:
        return Doubt("image", 0, _lost(facts, Reason.IMAGE_ERROR, why))
    if reason in _IMAGE_TROUBLE:
        return Doubt("image", patience.image, _lost(facts, Reason.IMAGE_ERROR, why))
    if reason in _CONTAINER_TROUBLE:
        return Doubt("container", patience.container, _lost(facts, Reason.SANDBOX_ERROR, why))
    return None


def _not_begun(pod: Object, facts: SandboxFacts, patience: Patience, age: float) -> Doubt | None:
    if not pod["spec"].get("nodeName"):
        condition = _condition(pod, "PodScheduled") or {}
        why = f"no node took it in time: {condition.get('message') or 'the scheduler has not said why'}"
        return Doubt("scheduling", patience.scheduling, _lost(facts, Reason.SCHEDULING, why), age)
    if _true_condition(pod, ("PodReadyToStartContainers",)):
        # The sandbox is made, and its image is being pulled, for which the Pod's own deadline is the limit.
        return None
    why = "its node did not make the sandbox in time; the events of the Pod say why"
    return Doubt("start", patience.start, _lost(facts, Reason.SANDBOX_ERROR, why))


# -- the node


def _on_node(pod: Object, nodes: Mapping[str, Object], reading: Reading, patience: Patience) -> Reading:
    """Add what the node's state means: whoever is on a node that does not answer may be lost."""
    name = pod["spec"].get("nodeName")
    if not name:
        return reading
    node = nodes.get(name)
    ready = None if node is None else _condition(node, "Ready")
    if ready is not None and ready.get("status") == "True":
        return replace(reading, log_era=f"{name} {ready.get('lastTransitionTime', '')}")
    # Its log cannot be had now, and no word of its kubelet is to be awaited. An end without its output is none.
    unread, reading = reading.readable, replace(reading, readable=False)
    if reading.over and not unread:
        return reading
    if node is None:
        kind, seconds, why = "node unknown", patience.node_unknown, f"its node {name} is gone"
    else:
        kind, seconds = "node lost", patience.node_lost
        why = f"its node {name} does not answer ({(ready or {}).get('reason') or 'it has told nothing yet'})"
    facts = _lost(reading.facts, Reason.NODE_LOST, why)
    if pod["metadata"].get("deletionTimestamp"):
        # Kubernetes has given it up, or someone had it stopped: there is nobody left who could say more.
        return replace(reading, facts=facts, over=True, doubt=None)
    return replace(reading, over=False, doubt=Doubt(kind, seconds, facts))


# -- reading objects


def _container(pod: Object) -> Object:
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == names.CONTAINER:
            return dict(status)
    return {}


def _condition(thing: Object, kind: str) -> Object | None:
    for condition in thing.get("status", {}).get("conditions") or []:
        if condition["type"] == kind:
            return dict(condition)
    return None


def _true_condition(thing: Object, kinds: Iterable[str]) -> Object | None:
    found = (_condition(thing, kind) for kind in kinds)
    return next((condition for condition in found if condition and condition.get("status") == "True"), None)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
