"""Events: what happened to an evaluation, told to whoever listens.

The table in storage is the truth; a bus only carries hints that arrive at least once and possibly late. A subscriber that
fell behind is told so (`Lagged`) and reads the table again. Within a process the bus is `InProcessBus`; between processes
`crucible.streams` carries the same events, where `CRUCIBLE_REDIS_URL` names a Redis.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from crucible.evaluation import Reason, State
from crucible.limits import SizeClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager


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


class EventData(BaseModel):
    """What belongs to one type of event. Later versions add members and take none away, so readers ignore what they do not know."""

    model_config = ConfigDict(frozen=True)


class SubmittedData(EventData):
    """Of `submitted`: what was asked for."""

    priority: int = Field(description="Priority that was asked for")
    size_class: SizeClass = Field(description="Queue that its memory limit puts it in")


class QueuedData(EventData):
    """Of `queued`: where it waits. Of one that is queued again nothing is repeated; `reason` and `detail` then say why."""

    priority: int | None = Field(None, description="Priority that was asked for; a long wait raises the effective one")
    size_class: SizeClass | None = Field(None, description="Queue that it waits in")


class ProvisioningData(EventData):
    """Of `provisioning`: who has it."""

    worker: str = Field(description="Worker that claimed it")


class RunningData(EventData):
    """Of `running`: where it runs."""

    sandbox: str | None = Field(
        None, description="Name of its sandbox; absent where the start was learned only with the end"
    )


class OutputData(EventData):
    """Of `output`: how much there is to read. Not in the table and not in the stream; only the bus and its channel carry it."""

    stdout_bytes: int = Field(ge=0, description="Standard output so far, bytes")
    stderr_bytes: int = Field(ge=0, description="Standard error so far, bytes")
    frames: int = Field(ge=0, description="Pieces of output so far, both streams together")


class EndedData(EventData):
    """Of the terminal events: how it ended. A number that nobody witnessed is absent, never a default."""

    exit_code: int | None = Field(None, description="Exit code, only if the code exited by itself")
    signal: int | None = Field(None, description="Number of the signal that ended it, if one did")
    exception_type: str | None = Field(
        None, description="Class of an uncaught exception, as the code's process told it"
    )
    run_seconds: float | None = Field(None, description="Time from start to end of the run, seconds")


class CollectedData(EventData):
    """Of `collected`: nothing. All output is stored, and what a cluster keeps of the sandbox may be deleted."""


class Event(BaseModel):
    """One thing that happened. (`evaluation_id`, `seq`) is unique and orders the events of an evaluation.

    `output` events are not in the table: they say only that there is more to read, and carry the `seq` of the last transition.
    """

    model_config = ConfigDict(frozen=True)

    type: EventType = Field(description="What happened")
    evaluation_id: str = Field(description="To which evaluation")
    seq: int = Field(ge=1, description="Position among the evaluation's own events, from 1")
    at: datetime = Field(description="When it became true")
    owner: str = Field(description="Whose evaluation it is")
    actor: str = Field(description="Who caused it: an owner, or a part of the platform")
    state: State = Field(description="State of the evaluation after it")
    attempt: int = Field(0, ge=0, description="Which attempt at running it; 0 before the first")
    reason: Reason | None = Field(None, description="Why it ended, or why an attempt was void")
    detail: str | None = Field(None, description="The same in words, for people")
    data: dict[str, Any] = Field(
        default_factory=dict,
        description="What belongs to this type of event, such as exit_code or worker",
    )
    cursor: str | None = Field(None, description="Where to resume a stream over all evaluations after this event")


# The contract of `Event.data`; schemas and documentation are generated from it.
DATA: Mapping[EventType, type[EventData]] = MappingProxyType(
    {
        EventType.SUBMITTED: SubmittedData,
        EventType.QUEUED: QueuedData,
        EventType.PROVISIONING: ProvisioningData,
        EventType.RUNNING: RunningData,
        EventType.OUTPUT: OutputData,
        EventType.COMPLETED: EndedData,
        EventType.FAILED: EndedData,
        EventType.TIMEOUT: EndedData,
        EventType.CANCELLED: EndedData,
        EventType.COLLECTED: CollectedData,
    }
)


class Lagged:
    """Put in place of events that a slow subscriber missed: read the table, then go on."""


class EventSink(Protocol):
    """Takes events."""

    def publish(self, event: Event) -> None:
        """Hand an event on. Never blocks and never fails for a slow or absent reader."""


class EventFeed(Protocol):
    """Gives events."""

    def subscribe(self, wants: Callable[[Event], bool]) -> AbstractContextManager[asyncio.Queue[Event | Lagged]]:
        """Return a context manager giving a queue of the events for which `wants` is true, and of `Lagged`."""


class EventBus(EventSink, EventFeed, Protocol):
    """Carries events from storage to whoever listens in the same process."""


class FanOut:
    """Hands each event to several sinks."""

    def __init__(self, *sinks: EventSink) -> None:
        self._sinks = sinks

    def publish(self, event: Event) -> None:
        """Hand an event to every sink."""
        for sink in self._sinks:
            sink.publish(event)


class InProcessBus:
    """The bus of the `local` profile: bounded queues in one event loop.

    Each subscriber hears its events in the order in which they were published. One that falls `capacity` events behind finds
    `Lagged` in place of all that it has not read yet.
    """

    def __init__(self, capacity: int = 1024) -> None:
        if capacity < 2:
            raise ValueError("a queue must hold at least the mark that it lagged, and the event after it")
        self._capacity = capacity
        self._subscribers: dict[asyncio.Queue[Event | Lagged], Callable[[Event], bool]] = {}

    def publish(self, event: Event) -> None:
        """Hand an event to every subscriber that wants it; a full queue is emptied and marked `Lagged`."""
        for queue, wants in self._subscribers.items():
            if not wants(event):
                continue
            if queue.full():
                _mark(queue)
            queue.put_nowait(event)

    def lag(self) -> None:
        """Tell every subscriber that events may have been missed."""
        for queue in self._subscribers:
            _mark(queue)

    @contextmanager
    def subscribe(self, wants: Callable[[Event], bool]) -> Iterator[asyncio.Queue[Event | Lagged]]:
        """Listen for as long as the context is open."""
        queue: asyncio.Queue[Event | Lagged] = asyncio.Queue(self._capacity)
        self._subscribers[queue] = wants
        try:
            yield queue
        finally:
            del self._subscribers[queue]


def _mark(queue: asyncio.Queue[Event | Lagged]) -> None:
    """Put the mark in place of all that was not read yet."""
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(Lagged())
