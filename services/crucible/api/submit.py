"""Accepting evaluations: from bodies that may be hostile to rows that are stored exactly once.

Everything that can be refused is refused before storage is asked (tier 1): form, limits, and sizes that no node has. What is
accepted is stored in one transaction. Nothing is clipped, guessed or half accepted.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from crucible import metrics
from crucible.api.body import Json, parse_json, read_body, validate
from crucible.api.views import BatchItem, BatchStatus, EvaluationView, problem_details
from crucible.api.waiting import explain, fits_ever
from crucible.contracts import EvaluationRecord, NewEvaluation, NewEvaluations, Stored, StoredStatus
from crucible.evaluation import (
    EvaluationRequest,
    EvaluationSpec,
    RequestRejectedError,
    Violation,
    make_evaluation_id,
    resolve,
)
from crucible.problems import ProblemError, invalid_request
from crucible.quantity import format_cpu, format_memory

if TYPE_CHECKING:
    from starlette.requests import Request

    from crucible.api.core import Api
    from crucible.auth import Principal

_QUOTA_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """A stored evaluation, and whether it is new."""

    record: EvaluationRecord
    created: bool


def new_id() -> str:
    """Return a fresh evaluation id."""
    return make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))


def check_request(api: Api, value: Any, *, suspect: bool) -> tuple[EvaluationSpec, str]:
    """Hold one request against the model, the limits and the largest node.

    Returns:
        What is to be stored, and the hex SHA-256 of the request as its author meant it.

    Raises:
        ProblemError: 400 or 422, with every violation.
    """
    request = validate(EvaluationRequest, value, suspect=suspect)
    try:
        spec = resolve(request, api.limits)
    except RequestRejectedError as error:
        raise invalid_request(error.violations) from error
    _check_fits(api, spec)
    canonical = orjson.dumps(request.model_dump(exclude_none=True), option=orjson.OPT_SORT_KEYS)
    return spec, hashlib.sha256(canonical).hexdigest()


def _check_fits(api: Api, spec: EvaluationSpec) -> None:
    capacity = api.largest_known()
    if capacity is None or fits_ever(spec.resources, capacity):
        return
    asked = f"{format_memory(spec.resources.memory_bytes)} memory with {format_cpu(spec.resources.cpu_millis)} CPU"
    nodes = sorted({(node.total.memory_bytes, node.total.cpu_millis) for node in capacity.nodes}, reverse=True)
    sizes = " or ".join(f"{format_memory(memory)} memory with {format_cpu(cpu)} CPU" for memory, cpu in nodes[:5])
    raise ProblemError(
        "never-fits",
        f"no node is as large as {asked}; at most {sizes}",
        violations=[
            Violation(
                field="memory_limit",
                message="is more than any node has",
                value=asked,
                limit=sizes,
                accepted=f"at most {sizes}",
            )
        ],
    )


def _new(api: Api, who: Principal, checked: tuple[EvaluationSpec, str], key: str | None) -> NewEvaluation:
    spec, digest = checked
    return NewEvaluation(
        id=new_id(),
        owner=who.owner,
        spec=spec,
        idempotency_key=key,
        request_sha256=digest,
        traceparent=api.tracing.traceparent(),
    )


def _outcome(stored: Stored, new: NewEvaluation, api: Api) -> Accepted:
    """Read storage's answer.

    Raises:
        ProblemError: 422 `idempotency-key-reused` or 429 `quota-exceeded`.
    """
    if stored.status is StoredStatus.OVER_QUOTA or stored.evaluation is None:
        most = api.settings.api.max_active_per_owner
        raise ProblemError(
            "quota-exceeded",
            f"{stored.active if stored.active is not None else 'too many'} evaluations are under way; at most {most} may be",
            retry_after=_QUOTA_RETRY_SECONDS,
            limit=most,
        )
    if stored.status is StoredStatus.KEY_CONFLICT:
        raise ProblemError(
            "idempotency-key-reused",
            f"the key belongs to {stored.evaluation.id}, whose request was another",
            evaluation_id=stored.evaluation.id,
        )
    # Our own id means that it is new, also when an answer was lost and storage was asked twice.
    return Accepted(stored.evaluation, created=stored.evaluation.id == new.id)


async def _store(api: Api, items: list[NewEvaluation]) -> list[Stored]:
    answer = await api.storage.create(NewEvaluations(items=items, max_active=api.settings.api.max_active_per_owner))
    return answer.results


def _count(accepted: Accepted) -> None:
    if accepted.created:
        metrics.SUBMITTED.labels(accepted.record.priority).inc()


async def submit(api: Api, who: Principal, request: Request, key: str | None) -> Accepted:
    """Accept one evaluation from a request's body.

    Raises:
        ProblemError: it was refused; nothing was stored.
    """
    try:
        api.refuse_while_draining()
        await api.rate.take(who.owner, 1)
        parsed = parse_json(await read_body(request, api.limits.body_bytes))
        with api.tracing.span("submit", owner=who.owner):
            new = _new(api, who, check_request(api, parsed.value, suspect=parsed.suspect), key)
            with structlog.contextvars.bound_contextvars(evaluation_id=new.id):
                [stored] = await _store(api, [new])
        accepted = _outcome(stored, new, api)
    except ProblemError as error:
        metrics.REJECTED.labels(error.kind.slug).inc()
        raise
    _count(accepted)
    return accepted


def _items_of(parsed: Json, most: int) -> list[Any]:
    value = parsed.value
    if not isinstance(value, dict):
        raise ProblemError("malformed-json", "a JSON object is expected")
    items = value.get("evaluations")
    if not isinstance(items, list) or len(value) != 1:
        message = "a batch is an object with the one member `evaluations`, a list of requests"
        raise invalid_request([Violation(field="evaluations", message=message)])
    if not 1 <= len(items) <= most:
        raise invalid_request(
            [
                Violation(
                    field="evaluations",
                    message=f"has {len(items)} entries",
                    value=str(len(items)),
                    limit=str(most if items else 1),
                    accepted=f"1 to {most}",
                )
            ]
        )
    return items


def _rejected(index: int, error: ProblemError) -> BatchItem:
    metrics.REJECTED.labels(error.kind.slug).inc()
    return BatchItem(index=index, status=BatchStatus.REJECTED, problem=problem_details(error.body()))


async def submit_batch(api: Api, who: Principal, request: Request, key: str | None) -> list[BatchItem]:
    """Check every item of a batch, then store all that passed in one transaction.

    With an idempotency key each item has a key of its own, made from it and the item's place, so that the batch may be sent again.

    Raises:
        ProblemError: the batch as a whole cannot be read, or comes too fast.
    """
    api.refuse_while_draining()
    parsed = parse_json(await read_body(request, api.limits.batch_body_bytes))
    items = _items_of(parsed, api.limits.batch_items)
    await api.rate.take(who.owner, len(items))
    answers: dict[int, BatchItem] = {}
    wanted: list[tuple[int, NewEvaluation]] = []
    with api.tracing.span("submit-batch", owner=who.owner, items=len(items)):
        for index, item in enumerate(items):
            try:
                checked = check_request(api, item, suspect=parsed.suspect)
            except ProblemError as error:
                answers[index] = _rejected(index, error)
                continue
            wanted.append((index, _new(api, who, checked, f"{key}#{index}" if key else None)))
        stored = await _store(api, [new for _, new in wanted]) if wanted else []
    for (index, new), answer in zip(wanted, stored, strict=True):
        try:
            accepted = _outcome(answer, new, api)
        except ProblemError as error:
            answers[index] = _rejected(index, error)
            continue
        _count(accepted)
        status = BatchStatus.ACCEPTED if accepted.created else BatchStatus.EXISTING
        answers[index] = BatchItem(index=index, status=status, evaluation=view(accepted.record))
    return [answers[index] for index in range(len(items))]


def view(record: EvaluationRecord) -> EvaluationView:
    """Return the view of an evaluation without asking for its place in the queue."""
    return EvaluationView.of(record, explain(record))
