"""The state of the API service: its clients, caches and open streams, and how it starts, drains and stops."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import structlog

from crucible import __version__
from crucible.api.access import KeyRing, SubmissionRate, sees_all
from crucible.api.cached import Cached
from crucible.api.streams import Streams
from crucible.api.waiting import explain
from crucible.evaluation import State
from crucible.health import Health
from crucible.problems import ProblemError
from crucible.resilience import CallFailedError
from crucible.settings import TracingSettings
from crucible.tracing import Tracing

if TYPE_CHECKING:
    from fastapi import Request

    from crucible.api.views import Waiting
    from crucible.auth import Principal
    from crucible.clients import DispatcherClient, StorageClient
    from crucible.contracts import CapacityReport, EvaluationRecord, QueueReport
    from crucible.events import Event, EventFeed
    from crucible.settings import Settings

# How old the queue's and nodes' state may be where it only explains a wait, and how long such an explanation may be waited for.
_GLANCE_SECONDS = 1.0
_GLANCE_PATIENCE = 0.25
# A long-poll reads the table again at least this often, should the bus stay silent.
_POLL_SECONDS = 10.0
_DRAIN_RETRY_SECONDS = 5.0
_STREAMS_GRACE_SECONDS = 2.0


class Api:
    """What the routes work with. Use `start` before serving, `drain` when told to stop, `aclose` at the end."""

    def __init__(
        self,
        settings: Settings,
        storage: StorageClient,
        dispatcher: DispatcherClient,
        bus: EventFeed,
        *,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.storage = storage
        self.dispatcher = dispatcher
        self.health = Health("api", __version__)
        self.tracing = tracing or Tracing(TracingSettings(), "api")
        self.keys = KeyRing(storage, settings.api.key_cache_seconds)
        self.rate = SubmissionRate(settings)
        self.streams = Streams(bus)
        self._capacity: Cached[CapacityReport] = Cached(dispatcher.capacity)
        self._queue: Cached[QueueReport] = Cached(storage.queue)

    async def start(self) -> None:
        """Begin to learn how large the nodes are; nothing waits for it."""
        self.largest_known()

    def drain(self) -> None:
        """Take no new submissions, and have streams and long-polls end so that their readers resume elsewhere."""
        self.health.draining = True
        self.streams.close()

    async def aclose(self) -> None:
        """Drain, and let go of everything once the streams have ended. Harmless when repeated."""
        self.drain()
        await self.streams.ended(_STREAMS_GRACE_SECONDS)
        await self._capacity.aclose()
        await self._queue.aclose()
        await self.rate.aclose()

    def refuse_while_draining(self) -> None:
        """Refuse new work once the service is going away.

        Raises:
            ProblemError: 503 with Retry-After.
        """
        if self.health.draining:
            raise ProblemError(
                "unavailable", "this server is shutting down and takes nothing new", retry_after=_DRAIN_RETRY_SECONDS
            )

    def largest_known(self) -> CapacityReport | None:
        """Return the nodes as last heard of, without waiting; None if the dispatcher has not answered for long."""
        trust = self.settings.api.capacity_cache_seconds
        return self._capacity.known(fresh=trust, usable=2 * trust)

    async def find(self, who: Principal, evaluation_id: str) -> EvaluationRecord:
        """Return an evaluation that the caller may see.

        Raises:
            ProblemError: 404, also for another owner's.
        """
        structlog.contextvars.bind_contextvars(evaluation_id=evaluation_id)
        try:
            record = await self.storage.get(evaluation_id)
        except CallFailedError as error:
            if error.status == 404:
                raise _no_evaluation(evaluation_id) from error
            raise
        if record.owner != who.owner and not sees_all(who):
            raise _no_evaluation(evaluation_id)
        return record

    async def wait_ended(self, record: EvaluationRecord, seconds: float) -> EvaluationRecord:
        """Return the evaluation once it has ended, or as it is after `seconds`."""
        deadline = time.monotonic() + seconds
        with self.streams.listen(lambda event: about(event, record.id) and event.state.terminal) as listener:
            while not record.state.terminal:
                record = await self.storage.get(record.id)
                left = deadline - time.monotonic()
                if record.state.terminal or left <= 0 or listener.closing:
                    break
                await listener.wait(min(left, _POLL_SECONDS))
        return record

    async def waiting(self, record: EvaluationRecord) -> Waiting | None:
        """Say why one evaluation waits, as well as can be told at once."""
        position = None
        if record.state is State.QUEUED and not record.cancel_requested:
            # It only adds to the explanation, so its absence must not hide the evaluation.
            with contextlib.suppress(CallFailedError):
                position = await self.storage.position(record.id)
        if record.state not in (State.QUEUED, State.PROVISIONING):
            return explain(record)
        queue = await self._queue.glance(_GLANCE_SECONDS, patience=_GLANCE_PATIENCE)
        capacity = await self._capacity.glance(_GLANCE_SECONDS, patience=_GLANCE_PATIENCE)
        return explain(record, position=position, queue=queue, capacity=capacity)


def about(event: Event, evaluation_id: str) -> bool:
    """Whether an event concerns an evaluation."""
    return event.evaluation_id == evaluation_id


def _no_evaluation(evaluation_id: str) -> ProblemError:
    return ProblemError("not-found", f"there is no evaluation {evaluation_id}")


def api_of(request: Request) -> Api:
    """Return the service that a request belongs to."""
    api: Api = request.app.state.api
    return api
