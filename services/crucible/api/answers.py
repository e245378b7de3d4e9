"""Answers made from models without a second validation: the model was checked when it was built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

from crucible.problems import ProblemError

if TYPE_CHECKING:
    from fastapi import APIRouter
    from pydantic import BaseModel


def answer(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with a model as JSON."""
    return Response(model.model_dump_json().encode(), status, headers, "application/json")


def only_post(router: APIRouter, path: str) -> None:
    """Answer 405 to every method but POST on a path that would otherwise be taken for an id in another route."""

    @router.api_route(path, methods=["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "PUT"], include_in_schema=False)
    async def refuse() -> Response:
        raise ProblemError("method-not-allowed", "only POST is known here", headers={"Allow": "POST"})
