"""What the broker holds, as data: exchanges, queues, bindings, users. Definitions, declarations and verification all read this.

Nothing here does I/O or imports a client library.
"""

from __future__ import annotations

from crucible.limits import SizeClass

VHOST = "crucible"
# Topic exchanges: a consumer that wants all classes, or a tap for debugging, binds with a pattern and disturbs nobody.
EXCHANGE = "crucible.evaluations"
DEAD_EXCHANGE = "crucible.dead"
DEAD_QUEUE = "evaluations.dead"

TASK = "crucible.evaluate"


def queue_name(size_class: SizeClass) -> str:
    """Return the queue in which evaluations of this size class wait."""
    return f"evaluations.{size_class}"


def routing_key(size_class: SizeClass) -> str:
    """Return the routing key of a size class, on `EXCHANGE` and, for what was given up, on `DEAD_EXCHANGE`."""
    return f"evaluation.{size_class}"
