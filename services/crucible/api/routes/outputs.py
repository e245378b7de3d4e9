"""Reading output: one stream whole, by range or as it grows; or both in order."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from crucible.api import outputs
from crucible.api.access import Caller
from crucible.api.core import Api, api_of
from crucible.api.outputs import CHUNK_BYTES, UNTRUSTED, StreamName
from crucible.api.parameters import IdPath, LastEventId
from crucible.api.ranges import Span, UnsatisfiableError, parse_range
from crucible.api.schema import GUARDED, errors, or_stream
from crucible.api.streams import stream_response, wants_stream
from crucible.contracts import EvaluationRecord
from crucible.evaluation import Violation
from crucible.problems import ProblemError

router = APIRouter(tags=["output"], default_response_class=Response)

Follow = Annotated[
    bool, Query(description="Stream output as it grows, as server-sent events, until the evaluation ends")
]
ByteRange = Annotated[
    str | None, Header(alias="Range", description="`bytes=first-last`, `bytes=first-` or `bytes=-length`")
]
_TEXT = {"schema": {"type": "string"}}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_RANGE_HEADERS = {
    "ETag": {"description": "Names the bytes of an ended evaluation", "schema": {"type": "string"}},
    "Accept-Ranges": {"description": "`bytes`", "schema": {"type": "string"}},
    "X-Evaluation-State": {"description": "More may follow unless it is final", "schema": {"type": "string"}},
}


def _resume(text: str | None, numbers: int) -> tuple[int, ...] | None:
    position = outputs.parse_position(text, numbers)
    if text is not None and position is None:
        violation = Violation(
            field="Last-Event-ID",
            message="is not an id of this stream",
            value=ascii(text)[:80],
            accepted="the id of an event",
        )
        raise ProblemError("invalid-request", "the stream cannot be resumed there", violations=[violation])
    return position


@router.get(
    "/v1/evaluations/{evaluation_id}/output/{stream}",
    summary="Read standard output or standard error",
    responses={
        200: or_stream(
            {
                "description": "The whole stream so far; or events `output`, `reset` and `end`",
                "content": {"text/plain": _TEXT, "application/octet-stream": _BYTES},
                "headers": _RANGE_HEADERS,
            }
        ),
        206: {
            "description": "The range asked for",
            "content": {"text/plain": _TEXT, "application/octet-stream": _BYTES},
            "headers": {**_RANGE_HEADERS, "Content-Range": {"schema": {"type": "string"}}},
        },
        304: {"description": "What the caller has (`If-None-Match`) is still right"},
        **errors(*GUARDED, "not-found", "invalid-request", "range-not-satisfiable"),
    },
)
async def get_output(
    request: Request,
    *,
    who: Caller,
    evaluation_id: IdPath,
    stream: StreamName,
    follow: Follow = False,
    byte_range: ByteRange = None,
    last_event_id: LastEventId = None,
) -> Response:
    """Read one stream exactly as the code wrote it: whole, a range of it, or with `follow` as it grows.

    The content is a stranger's. It is sent as plain text, or as bytes to be saved if `Accept` names `application/octet-stream`.
    Events hold `text`, or `base64` where the bytes are not UTF-8. `reset` says that an attempt was void: forget what came before.
    """
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    if follow or wants_stream(request):
        return stream_response(outputs.follow(api, evaluation_id, stream, _resume(last_event_id, 2)), UNTRUSTED)
    return await _bytes_answer(api, request, record, stream, byte_range)


def _matches(header: str | None, etag: str | None) -> bool:
    if header is None or etag is None:
        return False
    return header.strip() == "*" or etag in [part.strip().removeprefix("W/") for part in header.split(",")]


def _headers(request: Request, record: EvaluationRecord, stream: StreamName, etag: str | None) -> dict[str, str]:
    headers = UNTRUSTED | {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Vary": "Accept",
        "X-Evaluation-State": record.state,
        "Content-Type": "text/plain; charset=utf-8",
    }
    if "application/octet-stream" in request.headers.get("accept", "").lower():
        headers["Content-Type"] = "application/octet-stream"
        headers["Content-Disposition"] = f'attachment; filename="{record.id}.{stream}"'
    if etag is not None:
        headers["ETag"] = etag
    return headers


async def _bytes_answer(
    api: Api, request: Request, record: EvaluationRecord, stream: StreamName, byte_range: str | None
) -> Response:
    info = outputs.info_of(record, stream)
    final = record.state.terminal
    etag = f'"{info.sha256}"' if final and info.sha256 else None
    headers = _headers(request, record, stream, etag)
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    condition = request.headers.get("if-range")
    try:
        part = parse_range(byte_range, info.size) if condition is None or condition.strip() == etag else None
    except UnsatisfiableError as error:
        raise ProblemError(
            "range-not-satisfiable",
            f"the stream has {info.size} bytes",
            size=info.size,
            headers={"Content-Range": f"bytes */{info.size}"},
        ) from error
    span = part or Span(0, info.size)
    if part is not None:
        headers["Content-Range"] = part.content_range(info.size if final else None)
    status = 206 if part is not None else 200
    # Read before the headers are sent, while a failure can still be told as a problem.
    first = await outputs.read_chunk(api, record.id, stream, span) if span.length else b""
    if span.length <= CHUNK_BYTES and len(first) == span.length:
        return Response(first, status, headers)
    headers["Content-Length"] = str(span.length)
    return StreamingResponse(outputs.chunks(api, record.id, stream, span, first), status, headers)


@router.get(
    "/v1/evaluations/{evaluation_id}/output",
    summary="Read both output streams in order",
    responses={
        200: or_stream(
            {
                "description": "A JSON object a line: `stream`, `offset`, `at_ms`, and `text` or `base64`; or such objects as events",
                "content": {"application/x-ndjson": _TEXT},
            }
        ),
        **errors(*GUARDED, "not-found", "invalid-request"),
    },
)
async def get_combined_output(
    request: Request,
    *,
    who: Caller,
    evaluation_id: IdPath,
    follow: Follow = False,
    last_event_id: LastEventId = None,
) -> Response:
    """Read standard output and error as they came, each piece with its stream, its offset there and the time since the start."""
    api = api_of(request)
    record = await api.find(who, evaluation_id)
    if follow or wants_stream(request):
        return stream_response(outputs.follow_both(api, evaluation_id, _resume(last_event_id, 4)), UNTRUSTED)
    frames, after = await outputs.first_frames(api, evaluation_id)
    headers = UNTRUSTED | {"Cache-Control": "private, no-cache", "Vary": "Accept", "X-Evaluation-State": record.state}
    return StreamingResponse(outputs.lines(api, evaluation_id, frames, after), 200, headers, "application/x-ndjson")
