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


def build(app: Celery, hint: Hint) -> Message:
    """Return the message of a hint. The task's id is the evaluation's, so that the two are found under one name."""
    task = app.amqp.as_task_v2(hint.evaluation_id, TASK, args=(hint.evaluation_id,), ignore_result=True)
    content_type, content_encoding, body = serialization.dumps(task.body, serializer="json")
    headers = {**task.headers, "traceparent": hint.traceparent} if hint.traceparent else task.headers
    properties = {**task.properties, "delivery_mode": PERSISTENT}
    return Message(body, content_type, content_encoding, headers, properties)
