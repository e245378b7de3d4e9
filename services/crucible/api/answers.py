"""Answers made from models without a second validation: the model was checked when it was built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from pydantic import BaseModel


def answer(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with a model as JSON."""
    return Response(model.model_dump_json().encode(), status, headers, "application/json")
