"""The worker that a broker feeds: Celery's worker in one thread, the evaluations in an event loop in another.

The Celery task is short: it hands the hint over to the event loop and waits for the verdict, and so holds the message for as long as the
evaluation is held. Celery acknowledges late, in its own thread, whose loop kombu wakes for it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject
from celery.worker import WorkController
from celery.worker import state as celery_state
from kombu.common import ignore_errors

from crucible import logs
from crucible.broker.celery_app import make_app
from crucible.broker.connection import close, connect
from crucible.broker.errors import BrokerError
from crucible.broker.topology import TASK
from crucible.evaluation import EVALUATION_ID_PATTERN
from crucible.worker.consumer import HintConsumer, Link
from crucible.worker.hints import Hints, Verdict

if TYPE_CHECKING:
    from celery import Celery

    from crucible.broker.urls import BrokerUrl
    from crucible.clients import StorageClient
    from crucible.limits import SizeClass
    from crucible.settings import BrokerSettings
    from crucible.worker.holding import Holding

log = logs.get_logger("worker.broker")

# Beside one thread per message of this connection, those of the last one, which are about to be let go of.
_THREADS_PER_SLOT = 2
_SPARE_THREADS = 8
_GUARD_S = 0.5


class CeleryWorker:
    """Consumes hints from one broker until it is drained. One at a time in a process: Celery keeps state of its own per process.

    Args:
        url: the broker.
        settings: how to speak to it.
        storage: where to claim.
        holding: slots, and what is done with a claim.
    """

    def __init__(self, url: BrokerUrl, settings: BrokerSettings, storage: StorageClient, holding: Holding) -> None:
        self._loop = asyncio.get_running_loop()
        self._url = url
        self._settings = settings
        self._holding = holding
        self._hints = Hints(storage, holding)
        self._link = Link(url, settings, holding.slots, self._lost_connection)
        self._app = make_app(url, settings)
        self._threads = _THREADS_PER_SLOT * sum(slots.size for slots in holding.slots.values()) + _SPARE_THREADS
        self._controller: Any = None
        self._thread: threading.Thread | None = None
        self._guarding: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()

    def problem(self) -> str | None:
        """Return why nothing is consumed now, or None."""
        return self._link.problem()

    async def start(self) -> None:
        """Begin to consume.

        Raises:
            BrokerError: the broker cannot be used until a person changes something (credentials, virtual host, TLS, version). One that
                does not answer yet is waited for.
        """
        try:
            close(await asyncio.to_thread(connect, self._url, self._settings))
        except BrokerError as error:
            if not error.passing:
                raise
            log.warning("the broker does not answer yet; trying on", error=str(error))
        _register(self._app, self._follow)
        self._holding.start()
        self._guarding = asyncio.create_task(self._guard(), name="broker-guard")
        self._thread = threading.Thread(target=self._run, name="celery", daemon=True)
        self._thread.start()

    async def drain(self) -> None:
        """Take no further message; let what runs finish for a while, give the rest back, and settle every message."""
        if self._thread is None:
            return
        self._link.stopping.set()
        self._in_celery(self._cancel)
        await self._hints.drain()
        # Read by Celery's loop at each turn. It lets its threads end, sends what they acknowledged, and closes the connection.
        celery_state.should_stop = 0
        self._link.stopped.set()
        self._in_celery(lambda: None)
        await self.ended.wait()
        if self._guarding:
            self._guarding.cancel()
        self._thread = None

    def _run(self) -> None:
        """Celery's thread."""
        self._app.set_default()
        try:
            self._controller = WorkController(
                app=self._app,
                hostname=self._holding.instance,
                pool_cls="threads",
                concurrency=self._threads,
                consumer_cls=HintConsumer.bound_to(self._link),
                loglevel="WARNING",
            )
            self._controller.start()
        except Exception:
            log.exception("the consumer failed")
        # Celery's own, of the process: the next worker is not to begin with the end of this one.
        celery_state.should_stop = None
        self._link.down("the consumer has ended")
        self._loop.call_soon_threadsafe(self.ended.set)

    def _in_celery(self, work: Any) -> None:
        """Have Celery's loop do something soon."""
        hub = self._controller and self._controller.hub
        if hub:
            hub.call_soon(work)

    def _cancel(self) -> None:
        """Stop consuming; the connection stays, for what is still to be acknowledged. In Celery's thread."""
        consumer = self._controller.consumer
        if consumer.task_consumer:
            # A connection that is gone hands out nothing either.
            ignore_errors(consumer, consumer.task_consumer.cancel)

    def _lost_connection(self) -> None:
        self._loop.call_soon_threadsafe(self._hints.lost_connection)

    def _follow(self, evaluation_id: str, size_class: SizeClass) -> Verdict:
        """Hand a hint over to the event loop, and wait. In one of Celery's pool threads."""
        return asyncio.run_coroutine_threadsafe(self._hints.follow(evaluation_id, size_class), self._loop).result()

    async def _guard(self) -> None:
        while True:
            await asyncio.sleep(_GUARD_S)
            self._link.guard()


def _register(app: Celery, follow: Any) -> None:
    """Give the application its one task."""

    @app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator] # Celery has no types
    def evaluate(task: Any, evaluation_id: str) -> None:
        if not re.fullmatch(EVALUATION_ID_PATTERN, evaluation_id):
            raise Reject("not the id of an evaluation", requeue=False)
        verdict: Verdict = follow(evaluation_id, task.request.size_class)
        if verdict in (Verdict.RETURNED, Verdict.GIVEN_UP):
            raise Reject(str(verdict), requeue=verdict is Verdict.RETURNED)
