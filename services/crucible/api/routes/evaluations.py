"""Submitting, reading, listing and cancelling evaluations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from crucible import logs
from crucible.api import views
from crucible.api.access import Caller, audit, scope_of
from crucible.api.answers import answer, only_post
from crucible.api.core import api_of
from crucible.api.outputs import UNTRUSTED
from crucible.api.parameters import (
    Cursor,
    IdempotencyKey,
    IdPath,
    OwnerQuery,
    PageSize,
    SinceQuery,
    UntilQuery,
    next_page,
)
from crucible.api.schema import GUARDED, READS_BODY, body, errors, ok
from crucible.api.submit import submit, submit_batch, view
from crucible.contracts import CancelRequest
from crucible.evaluation import EvaluationRequest, Reason, State
from crucible.problems import ProblemError
from crucible.resilience import CallFailedError

log = logs.get_logger("evaluations")
router = APIRouter(tags=["evaluations"], default_response_class=Response)

_WAIT_MAX_SECONDS = 60
_LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,316}=[A-Za-z0-9._-]{0,63}$"
_HELLO = {"code": "print('hello')"}
_FULL = {
    "code": "import sys\nprint(sys.stdin.read().upper())",
    "stdin": "some input",
    "priority": 7,
    "timeout_seconds": 30,
    "memory_limit": "512Mi",
    "cpu_limit": "500m",
    "labels": {"suite": "nightly"},
}
_SUBMISSION_ERRORS = (*GUARDED, *READS_BODY, "rate-limited", "quota-exceeded")
_LOCATION = {"Location": "Path of the evaluation"}


@router.post(
    "/v1/evaluations",
    summary="Submit an evaluation",
    status_code=201,
    openapi_extra=body(EvaluationRequest, {"smallest": _HELLO, "with everything": _FULL}),
    responses={
        200: ok(views.EvaluationView, "The evaluation that this Idempotency-Key made before", headers=_LOCATION),
        201: ok(views.EvaluationView, "Accepted: stored, queued and never lost", headers=_LOCATION),
        **errors(*_SUBMISSION_ERRORS, "idempotency-key-reused", "never-fits"),
    },
)
async def submit_evaluation(request: Request, who: Caller, idempotency_key: IdempotencyKey = None) -> Response:
    """Check a request and queue it. What the answer holds is stored: a client that got it may go away."""
    accepted = await submit(api_of(request), who, request, idempotency_key)
    location = {"Location": f"/v1/evaluations/{accepted.record.id}"}
    return answer(view(accepted.record), 201 if accepted.created else 200, location)


@router.post(
    "/v1/evaluations/batch",
    summary="Submit up to 100 evaluations",
    openapi_extra=body(views.BatchBody, {"two": {"evaluations": [_HELLO, _FULL]}}),
    responses={
        200: ok(views.BatchView, "Every item has an evaluation now, new or existing"),
        207: ok(views.BatchView, "Some items were refused; each says why"),
        **errors(*_SUBMISSION_ERRORS, "batch-rejected"),
    },
)
async def submit_batch_of_evaluations(
    request: Request, who: Caller, idempotency_key: IdempotencyKey = None
) -> Response:
    """Check every item first, then store all that passed in one transaction; each item has an outcome of its own.

    200: all were accepted. 207: some were. 422 (429 if only the quota stood in the way): none was; the problem lists `items`
    as the other answers do. With an Idempotency-Key the same batch may be sent again: what was stored is found, not repeated.
    """
    items = await submit_batch(api_of(request), who, request, idempotency_key)
    rejected = sum(item.status is views.BatchStatus.REJECTED for item in items)
    result = views.BatchView(items=items, accepted=len(items) - rejected, rejected=rejected)
    if rejected < len(items):
        return answer(result, 207 if rejected else 200)
    over_quota = all(item.problem is not None and item.problem.status == 429 for item in items)
    raise ProblemError(
        "quota-exceeded" if over_quota else "batch-rejected",
        f"all {len(items)} items were refused; `items` says why for each",
        retry_after=5 if over_quota else None,
        **result.model_dump(mode="json", exclude_none=True),
    )


only_post(router, "/v1/evaluations/batch")


@router.get(
    "/v1/evaluations",
    summary="List evaluations",
    responses={
        200: ok(views.EvaluationListView, "A page, newest first"),
        **errors(*GUARDED, "forbidden", "invalid-request"),
    },
)
async def list_evaluations(
    request: Request,
    *,
    who: Caller,
    state: Annotated[list[State] | None, Query(description="Only in one of these states")] = None,
    reason: Annotated[list[Reason] | None, Query(description="Only ended for one of these reasons")] = None,
    priority: Annotated[int | None, Query(ge=0, le=10, description="Only of this priority")] = None,
    label: Annotated[
        list[Annotated[str, Query(pattern=_LABEL_PATTERN)]] | None,
        Query(max_length=16, description="Only with this label, `key=value`; several: with all of them"),
    ] = None,
    since: SinceQuery = None,
    until: UntilQuery = None,
    owner: OwnerQuery = None,
    limit: PageSize = 50,
    cursor: Cursor = None,
) -> Response:
    """List one's own evaluations (an operator: everyone's). Filters apply before pages are cut; follow `next` for the rest."""
    page = await api_of(request).storage.page(
        owner=scope_of(who, owner),
        state=state,
        reason=reason,
        priority=priority,
        label=label,
        since=since,
        until=until,
        limit=limit,
        cursor=cursor,
    )
    items = [view(record) for record in page.items]
    return answer(views.EvaluationListView(items=items, next=next_page(request, page.next_cursor)))


@router.get(
    "/v1/evaluations/{evaluation_id}",
    summary="Read an evaluation",
    responses={
        200: ok(views.EvaluationView, "As it is now"),
        **errors(*GUARDED, "not-found", "invalid-request"),
    },
)
async def get_evaluation(
    request: Request,
    *,
    who: Caller,
    evaluation_id: IdPath,
    wait: Annotated[
        float,
        Query(
            ge=0,
            le=_WAIT_MAX_SECONDS,
            allow_inf_nan=False,
            description="Seconds to hold the answer back for the evaluation to end",
        ),
    ] = 0,
) -> Response:
    """Read where an evaluation is, why it waits, and how it ended. With `wait`, answer once it has ended or the time is over."""
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    if wait > 0:
        record = await api.wait_ended(record, wait)
    return answer(views.EvaluationView.of(record, await api.waiting(record)))


@router.get(
    "/v1/evaluations/{evaluation_id}/code",
    summary="Read what an evaluation runs",
    responses={
        200: ok(views.CodeView, "Source text and standard input"),
        **errors(*GUARDED, "not-found", "invalid-request"),
    },
)
async def get_code(request: Request, who: Caller, evaluation_id: IdPath) -> Response:
    """Read the source text and standard input exactly as they were submitted."""
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    if record.owner != who.owner:
        audit(who, "read-code", owner=record.owner)
    payload = await api.storage.payload(evaluation_id)
    shown = views.CodeView(code=payload.code, stdin=payload.stdin, code_sha256=record.code_sha256)
    return answer(shown, headers=dict(UNTRUSTED))


@router.post(
    "/v1/evaluations/{evaluation_id}/cancel",
    summary="Cancel an evaluation",
    responses={
        200: ok(views.EvaluationView, "It has ended: by this, or by itself before"),
        202: ok(views.EvaluationView, "It will end: the request is recorded and its sandbox is being ended"),
        **errors(*GUARDED, "not-found", "invalid-request"),
    },
)
async def cancel_evaluation(request: Request, who: Caller, evaluation_id: IdPath) -> Response:
    """End an evaluation, whatever its state. Harmless when repeated, and when it has ended already: the outcome stands."""
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    own = record.owner == who.owner
    reason = Reason.CANCELLED_BY_USER if own else Reason.CANCELLED_BY_OPERATOR
    if not own:
        audit(who, "cancel", owner=record.owner)
    wish = CancelRequest(actor=who.owner, reason=reason)
    result = await api.storage.cancel(evaluation_id, wish)
    if result.sandbox:
        try:
            gone = await api.dispatcher.stop(evaluation_id, reason) is None
            # Without a sandbox nobody else will report the end: storage settles it.
            record = (
                (await api.storage.cancel(evaluation_id, wish)).evaluation
                if gone
                else await api.storage.get(evaluation_id)
            )
        except CallFailedError as error:
            # The wish is recorded; the worker that holds it hears of it with its next lease.
            log.warning("a cancel is recorded but not yet carried out", error=str(error))
            record = result.evaluation
    else:
        record = result.evaluation
    shown = views.EvaluationView.of(record, await api.waiting(record))
    return answer(shown, 200 if record.state.terminal else 202)
