"""Storage on HTTP, for the platform's own services: `crucible.clients.StorageClient` is the other end."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response

from crucible import contracts as c
from crucible.evaluation import EvaluationId, Reason, State
from crucible.frames import encode_all
from crucible.problems import ProblemError
from crucible.service import make_app, require_internal
from crucible.storage.output import Stream
from crucible.storage.reading import PAGE_MOST

if TYPE_CHECKING:
    from pydantic import BaseModel

    from crucible.health import Health
    from crucible.storage.storage import Storage

# What a dispatcher sends at once is far below; this bounds what a broken one could make this process hold.
_BATCH_BYTES = 16 * 1024 * 1024

LetterId = Annotated[int, Path(ge=1, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=PAGE_MOST)]
Offset = Annotated[int, Query(ge=0, lt=2**62)]
Count = Annotated[int, Query(ge=0, lt=2**31)]


def _answer(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def make_storage_app(storage: Storage, token: str, health: Health) -> FastAPI:
    """Return the storage service's app.

    Args:
        storage: started by the caller, before the first request.
        token: the platform's internal token.
        health: gets storage's own checks.
    """
    storage.watch(health)
    app = make_app(
        "storage",
        health,
        title="Crucible storage",
        description="The owner of PostgreSQL and the object store. For the platform's own services only.",
        openapi_url=None,
    )
    router = APIRouter(prefix="/internal", dependencies=[Depends(require_internal(token))])
    _add_evaluations(router, storage)
    _add_attempts(router, storage)
    _add_output(router, storage)
    _add_reports(router, storage)
    _add_keys(router, storage)
    _add_upkeep(router, storage)
    _add_broker(router, storage)
    app.include_router(router)
    return app


def _add_evaluations(router: APIRouter, storage: Storage) -> None:
    @router.post("/evaluations")
    async def create(body: c.NewEvaluations) -> Response:
        return _answer(await storage.submissions.create(body))

    @router.get("/evaluations")
    async def page(
        *,
        owner: str | None = None,
        state: Annotated[list[State] | None, Query()] = None,
        reason: Annotated[list[Reason] | None, Query()] = None,
        priority: int | None = None,
        label: Annotated[list[str] | None, Query()] = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: Limit = 50,
        cursor: str | None = None,
    ) -> Response:
        return _answer(
            await storage.reading.page(
                owner=owner,
                state=state or (),
                reason=reason or (),
                priority=priority,
                label=label or (),
                since=since,
                until=until,
                limit=limit,
                cursor=cursor,
            )
        )

    @router.get("/evaluations/{evaluation_id}")
    async def get(evaluation_id: str) -> Response:
        return _answer(await storage.reading.get(evaluation_id))

    @router.get("/evaluations/{evaluation_id}/payload")
    async def payload(evaluation_id: str) -> Response:
        return _answer(await storage.reading.payload(evaluation_id))

    @router.get("/evaluations/{evaluation_id}/events")
    async def events(evaluation_id: str, after: Count = 0) -> Response:
        return _answer(await storage.reading.events(evaluation_id, after))

    @router.get("/evaluations/{evaluation_id}/position")
    async def position(evaluation_id: str) -> Response:
        return _answer(await storage.queue.position(evaluation_id))

    @router.get("/events")
    async def event_stream(owner: str | None = None, cursor: str | None = None, limit: Limit = 500) -> Response:
        return _answer(await storage.reading.event_stream(owner=owner, cursor=cursor, limit=limit))


def _add_attempts(router: APIRouter, storage: Storage) -> None:
    @router.post("/claims")
    async def claim(body: c.ClaimRequest) -> Response:
        return _answer(await storage.queue.claim(body))

    @router.post("/evaluations/{evaluation_id}/claim")
    async def claim_one(evaluation_id: str, body: c.ClaimOne) -> Response:
        return _answer(await storage.queue.claim_one(evaluation_id, body))

    @router.get("/held")
    async def held(after: str = "", limit: Limit = PAGE_MOST) -> Response:
        return _answer(await storage.reading.held(after=after, limit=limit))

    @router.post("/leases")
    async def renew(body: c.LeaseRenewal) -> Response:
        return _answer(await storage.queue.renew(body))

    @router.post("/leases/sustain")
    async def sustain(body: c.Sustaining) -> Response:
        return _answer(await storage.queue.sustain(body))

    @router.post("/evaluations/{evaluation_id}/cancel")
    async def cancel(evaluation_id: str, body: c.CancelRequest) -> Response:
        return _answer(await storage.attempts.cancel(evaluation_id, body))

    @router.post("/evaluations/{evaluation_id}/release")
    async def release(evaluation_id: str, body: c.Release) -> Response:
        return _answer(await storage.attempts.release(evaluation_id, body))

    @router.post("/evaluations/{evaluation_id}/running")
    async def running(evaluation_id: str, body: c.Running) -> Response:
        return _answer(await storage.attempts.running(evaluation_id, body))

    @router.post("/evaluations/{evaluation_id}/finish")
    async def finish(evaluation_id: str, body: c.Finish) -> Response:
        return _answer(await storage.attempts.finish(evaluation_id, body))


def _add_output(router: APIRouter, storage: Storage) -> None:
    @router.post("/evaluations/{evaluation_id}/output")
    async def append(evaluation_id: str, request: Request, attempt: Count, frame: Offset) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > _BATCH_BYTES:
                raise ProblemError("body-too-large", "a batch of output is too large", limit=f"{_BATCH_BYTES} bytes")
        present = await storage.outputs.append(evaluation_id, attempt=attempt, frame=frame, body=bytes(body))
        return _answer(c.OutputPosition(frames=present))

    @router.get("/evaluations/{evaluation_id}/output/{stream}")
    async def read(evaluation_id: str, stream: Stream, start: Offset = 0, length: Offset | None = None) -> Response:
        data, info = await storage.outputs.read(evaluation_id, stream, start, length)
        return Response(data, headers={"X-Output-Size": str(info.size)}, media_type="application/octet-stream")

    @router.get("/evaluations/{evaluation_id}/frames")
    async def frames(evaluation_id: str, after: Offset = 0, limit: Limit = PAGE_MOST) -> Response:
        found, following = await storage.outputs.frames(evaluation_id, after=after, limit=limit)
        return Response(
            encode_all(found), headers={"X-Next-Frame": str(following)}, media_type="application/octet-stream"
        )


def _add_reports(router: APIRouter, storage: Storage) -> None:
    @router.get("/queue")
    async def queue() -> Response:
        return _answer(await storage.queue.report())

    @router.get("/statistics")
    async def statistics(owner: str | None = None, since: datetime | None = None) -> Response:
        return _answer(await storage.reading.statistics(owner=owner, since=since))

    @router.get("/dead-letters")
    async def dead_letters(limit: Limit = 50, cursor: str | None = None) -> Response:
        return _answer(await storage.dead_letters.page(limit=limit, cursor=cursor))

    @router.post("/dead-letters/{letter_id}/replay")
    async def replay(letter_id: LetterId, new_id: EvaluationId) -> Response:
        return _answer(await storage.dead_letters.replay(letter_id, new_id))

    @router.delete("/dead-letters/{letter_id}", status_code=204)
    async def delete_dead_letter(letter_id: LetterId) -> Response:
        await storage.dead_letters.delete(letter_id)
        return Response(status_code=204)


def _add_keys(router: APIRouter, storage: Storage) -> None:
    @router.post("/keys")
    async def add_key(body: c.NewApiKey) -> Response:
        return _answer(await storage.keys.add(body))

    @router.get("/keys")
    async def keys() -> Response:
        found = await storage.keys.list()
        return Response(orjson.dumps([key.model_dump(mode="json") for key in found]), media_type="application/json")

    @router.get("/keys/{key_id}")
    async def find_key(key_id: str, secret_sha256: str) -> Response:
        return _answer(await storage.keys.find(key_id, secret_sha256))

    @router.delete("/keys/{key_id}", status_code=204)
    async def revoke_key(key_id: str) -> Response:
        await storage.keys.revoke(key_id)
        return Response(status_code=204)


def _add_upkeep(router: APIRouter, storage: Storage) -> None:
    @router.get("/usage")
    async def usage() -> Response:
        return _answer(await storage.upkeep.usage())

    @router.post("/migrate")
    async def migrate(body: c.MigrateRequest) -> Response:
        return _answer(await storage.objects.migrate(body))

    @router.post("/cleanup")
    async def cleanup(body: c.CleanupRequest) -> Response:
        return _answer(await storage.upkeep.clean(body))


def _add_broker(router: APIRouter, storage: Storage) -> None:
    @router.get("/broker")
    async def report() -> Response:
        return _answer(await storage.route.report())

    @router.post("/broker/migration")
    async def move(body: c.BrokerMove) -> Response:
        return _answer(await storage.route.move(body))
