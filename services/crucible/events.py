"""Events: what happened to an evaluation, told to whoever listens.

The table in storage is the truth; a bus only carries hints that arrive at least once and possibly late. A subscriber that
fell behind is told so (`Lagged`) and reads the table again. In `local` the bus is this process; Redis Streams take its place
where `CRUCIBLE_REDIS_URL` names one.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from crucible.evaluation import Reason, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class EventType(StrEnum):
    """Event names; on Pub/Sub the channel is `evaluation:<type>`."""

    SUBMITTED = "submitted"
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    OUTPUT = "output"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    COLLECTED = "collected"


class Event(BaseModel):
    """One thing that happened. (`evaluation_id`, `seq`) is unique and orders the events of an evaluation.

    `output` events are not in the table: they say only that there is more to read, and carry the `seq` of the last transition.
    """

    model_config = ConfigDict(frozen=True)

    type: EventType
    evaluation_id: str
    seq: int = Field(ge=1, description="Position among the evaluation's own events, from 1")
    at: datetime
    owner: str
    actor: str = Field(description="Who caused it: an owner, or a part of the platform")
    state: State
    attempt: int = Field(0, ge=0, description="Which attempt at running it; 0 before the first")
    reason: Reason | None = None
    detail: str | None = None
    data: dict[str, Any] = Field(
        default_factory=dict, description="What belongs to the type, such as exit_code or priority"
    )
    cursor: str | None = Field(None, description="Where to resume a stream over all evaluations after this event")


class Lagged:
    """Put in place of events that a slow subscriber missed: read the table, then go on."""


class EventBus(Protocol):
    """Carries events from storage to whoever listens."""

    def publish(self, event: Event) -> None:
        """Hand an event to every subscriber that wants it. Never blocks and never fails for a slow subscriber."""

    def subscribe(self, wants: Callable[[Event], bool]) -> Any:
        """Return a context manager giving an `asyncio.Queue` of `Event` and `Lagged`."""


class InProcessBus:
    """The bus of the `local` profile: bounded queues in one event loop."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._subscribers: dict[asyncio.Queue[Event | Lagged], Callable[[Event], bool]] = {}

    def publish(self, event: Event) -> None:
        """Hand an event to every subscriber that wants it; a full queue is emptied and marked `Lagged`."""
        for queue, wants in self._subscribers.items():
            if not wants(event):
                continue
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(Lagged())
            queue.put_nowait(event)

    @contextmanager
    def subscribe(self, wants: Callable[[Event], bool]) -> Iterator[asyncio.Queue[Event | Lagged]]:
        """Listen for as long as the context is open."""
        queue: asyncio.Queue[Event | Lagged] = asyncio.Queue(self._capacity)
        self._subscribers[queue] = wants
        try:
            yield queue
        finally:
            del self._subscribers[queue]
