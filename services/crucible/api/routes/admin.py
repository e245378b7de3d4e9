"""What only an admin may do: dead letters, keys, and the upkeep of storage. Every change is written to the audit trail."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request
from starlette.responses import Response

from crucible.api import views
from crucible.api.access import Admin, audit
from crucible.api.answers import answer, only_post
from crucible.api.body import read_model
from crucible.api.core import Api, api_of
from crucible.api.parameters import Cursor, KeyPath, LetterPath, PageSize, next_page
from crucible.api.schema import GUARDED, READS_BODY, body, errors, ok
from crucible.api.submit import new_id, view
from crucible.auth import make_key
from crucible.contracts import (
    BrokerMove,
    BrokerReport,
    CleanupRequest,
    CleanupResult,
    MigrateRequest,
    MigrateResult,
    NewApiKey,
    StorageUsage,
)
from crucible.problems import ProblemError
from crucible.resilience import CallFailedError
from crucible.service import problem_of

router = APIRouter(default_response_class=Response)

_ADMIN_ERRORS = (*GUARDED, "forbidden")
_NOTHING = {"description": "Done"}


# --- dead letters -----------------------------------------------------------------------------------------------------------


@router.get(
    "/v1/dead-letters",
    tags=["dead letters"],
    summary="List dead letters",
    responses={
        200: ok(views.DeadLetterListView, "A page, newest first"),
        **errors(*_ADMIN_ERRORS, "invalid-request"),
    },
)
async def list_dead_letters(request: Request, who: Admin, limit: PageSize = 50, cursor: Cursor = None) -> Response:  # noqa: ARG001
    """List evaluations that the platform could not run within its attempts, for reasons of its own."""
    page = await api_of(request).storage.dead_letters(limit=limit, cursor=cursor)
    return answer(
        views.DeadLetterListView(items=page.items, total=page.total, next=next_page(request, page.next_cursor))
    )


@router.post(
    "/v1/dead-letters/replay",
    tags=["dead letters"],
    summary="Run several dead letters again",
    openapi_extra=body(views.ReplayBody),
    responses={
        200: ok(views.ReplayView, "The outcome of each"),
        **errors(*_ADMIN_ERRORS, *READS_BODY),
    },
)
async def replay_dead_letters(request: Request, who: Admin) -> Response:
    """Queue up to 100 dead letters again, each under a new id. Each has an outcome of its own."""
    api = api_of(request)
    wanted = await read_model(request, views.ReplayBody, api.limits.body_bytes)
    api.refuse_while_draining()
    audit(who, "replay-dead-letters", count=len(wanted.ids))
    items = [await _replay_item(api, letter_id) for letter_id in wanted.ids]
    replayed = sum(item.status == "replayed" for item in items)
    return answer(views.ReplayView(items=items, replayed=replayed, rejected=len(items) - replayed))


async def _replay_item(api: Api, letter_id: int) -> views.ReplayItem:
    try:
        record = await api.storage.replay(letter_id, new_id())
    except CallFailedError as error:
        problem = problem_of(error)
    else:
        return views.ReplayItem(id=letter_id, status="replayed", evaluation=view(record))
    return views.ReplayItem(id=letter_id, status="rejected", problem=views.problem_details(problem.body()))


only_post(router, "/v1/dead-letters/replay")


@router.post(
    "/v1/dead-letters/{letter_id}/replay",
    tags=["dead letters"],
    summary="Run a dead letter again",
    status_code=201,
    responses={
        201: ok(views.EvaluationView, "The new evaluation", headers={"Location": "Path of the evaluation"}),
        **errors(*_ADMIN_ERRORS, "not-found", "conflict", "invalid-request"),
    },
)
async def replay_dead_letter(request: Request, who: Admin, letter_id: LetterPath) -> Response:
    """Queue a dead letter's evaluation again, whole, under a new id. A dead letter is replayed once."""
    api = api_of(request)
    api.refuse_while_draining()
    audit(who, "replay-dead-letter", letter_id=letter_id)
    record = await api.storage.replay(letter_id, new_id())
    return answer(view(record), 201, {"Location": f"/v1/evaluations/{record.id}"})


@router.delete(
    "/v1/dead-letters/{letter_id}",
    tags=["dead letters"],
    summary="Delete a dead letter",
    status_code=204,
    responses={204: _NOTHING, **errors(*_ADMIN_ERRORS, "not-found", "invalid-request")},
)
async def delete_dead_letter(request: Request, who: Admin, letter_id: LetterPath) -> Response:
    """Delete a dead letter. Its evaluation stays readable."""
    audit(who, "delete-dead-letter", letter_id=letter_id)
    await api_of(request).storage.delete_dead_letter(letter_id)
    return Response(status_code=204)


# --- keys -------------------------------------------------------------------------------------------------------------------


@router.post(
    "/v1/keys",
    tags=["keys"],
    summary="Make an API key",
    status_code=201,
    openapi_extra=body(
        views.NewKeyBody, {"for a team": {"owner": "red-team", "role": "submitter", "name": "nightly suite"}}
    ),
    responses={201: ok(views.NewKeyView, "The key, shown only now"), **errors(*_ADMIN_ERRORS, *READS_BODY)},
)
async def create_key(request: Request, who: Admin) -> Response:
    """Make a key. Only its hash is kept: this answer is the one place where the key can be read."""
    api = api_of(request)
    wanted = await read_model(request, views.NewKeyBody, api.limits.body_bytes)
    key, key_id, digest = make_key()
    expires_at = None if wanted.expires_in_days is None else datetime.now(UTC) + timedelta(days=wanted.expires_in_days)
    audit(who, "create-key", target=key_id, owner=wanted.owner, role_given=str(wanted.role))
    details = await api.storage.add_key(
        NewApiKey(
            key_id=key_id,
            owner=wanted.owner,
            role=wanted.role,
            name=wanted.name,
            secret_sha256=digest,
            expires_at=expires_at,
        )
    )
    return answer(views.NewKeyView(key=key, details=details), 201, {"Cache-Control": "no-store"})


