"""Reading events: those of one evaluation, and those of all that the caller may see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.responses import Response

from crucible.api import views
from crucible.api.access import Caller, scope_of
from crucible.api.answers import answer
from crucible.api.core import Api, about, api_of
from crucible.api.parameters import Cursor, IdPath, LastEventId, OwnerQuery
from crucible.api.schema import GUARDED, errors, ok, or_stream
from crucible.api.streams import KEEPALIVE_SECONDS, sse, stream_response, wants_stream, whole
from crucible.evaluation import Violation
from crucible.events import Event, EventType
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

router = APIRouter(tags=["events"], default_response_class=Response)

# The most that one read of the global stream gives; a longer backlog is read on at once.
_EVENTS_AT_ONCE = 500
# As many digits as any sequence number may have, and some.
_SEQ_DIGITS = 15


def _message(event: Event, event_id: str | None) -> bytes:
    return sse(event=event.type, raw=event.model_dump_json(exclude_none=True), id=event_id)


def _after(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= _SEQ_DIGITS):
        violation = Violation(
            field="Last-Event-ID",
            message="is not a sequence number",
            value=ascii(last_event_id)[:80],
            accepted="the id of an event of this evaluation",
        )
        raise ProblemError("invalid-request", "the stream cannot be resumed there", violations=[violation])
    return int(last_event_id)


async def _follow_one(api: Api, evaluation_id: str, after: int) -> AsyncIterator[bytes]:
    wanted = lambda event: about(event, evaluation_id) and event.type is not EventType.OUTPUT  # noqa: E731
    with api.streams.listen(wanted) as listener:
        while True:
            events = (await whole(api.storage.events(evaluation_id, after=after))).events
            for event in events:
                yield _message(event, str(event.seq))
                after = event.seq
            if events and events[-1].state.terminal:
                # What follows the terminal event was written with it.
                return
            if not events and (record := await whole(api.storage.get(evaluation_id))).state.terminal:
                if record.seq > after:
                    # It ended between the two readings.
                    continue
                return
            if listener.closing:
                return
            if not await listener.wait(KEEPALIVE_SECONDS):
                yield KEEPALIVE_COMMENT


@router.get(
    "/v1/evaluations/{evaluation_id}/events",
    summary="Read or follow the events of an evaluation",
    responses={
        200: or_stream(ok(views.EventsView, "The events so far; or a stream of them that ends after the last")),
        204: {"description": "A stream was to be resumed after the last event: nothing will follow"},
        **errors(*GUARDED, "not-found", "invalid-request"),
    },
)
async def get_evaluation_events(
    request: Request, who: Caller, evaluation_id: IdPath, last_event_id: LastEventId = None
) -> Response:
    """Read what happened to an evaluation. With `Accept: text/event-stream`, follow it: each event's id is its `seq`.

    A stream that broke off is resumed with `Last-Event-ID`, without gaps and without repeats; it ends after the last event.
    """
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    after = _after(last_event_id)
    if not wants_stream(request):
        events = (await api.storage.events(evaluation_id, after=after)).events
        return answer(views.EventsView(events=events), headers={"Vary": "Accept"})
    if record.state.terminal and after >= record.seq:
        # The one answer after which a browser's EventSource does not connect again.
        return Response(status_code=204, headers={"Vary": "Accept"})
    return stream_response(_follow_one(api, evaluation_id, after))


async def _follow_all(api: Api, owner: str | None, cursor: str | None) -> AsyncIterator[bytes]:
    wanted = lambda event: event.type is not EventType.OUTPUT and owner in (None, event.owner)  # noqa: E731
    with api.streams.listen(wanted) as listener:
        if cursor is None:
            cursor = (await whole(api.storage.event_stream(owner=owner))).cursor
            # An id without data: a reader that is cut off before the first event resumes from here, not from later.
            yield sse(id=cursor)
        while not listener.closing:
            page = await whole(api.storage.event_stream(owner=owner, cursor=cursor, limit=_EVENTS_AT_ONCE))
            for event in page.events:
                yield _message(event, event.cursor)
            cursor = page.cursor or cursor
            if not page.events and not await listener.wait(KEEPALIVE_SECONDS):
                yield KEEPALIVE_COMMENT


@router.get(
    "/v1/events",
    summary="Read or follow the events of all evaluations",
    responses={
        200: or_stream(
            ok(views.EventPageView, "Events after `cursor`; or a stream of them that does not end by itself")
        ),
        **errors(*GUARDED, "forbidden", "invalid-request"),
    },
)
async def get_events(
    request: Request,
    *,
    who: Caller,
    owner: OwnerQuery = None,
    cursor: Cursor = None,
    limit: Annotated[
        int, Query(ge=1, le=_EVENTS_AT_ONCE, description="Most events in one answer; a stream has no such end")
    ] = 100,
    last_event_id: LastEventId = None,
) -> Response:
    """Follow what happens to all of one's own evaluations (an operator: everyone's), from now or from a cursor on.

    With `Accept: text/event-stream` each event's id is a cursor, and a stream that broke off is resumed with `Last-Event-ID`.
    Without it, this answers with the events after `cursor` and the next cursor; without a cursor, with a cursor alone.
    """
    api = api_of(request)
    scope = scope_of(who, owner)
    if wants_stream(request):
        start = last_event_id or cursor
        if start is not None:
            # A cursor that storage refuses is told as a problem while it still can be.
            await api.storage.event_stream(owner=scope, cursor=start, limit=1)
        return stream_response(_follow_all(api, scope, start))
    page = await api.storage.event_stream(owner=scope, cursor=last_event_id or cursor, limit=limit)
    return answer(views.EventPageView(events=page.events, cursor=page.cursor), headers={"Vary": "Accept"})
