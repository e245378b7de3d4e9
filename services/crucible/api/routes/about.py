"""What the API says of itself: limits, the caller, the meaning of problems, and where its documentation is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from crucible import __version__
from crucible.api import views
from crucible.api.access import Caller
from crucible.api.answers import answer
from crucible.api.core import api_of
from crucible.api.page import CONTENT_SECURITY_POLICY, render
from crucible.api.schema import GUARDED, errors, ok
from crucible.problems import KINDS, ProblemError

router = APIRouter(tags=["about"], default_response_class=Response)

_FRONT = f"""Crucible {__version__}

Documentation of this API:  /docs
OpenAPI document:           /openapi.json
Limits on a request:        /v1/limits
Health:                     /health
"""


@router.get("/", summary="Where the documentation is", responses={200: {"content": {"text/plain": {}}}, **errors()})
async def front() -> Response:
    """Point to the documentation."""
    return PlainTextResponse(_FRONT)


@router.get("/docs", include_in_schema=False)
async def documentation(request: Request) -> Response:
    """Show the documentation as a page."""
    return HTMLResponse(render(request.app.openapi()), headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})


@router.get(
    "/v1/limits",
    summary="Read the limits",
    responses={200: ok(views.LimitsView, "What a request may ask for"), **errors(*GUARDED)},
)
async def get_limits(request: Request, who: Caller) -> Response:  # noqa: ARG001 - who: anyone with a key may ask
    """Read every limit that a request is held against, and the caller's quotas."""
    api = api_of(request)
    shown = views.LimitsView(
        request=api.limits,
        rate_per_second=api.settings.api.rate_per_second,
        max_active_per_owner=api.settings.api.max_active_per_owner,
    )
    return answer(shown)


@router.get(
    "/v1/me", summary="Read whose key this is", responses={200: ok(views.MeView, "The caller"), **errors(*GUARDED)}
)
async def get_me(who: Caller) -> Response:
    """Read the owner and role of the key that asks."""
    return answer(views.MeView.of(who))


@router.get(
    "/problems/{slug}",
    summary="Explain a problem",
    responses={200: ok(views.ProblemPage, "What it means and what to do"), **errors("not-found", "invalid-request")},
)
async def explain_problem(
    slug: Annotated[
        str, Path(pattern=r"^[a-z-]{1,64}$", description="Last part of a problem's `type`", examples=["never-fits"])
    ],
) -> Response:
    """Explain the `type` of a problem that this API answered with."""
    if slug not in KINDS:
        raise ProblemError("not-found", f"there is no problem of that name; there are {', '.join(sorted(KINDS))}")
    return answer(views.ProblemPage.of(slug))
