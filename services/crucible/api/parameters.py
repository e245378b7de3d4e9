"""Path and query parameters that several routes share, each bounded and of a known alphabet before anything looks at it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlencode

from fastapi import Header, Path, Query
from pydantic import AfterValidator, BeforeValidator

from crucible.api.views import OWNER_PATTERN
from crucible.evaluation import EVALUATION_ID_PATTERN, IDEMPOTENCY_KEY_PATTERN

if TYPE_CHECKING:
    from starlette.requests import Request

# No evaluation is older or newer; within these bounds a time can be moved to any zone.
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 12, 30, tzinfo=UTC)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_VISIBLE_ASCII = r"^[\x21-\x7e]+$"


def _moment(value: datetime) -> datetime:
    """Return the time in UTC, which a time without a zone is taken to be in."""
    aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return min(max(aware, _EARLIEST), _LATEST).astimezone(UTC)


def _written_out(value: object) -> object:
    """Refuse what only pydantic would take for a time: a bare number."""
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError("a time is written as in RFC 3339, such as 2026-01-31T12:00:00Z")
    return value


Moment = Annotated[datetime, BeforeValidator(_written_out), AfterValidator(_moment)]
IdPath = Annotated[
    str,
    Path(pattern=EVALUATION_ID_PATTERN, description="Id of an evaluation", examples=["ev-01jd3v8q6m0c3r5x7z9b1d3f5h"]),
]
LetterPath = Annotated[int, Path(ge=1, le=2**63 - 1, description="Id of a dead letter")]
KeyPath = Annotated[str, Path(pattern=r"^[0-9a-z]{8}$", description="Id of a key: the part after `crk_`")]
Cursor = Annotated[
    str | None, Query(max_length=512, pattern=_VISIBLE_ASCII, description="Where to read on, from the page before")
]
PageSize = Annotated[int, Query(ge=1, le=200, description="Most entries on a page")]
OwnerQuery = Annotated[
    str | None,
    Query(pattern=OWNER_PATTERN, description="Only this owner's; another than one's own needs the role operator"),
]
SinceQuery = Annotated[
    Moment | None, Query(description="Submitted at or after this time (RFC 3339; UTC if it names no zone)")
]
UntilQuery = Annotated[
    Moment | None, Query(description="Submitted before this time (RFC 3339; UTC if it names no zone)")
]
LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        max_length=512,
        pattern=_VISIBLE_ASCII,
        description="Id of the last event seen: resumes a stream",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=IDEMPOTENCY_KEY_PATTERN,
        description="Any text of the caller's choice. Requests of one owner with the same key are one request, however often they are sent",
        examples=["nightly-2026-01-31-case-17"],
    ),
]


def next_page(request: Request, cursor: str | None) -> str | None:
    """Return the path of the next page: this request's own query with another cursor."""
    if cursor is None:
        return None
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    return f"{request.url.path}?{urlencode([*query, ('cursor', cursor)])}"
