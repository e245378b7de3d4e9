"""The FastAPI app of the public API: its routes, its document, and what every answer has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible.api.core import Api
from crucible.api.routes import about, admin, capacity, evaluations, events, outputs
from crucible.api.schema import finished, operation_id
from crucible.service import make_app

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Api", "make_api_app"]

_DESCRIPTION = """\
Submit untrusted Python and get back a durable, explained result.

Every request but those for health and explanations needs `Authorization: Bearer <key>`. A submitter sees its own evaluations,
an operator everyone's; an admin also manages keys, dead letters and storage. Errors are problem details (RFC 9457): `type` is
a path of this API that explains the problem, `violations` names each broken rule with what would be accepted, and an error
that may pass carries `Retry-After`.

Output is what a stranger's code wrote. It is only ever sent as data; whoever shows it must escape it.
"""
_TAGS = [
    {"name": "evaluations", "description": "Submit, read, list, cancel"},
    {"name": "output", "description": "What the code wrote: whole, by range, or as it grows"},
    {"name": "events", "description": "What happened, in order, resumable"},
    {"name": "capacity", "description": "What is free, what waits, what would fit, how it went"},
    {"name": "dead letters", "description": "What the platform could not run (admin)"},
    {"name": "keys", "description": "Who may call (admin)"},
    {"name": "broker", "description": "What carries work to the workers, and the move from one to another (admin)"},
    {"name": "storage", "description": "Where the bytes are (admin)"},
    {"name": "about", "description": "Limits, the caller, problems explained"},
    {"name": "health", "description": "This server's own health"},
]


def make_api_app(api: Api) -> FastAPI:
    """Return the app. Its owner calls `api.start()` before serving and `api.drain()`, then `api.aclose()`, after."""
    app = make_app(
        "api",
        api.health,
        title="Crucible",
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        generate_unique_id_function=operation_id,
        # The usual pages would run a stranger's scripts, and need the internet; page.py makes one that does neither.
        docs_url=None,
        redoc_url=None,
        # A path with a slash too many is not there; a redirect would be made from the caller's own Host header.
        redirect_slashes=False,
    )
    app.state.api = api
    for part in (evaluations, outputs, events, capacity, admin, about):
        app.include_router(part.router)
    # FastAPI's documented way to extend its document.
    app.openapi = finished(app, app.openapi)  # type: ignore[method-assign]
    return app
