"""The message: a hint that an evaluation waits, in the form that any Celery worker runs (message protocol 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kombu import serialization

from crucible.broker.topology import TASK

if TYPE_CHECKING:
    from celery import Celery

    from crucible.limits import SizeClass

PERSISTENT = 2


@dataclass(frozen=True)
class Hint:
    """That an evaluation waits, and how urgently. Never the truth: the table in storage is."""

    evaluation_id: str
    size_class: SizeClass
    priority: int
    traceparent: str | None = None


@dataclass(frozen=True)
class Message:
    """A hint as it goes over the wire, for either transport."""

    body: str
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]

    def on(self, channel: Any, priority: int) -> Any:
        """Return it as this channel publishes it, at a priority as its broker counts."""
        return channel.prepare_message(
            self.body,
            priority=priority,
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            headers=self.headers,
            properties=self.properties,
        )


class Writer:
    """Writes messages as Celery does, from one that Celery wrote: making each anew takes it longer than sending it does."""

    # Within JSON and within a Python literal it is written as it stands, as every evaluation's id is.
    _PLACE = "ev-00000000000000000000000000"

    def __init__(self, app: Celery) -> None:
        task = app.amqp.as_task_v2(self._PLACE, TASK, args=(self._PLACE,), ignore_result=True)
        self._content_type, self._content_encoding, self._body = serialization.dumps(task.body, serializer="json")
        # What is not set is left out: a worker reads a missing header as none.
        self._headers = {name: value for name, value in task.headers.items() if value is not None}
        self._properties = {**task.properties, "delivery_mode": PERSISTENT}

    def write(self, hint: Hint) -> Message:
        """Return the message of a hint. The task's id is the evaluation's, so that the two are found under one name."""
        name = hint.evaluation_id
        headers = {
            **self._headers,
            "id": name,
            "root_id": name,
            "argsrepr": self._headers["argsrepr"].replace(self._PLACE, name),
        }
        if hint.traceparent:
            headers["traceparent"] = hint.traceparent
        return Message(
            self._body.replace(self._PLACE, name),
            self._content_type,
            self._content_encoding,
            headers,
            {**self._properties, "correlation_id": name},
        )
