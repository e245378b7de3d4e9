"""Why an evaluation waits, and for how long: the pure reading of a record, its place, the queue and the nodes.

An estimate is only that: the mean time for which recent evaluations of the size class held a slot, spread over the slots that
are busy. It says nothing before any evaluation has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible.api.views import Waiting, WaitingReason
from crucible.evaluation import State
from crucible.quantity import format_cpu, format_memory

if TYPE_CHECKING:
    from crucible.contracts import CapacityReport, EvaluationRecord, QueuePosition, QueueReport
    from crucible.evaluation import Resources
    from crucible.limits import SizeClass


def fits_now(resources: Resources, capacity: CapacityReport) -> bool:
    """Whether some node has room now."""
    return any(
        node.free_cpu_millis >= resources.cpu_millis and node.free_memory_bytes >= resources.memory_bytes
        for node in capacity.nodes
    )


def fits_ever(resources: Resources, capacity: CapacityReport) -> bool:
    """Whether some node could take it when empty. Without any node nothing is known, and nothing is refused."""
    return not capacity.nodes or any(
        node.total.cpu_millis >= resources.cpu_millis and node.total.memory_bytes >= resources.memory_bytes
        for node in capacity.nodes
    )


def estimate(ahead: int, running: int, mean_hold_seconds: float | None) -> float | None:
    """Return the seconds until a slot comes free for the one behind `ahead` others, while `running` slots are busy."""
    if mean_hold_seconds is None:
        return None
    # With a free slot the next one starts at once; with all busy, one comes free every mean / slots seconds.
    turns = ahead + 1 if running else ahead
    return round(turns * mean_hold_seconds / max(1, running), 3)


def _quantities(resources: Resources) -> str:
    return f"{format_memory(resources.memory_bytes)} memory and {format_cpu(resources.cpu_millis)} CPU"


def _running(queue: QueueReport | None, size_class: SizeClass) -> int | None:
    return None if queue is None else queue.running.get(size_class, 0)


def _queued(
    record: EvaluationRecord, position: QueuePosition | None, queue: QueueReport | None, capacity: CapacityReport | None
) -> Waiting:
    if position is None or position.position < 1:
        return Waiting(reason=WaitingReason.POSITION, detail=f"in the {record.size_class} queue")
    ahead = position.position - 1
    running = _running(queue, record.size_class)
    reason = WaitingReason.POSITION
    if capacity is not None and ahead == 0 and not fits_now(record.resources, capacity):
        reason = WaitingReason.CAPACITY
        detail = f"next in the {record.size_class} queue; no node has {_quantities(record.resources)} free now"
    elif ahead == 0:
        detail = f"next in the {record.size_class} queue"
    else:
        detail = f"{ahead} ahead of it in the {record.size_class} queue"
    if running is not None:
        detail += f"; {running} {'is' if running == 1 else 'are'} running" if running else "; none is running"
    if record.effective_priority != record.priority:
        detail += f"; for its long wait it counts as priority {record.effective_priority}"
    if record.retry_at is not None:
        detail += f"; its last attempt was lost, the next may begin at {record.retry_at:%H:%M:%S} UTC"
    return Waiting(
        reason=reason,
        detail=detail,
        position=position.position,
        ahead=ahead,
        estimated_wait_seconds=estimate(ahead, running or 0, position.mean_hold_seconds),
    )


def explain(
    record: EvaluationRecord,
    *,
    position: QueuePosition | None = None,
    queue: QueueReport | None = None,
    capacity: CapacityReport | None = None,
) -> Waiting | None:
    """Say why an evaluation waits, from as much as is known; None once it runs or has ended."""
    if record.state.terminal:
        return None
    if record.cancel_requested:
        return Waiting(reason=WaitingReason.CANCELLING, detail="it is to be cancelled; its sandbox is being ended")
    if record.state is State.RUNNING:
        return None
    if record.state is State.PROVISIONING:
        if capacity is not None and not fits_now(record.resources, capacity):
            detail = f"a worker has it and waits for a node with {_quantities(record.resources)} free"
            return Waiting(reason=WaitingReason.CAPACITY, detail=detail)
        return Waiting(reason=WaitingReason.STARTING, detail="a worker has it; its sandbox is being made")
    return _queued(record, position, queue, capacity)
