"""The only creator of sandboxes on a node: one per attempt, never two, within what the node has.

It keeps no truth: what it knows of a sandbox is gone with it, and whoever asked for one finds out (404) and settles the attempt in storage.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import psutil

from crucible import contracts as c
from crucible import logs
from crucible.dispatcher.capacity import Ledger
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.dispatcher.supervisor import STOP_REASONS, Supervisor
from crucible.evaluation import Resources
from crucible.problems import ProblemError
from crucible.tracing import Tracing

if TYPE_CHECKING:
    from crucible.clients import StorageClient
    from crucible.dispatcher.runtimes import Runtime
    from crucible.evaluation import Reason
    from crucible.limits import Limits
    from crucible.settings import DispatcherSettings

log = logs.get_logger("dispatcher")

# Ended sandboxes that are still known, so that `wait` and a repeated `create` find them.
_KEPT_ENDED = 10_000
_KEPT_SECONDS = 900.0
# After a stop, how long its caller waits for the end to be recorded too, before it is told "not yet".
_RECORD_SECONDS = 5.0
# On shutdown, how long ends already known may take to be recorded.
_CLOSE_SECONDS = 5.0
_MEMORY_SHARE = 0.75


def make_runtime(settings: DispatcherSettings, limits: Limits) -> Runtime:
    """Return the runtime that the settings name.

    Raises:
        RuntimeUnavailableError: it is not for this operating system, or not for one machine.
    """
    if settings.runtime == "kubernetes":
        raise RuntimeUnavailableError(
            "sandboxes in a cluster are not made by the platform on one machine",
            "use `crucible serve dispatcher` there, or unset CRUCIBLE_DISPATCHER__RUNTIME",
        )
    linux = platform.system() == "Linux"
    if settings.runtime == "process" or (settings.runtime == "auto" and not linux):
        from crucible.dispatcher.runtimes.process import ProcessRuntime  # noqa: PLC0415 - each is for one kind of system

        return ProcessRuntime(settings, limits)
    if not linux:
        raise RuntimeUnavailableError(
            "bubblewrap is for Linux", "unset CRUCIBLE_DISPATCHER__RUNTIME, or set it to `process` (no isolation!)"
        )
    from crucible.dispatcher.runtimes.bubblewrap import BubblewrapRuntime  # noqa: PLC0415 - see above

    return BubblewrapRuntime(settings, limits)


def node_resources(settings: DispatcherSettings) -> Resources:
    """Return what this node has for sandboxes."""
    return Resources(
        cpu_millis=settings.cpu_millis or 1000 * (os.cpu_count() or 1),
        memory_bytes=settings.memory_bytes or int(psutil.virtual_memory().total * _MEMORY_SHARE),
    )


class Dispatcher:
    """Makes sandboxes and sees each through to its recorded end.

    Args:
        settings: runtime, capacity, grace.
        limits: what a sandbox may use.
        storage: where the story of each attempt goes.
        instance: name of this dispatcher in events; unique per start.
        tracing: continues each submission's trace.
    """

    def __init__(
        self,
        settings: DispatcherSettings,
        limits: Limits,
        storage: StorageClient,
        *,
        instance: str,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._actor = f"dispatcher/{instance}"
        self._tracing = tracing
        self._runtime = make_runtime(settings, limits)
        self._ledger = Ledger(platform.node() or "local", self._runtime.name, node_resources(settings))
        self._sandboxes: dict[str, Supervisor] = {}
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def runtime(self) -> str:
        """Name of the way in which sandboxes are made."""
        return self._runtime.name

    @property
    def limits_by(self) -> str:
        """What holds the sandboxes' limits, in words; known once started."""
        return self._runtime.limits_by

    def problem(self) -> str | None:
        """Return why sandboxes cannot be made now, or None."""
        return "shutting down" if self._closing else None

    async def start(self) -> None:
        """Get ready, and prove with a first sandbox that more can be made.

        Raises:
            RuntimeUnavailableError: they cannot; it says why and what to do.
        """
        await self._runtime.start()

    async def aclose(self) -> None:
        """End every sandbox. Ends that are known by now are recorded if storage answers; other attempts are void."""
        self._closing = True
        for supervisor in self._sandboxes.values():
            if not supervisor.finished:
                supervisor.abandon()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._runtime.aclose()

    # -- sandboxes

    async def create(self, evaluation_id: str, request: c.SandboxRequest) -> c.SandboxStatus:
        """Make the sandbox of an attempt, or find the one that was made.

        Raises:
            ProblemError: `no-capacity`, `never-fits`, `stale-attempt` (a later attempt is here), `unavailable` (shutting down).
        """
        known = self._sandboxes.get(evaluation_id)
        if known and known.attempt == request.attempt:
            return known.status()
        if known and known.attempt > request.attempt:
            raise ProblemError("stale-attempt", f"attempt {known.attempt} is here already")
        if self._closing:
            raise ProblemError("unavailable", "this dispatcher is shutting down", retry_after=1)
        if known:
            # Storage has given the evaluation to another attempt, so this one is void.
            known.abandon()
            await known.wait_gone()
            if self._sandboxes.get(evaluation_id) is not known:
                return await self.create(evaluation_id, request)
        self._reserve((evaluation_id, request.attempt), request.spec.resources)
        return self._begin(evaluation_id, request).status()

    def _reserve(self, holder: tuple[str, int], wanted: Resources) -> None:
        answer = self._ledger.reserve(holder, wanted)
        match answer.fit:
            case c.Fit.NEVER:
                raise ProblemError("never-fits", answer.reason or "", largest=answer.largest.model_dump())
            case c.Fit.LATER:
                raise ProblemError("no-capacity", answer.reason or "")

    def _begin(self, evaluation_id: str, request: c.SandboxRequest) -> Supervisor:
        holder = (evaluation_id, request.attempt)
        supervisor = Supervisor(
            evaluation_id,
            request,
            self._runtime,
            self._storage,
            actor=self._actor,
            grace_seconds=self._settings.deadline_grace_seconds,
            on_gone=lambda: self._ledger.release(holder),
        )
        self._sandboxes[evaluation_id] = supervisor
        self._ended.pop(evaluation_id, None)
        task = asyncio.create_task(self._see_through(supervisor, request), name=f"sandbox-{evaluation_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return supervisor

    async def _see_through(self, supervisor: Supervisor, request: c.SandboxRequest) -> None:
        try:
            if self._tracing:
                with self._tracing.span(
                    "sandbox.run", traceparent=request.traceparent, evaluation_id=supervisor.evaluation_id
                ):
                    await supervisor.run()
            else:
                await supervisor.run()
        except Exception:
            log.exception("a sandbox's supervision failed", evaluation_id=supervisor.evaluation_id)
        finally:
            if self._sandboxes.get(supervisor.evaluation_id) is supervisor:
                self._ended[supervisor.evaluation_id] = time.monotonic()
            self._forget_old()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - _KEPT_SECONDS
        while self._ended:
            evaluation_id, ended = next(iter(self._ended.items()))
            if ended > oldest and len(self._ended) <= _KEPT_ENDED:
                return
            del self._ended[evaluation_id], self._sandboxes[evaluation_id]

    async def wait(self, evaluation_id: str, *, attempt: int, wait_seconds: float) -> c.SandboxStatus:
        """Return the sandbox once it has finished, or as it is after `wait_seconds`.

        Raises:
            ProblemError: `not-found`.
        """
        supervisor = self._sandboxes.get(evaluation_id)
        if supervisor is None or supervisor.attempt != attempt:
            raise ProblemError("not-found", "there is no sandbox of this attempt here")
        await supervisor.wait_finished(wait_seconds)
        return supervisor.status()

    async def stop(self, evaluation_id: str, reason: Reason, *, attempt: int | None = None) -> c.SandboxStatus:
        """End the sandbox; returns once no process of it is left. With an `attempt` no later one is touched.

        Raises:
            ProblemError: `not-found`, or `invalid-request` for a reason that no one can ask for.
        """
        if reason not in STOP_REASONS:
            raise ProblemError(
                "invalid-request", f"a sandbox is not stopped for {reason}; {', '.join(sorted(STOP_REASONS))}"
            )
        supervisor = self._sandboxes.get(evaluation_id)
        if supervisor is None or (attempt is not None and supervisor.attempt > attempt):
            raise ProblemError("not-found", "there is no sandbox of this evaluation here")
        await supervisor.stop(reason)
        await supervisor.wait_finished(_RECORD_SECONDS)
        return supervisor.status()

    # -- capacity

    def capacity(self) -> c.CapacityReport:
        """Return what is free."""
        return c.CapacityReport(nodes=[self._ledger.report()])

    def check(self, wanted: Resources) -> c.CapacityAnswer:
        """Say whether something would fit."""
        return self._ledger.check(wanted)