@router.get(
    "/v1/keys",
    tags=["keys"],
    summary="List API keys",
    responses={200: ok(views.KeyListView, "All keys, oldest first"), **errors(*_ADMIN_ERRORS)},
)
async def list_keys(request: Request, who: Admin) -> Response:  # noqa: ARG001
    """List all keys, revoked and expired ones too, without their secrets."""
    keys = await api_of(request).storage.keys()
    return answer(views.KeyListView(items=sorted(keys, key=lambda key: (key.created_at, key.key_id))))


@router.delete(
    "/v1/keys/{key_id}",
    tags=["keys"],
    summary="Revoke an API key",
    status_code=204,
    responses={204: _NOTHING, **errors(*_ADMIN_ERRORS, "not-found", "conflict", "invalid-request")},
)
async def revoke_key(request: Request, who: Admin, key_id: KeyPath) -> Response:
    """Revoke a key for good. Here it stops at once, on other servers within the key cache's seconds."""
    if key_id == who.key_id:
        raise ProblemError("conflict", "this is the key that you are using; revoke it with another admin key")
    api = api_of(request)
    audit(who, "revoke-key", target=key_id)
    await api.storage.revoke_key(key_id)
    api.keys.forget(key_id)
    return Response(status_code=204)


# --- storage ----------------------------------------------------------------------------------------------------------------


@router.get(
    "/v1/admin/storage/usage",
    tags=["storage"],
    summary="Report where the bytes are",
    responses={200: ok(StorageUsage, "Per backend and owner"), **errors(*_ADMIN_ERRORS)},
)
async def get_storage_usage(request: Request, who: Admin) -> Response:  # noqa: ARG001
    """Report what the database and each object backend hold, and what each owner has stored."""
    return answer(await api_of(request).storage.usage())


@router.post(
    "/v1/admin/storage/cleanup",
    tags=["storage"],
    summary="Delete old evaluations",
    openapi_extra=body(views.CleanupBody, {"look first": {"older_than_days": 30, "dry_run": True}}),
    responses={200: ok(CleanupResult, "What was, or would be, deleted"), **errors(*_ADMIN_ERRORS, *READS_BODY)},
)
async def clean_up_storage(request: Request, who: Admin) -> Response:
    """Delete evaluations that ended long ago, with their output; or with `dry_run` only say how many. Repeat while some remain."""
    api = api_of(request)
    wanted = await read_model(request, views.CleanupBody, api.limits.body_bytes)
    if not wanted.dry_run:
        audit(who, "clean-up-storage", older_than_days=wanted.older_than_days, limit=wanted.limit)
    return answer(await api.storage.cleanup(CleanupRequest(**wanted.model_dump())))


@router.post(
    "/v1/admin/storage/migrate",
    tags=["storage"],
    summary="Move objects to another backend",
    openapi_extra=body(views.MigrateBody),
    responses={
        200: ok(MigrateResult, "What this step did"),
        **errors(*_ADMIN_ERRORS, *READS_BODY, "not-found", "conflict"),
    },
)
async def migrate_storage(request: Request, who: Admin) -> Response:
    """Move some objects to another backend, each verified by its digest. Repeat until none remains; stopping in between is safe."""
    api = api_of(request)
    wanted = await read_model(request, views.MigrateBody, api.limits.body_bytes)
    audit(who, "migrate-storage", target=wanted.target, limit=wanted.limit)
    return answer(await api.storage.migrate(MigrateRequest(**wanted.model_dump())))


# --- broker -----------------------------------------------------------------------------------------------------------------


@router.get(
    "/v1/broker",
    tags=["broker"],
    summary="Report where the brokers stand",
    responses={200: ok(BrokerReport, "Each broker, and the move between two of them"), **errors(*_ADMIN_ERRORS)},
)
async def get_broker(request: Request, who: Admin) -> Response:  # noqa: ARG001
    """Report what each broker holds, and how far the move from one to another has come. Asking takes up to 5 s for one that is down."""
    return answer(await api_of(request).storage.broker())


@router.post(
    "/v1/broker/migration",
    tags=["broker"],
    summary="Take a step from one broker to another",
    openapi_extra=body(views.BrokerMoveBody, {"a tenth of the work": {"action": "start", "share": 10}}),
    responses={
        200: ok(BrokerReport, "Where the brokers stand now"),
        **errors(*_ADMIN_ERRORS, *READS_BODY, "conflict"),
    },
)
async def move_broker(request: Request, who: Admin) -> Response:
    """Send a share of the work to the new broker (`start`), all of it (`drain`), leave the old one (`finish`), or go back (`rollback`).

    Each step takes effect at once, may be repeated, and can be undone by `rollback`; the order is start, drain, finish.
    """
    api = api_of(request)
    wanted = await read_model(request, views.BrokerMoveBody, api.limits.body_bytes)
    audit(who, "move-broker", action_taken=str(wanted.action), share=wanted.share)
    return answer(await api.storage.move_broker(BrokerMove(action=wanted.action, share=wanted.share, actor=who.owner)))
