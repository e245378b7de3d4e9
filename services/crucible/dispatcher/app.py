"""The dispatcher over HTTP, for the platform's own services only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import Depends, FastAPI, Path, Query

from crucible import contracts as c
from crucible.evaluation import EvaluationId, Reason, Resources
from crucible.service import make_app, require_internal

if TYPE_CHECKING:
    from crucible.health import Health

_MAX_WAIT_SECONDS = 60.0

PathId = Annotated[EvaluationId, Path()]


class MakesSandboxes(Protocol):
    """What serves these calls: the dispatcher of one node, or the one of a cluster."""

    def problem(self) -> str | None:
        """Return why sandboxes cannot be made now, or None."""

    async def create(self, evaluation_id: str, request: c.SandboxRequest) -> c.SandboxStatus:
        """Make the sandbox of an attempt, or find the one that was made."""

    async def wait(self, evaluation_id: str, *, attempt: int, wait_seconds: float) -> c.SandboxStatus:
        """Return the sandbox once it has finished, or as it is after `wait_seconds`."""

    async def stop(self, evaluation_id: str, reason: Reason, *, attempt: int | None = None) -> c.SandboxStatus:
        """End the sandbox; with an `attempt` no later one is touched."""

    def capacity(self) -> c.CapacityReport:
        """Return what is free."""

    def check(self, wanted: Resources) -> c.CapacityAnswer:
        """Say whether something would fit."""


def make_dispatcher_app(dispatcher: MakesSandboxes, token: str, health: Health) -> FastAPI:
    """Return the service. Starting and closing the dispatcher is the caller's.

    Args:
        dispatcher: what does the work.
        token: the platform's internal token.
        health: gets the dispatcher's own check.
    """
    health.add("sandboxes", dispatcher.problem)
    app = make_app(
        "dispatcher", health, title="Crucible dispatcher", description="Makes sandboxes; internal.", docs_url=None
    )
    guarded = [Depends(require_internal(token))]

    @app.put("/internal/sandboxes/{evaluation_id}", dependencies=guarded)
    async def create(evaluation_id: PathId, request: c.SandboxRequest) -> c.SandboxStatus:
        return await dispatcher.create(evaluation_id, request)

    @app.get("/internal/sandboxes/{evaluation_id}", dependencies=guarded)
    async def wait(
        evaluation_id: PathId,
        attempt: Annotated[int, Query(ge=0)],
        wait_seconds: Annotated[float, Query(ge=0, le=_MAX_WAIT_SECONDS)] = 0.0,
    ) -> c.SandboxStatus:
        return await dispatcher.wait(evaluation_id, attempt=attempt, wait_seconds=wait_seconds)

    @app.delete("/internal/sandboxes/{evaluation_id}", dependencies=guarded)
    async def stop(
        evaluation_id: PathId, reason: Reason, attempt: Annotated[int | None, Query(ge=0)] = None
    ) -> c.SandboxStatus:
        return await dispatcher.stop(evaluation_id, reason, attempt=attempt)

    @app.get("/internal/capacity", dependencies=guarded)
    async def capacity() -> c.CapacityReport:
        return dispatcher.capacity()

    @app.post("/internal/capacity/check", dependencies=guarded)
    async def check(wanted: c.CapacityCheck) -> c.CapacityAnswer:
        return dispatcher.check(wanted.resources)

    return app
