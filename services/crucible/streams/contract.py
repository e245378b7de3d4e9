"""The contract of events on Redis: names, fields, and how an event is written and read. The documentation is generated from it.

Nothing here does I/O or imports a client library.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from crucible.events import Event, EventType

if TYPE_CHECKING:
    from collections.abc import Mapping

STREAM = "crucible:events"
DEAD_STREAM = "crucible:events:dead"
# Kept for people to look into; what filled it faster than that is one and the same mistake.
DEAD_LENGTH = 10_000
CHANNEL_PREFIX = "evaluation:"

# Never in the stream: it says only that there is more to read, and many of them would push out what nothing else repeats.
HINTS = frozenset({EventType.OUTPUT})

ENTRY: Mapping[str, str] = MappingProxyType(
    {
        "event": "The event as JSON; the only field that a program needs",
        "type": "Its type, for people and filters",
        "evaluation_id": "Its evaluation",
        "seq": "Its position among the evaluation's own events",
    }
)
DEAD_ENTRY: Mapping[str, str] = MappingProxyType(
    {
        "event": "The `event` of the entry that was given up, whatever it held",
        "entry_id": "Its id in the stream",
        "group": "Consumer group that gave it up",
        "consumer": "Consumer that had it last",
        "deliveries": "How often it was delivered",
        "error": "What the last attempt at handling it said",
    }
)


class MalformedEntryError(ValueError):
    """An entry of the stream is no event; something other than storage wrote it."""


def channel(kind: EventType) -> str:
    """Return the Pub/Sub channel of a type of event."""
    return f"{CHANNEL_PREFIX}{kind}"


def encode(event: Event) -> str:
    """Return an event as the JSON that travels: what is not known is absent."""
    return event.model_dump_json(exclude_none=True)


def entry(event: Event) -> dict[str, str]:
    """Return the fields of an event's entry in the stream, in the order of `ENTRY`."""
    return {"event": encode(event), "type": event.type, "evaluation_id": event.evaluation_id, "seq": str(event.seq)}


def decode(fields: Mapping[str, str]) -> Event | None:
    """Read an entry's event; None if it is of a type that only later versions know.

    Raises:
        MalformedEntryError: it is no event.
    """
    try:
        return Event.model_validate_json(fields["event"])
    except KeyError:
        raise MalformedEntryError("the entry has no field `event`") from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if [problem["loc"] for problem in problems] == [("type",)] and fields.get("type") not in list(EventType):
            return None
        raise MalformedEntryError("; ".join(f"{problem['loc']}: {problem['msg']}" for problem in problems)) from None
