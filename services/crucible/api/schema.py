"""How routes describe themselves in the OpenAPI document: error answers, bodies read by hand, and the finishing touches.

The document is the contract: every status that a route can answer with stands in it, and tests hold the service to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from crucible.api import views
from crucible.evaluation import EvaluationRequest
from crucible.problems import CONTENT_TYPE, KINDS, ProblemDetails

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from fastapi.routing import APIRoute
    from pydantic import BaseModel

_REF = "#/components/schemas/{model}"
# Bodies are read by hand (see body.py), so FastAPI does not know their models.
_BODIES: tuple[type[BaseModel], ...] = (
    EvaluationRequest,
    views.BatchBody,
    views.CapacityCheckBody,
    views.NewKeyBody,
    views.ReplayBody,
    views.CleanupBody,
    views.MigrateBody,
    views.BrokerMoveBody,
)
# One event, as OpenAPI 3.2 describes them (section 4.14.4); FastAPI writes it the same way into its 3.1 documents.
_STREAM = {
    "itemSchema": {
        "type": "object",
        "description": "A server-sent event (HTML standard, section 9.2)",
        "properties": {
            "data": {"type": "string", "contentMediaType": "application/json"},
            "event": {"type": "string"},
            "id": {"type": "string"},
            "retry": {"type": "integer", "minimum": 0},
        },
    }
}


def errors(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """Describe the problems that a route answers with; those that any route may answer with are added."""
    by_status: dict[int, list[str]] = {}
    for slug in (*slugs, "internal"):
        by_status.setdefault(KINDS[slug].status, []).append(slug)
    return {
        status: {
            "description": "; ".join(f"{KINDS[slug].title} (`{slug}`)" for slug in found),
            "content": {CONTENT_TYPE: {"schema": {"$ref": _REF.format(model="ProblemDetails")}}},
            **({"headers": {"Retry-After": _RETRY_AFTER}} if any(KINDS[slug].retryable for slug in found) else {}),
        }
        for status, found in sorted(by_status.items())
    }


_RETRY_AFTER = {"description": "Seconds to wait before trying again", "schema": {"type": "string"}}
# Any route that asks who is calling, and therefore storage.
GUARDED = ("unauthenticated", "unavailable")
# Any route that reads a body.
READS_BODY = ("malformed-json", "body-too-large", "unsupported-media-type", "invalid-request")


def ok(model: type[BaseModel], description: str, *, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Describe a JSON answer."""
    described = {name: {"description": text, "schema": {"type": "string"}} for name, text in (headers or {}).items()}
    return {"model": model, "description": description, **({"headers": described} if described else {})}


def or_stream(answer: dict[str, Any]) -> dict[str, Any]:
    """Add to an answer that it is a stream of events if the caller accepts `text/event-stream`."""
    return {**answer, "content": {**answer.get("content", {}), "text/event-stream": _STREAM}}


def body(model: type[BaseModel], examples: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe a JSON body that the route reads by hand."""
    content: dict[str, Any] = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def operation_id(route: APIRoute) -> str:
    """Name an operation as its function is named."""
    return route.name


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def finished(app: FastAPI, build: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return the app's `openapi` method: FastAPI's document with the missing models, sorted, and built once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = build()
            _, extra = models_json_schema(
                [*((model, "validation") for model in _BODIES), (ProblemDetails, "serialization")], ref_template=_REF
            )
            schemas = spec.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in extra["$defs"].items():
                schemas.setdefault(name, schema)
            app.openapi_schema = _sorted(spec)
        return app.openapi_schema

    return openapi
