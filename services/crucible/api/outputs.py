"""Reading an evaluation's output: whole, a range, or as it grows. It was written by a stranger and may be anything.

Nothing here holds a whole output in memory, and nothing is ever sent as a kind of content that a browser would run.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, Literal

import orjson
from fastapi.sse import KEEPALIVE_COMMENT

from crucible.api.core import about
from crucible.api.streams import KEEPALIVE_SECONDS, sse, whole
from crucible.frames import Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crucible.api.core import Api
    from crucible.api.ranges import Span
    from crucible.contracts import EvaluationRecord, OutputInfo
    from crucible.frames import Frame

StreamName = Literal["stdout", "stderr"]

# One read from storage: large enough that 100 MB take a hundred reads, small enough that many readers fit into memory.
CHUNK_BYTES = 1024 * 1024
# Frames are at most 64 KiB as the runner makes them, mostly far less.
_FRAMES_AT_ONCE = 256
# A browser that is led to such an answer must neither run nor frame it, nor guess a type (nosniff is on every answer).
UNTRUSTED = {"Content-Security-Policy": "sandbox; default-src 'none'", "Cross-Origin-Resource-Policy": "same-origin"}


class OutputChangedError(Exception):
    """The output that was being sent is gone: its attempt was void and another is under way. The answer breaks off."""


def info_of(record: EvaluationRecord, stream: StreamName) -> OutputInfo:
    """Return what is known of one stream."""
    return record.stdout if stream == "stdout" else record.stderr


async def read_chunk(api: Api, evaluation_id: str, stream: StreamName, span: Span) -> bytes:
    """Return the first bytes of a span, as many as one read gives."""
    data, _ = await api.storage.output(
        evaluation_id, stream, start=span.start, length=min(CHUNK_BYTES, span.end - span.start)
    )
    return data


async def chunks(api: Api, evaluation_id: str, stream: StreamName, span: Span, first: bytes) -> AsyncIterator[bytes]:
    """Yield a span of a stream, beginning with what was read of it already."""
    yield first
    sent = span.start + len(first)
    while sent < span.end:
        length = min(CHUNK_BYTES, span.end - sent)
        data, _ = await whole(api.storage.output(evaluation_id, stream, start=sent, length=length))
        if not data:
            raise OutputChangedError(f"{stream} of {evaluation_id} ended at byte {sent} of {span.end}")
        yield data
        sent += len(data)


def text_part(data: bytes) -> tuple[dict[str, str], int]:
    """Return bytes as a member of a JSON object, and how many of them it holds.

    As `text` if they are UTF-8 (short of a last character whose rest is yet to come), else as `base64`. No byte is lost.
    """
    try:
        return {"text": data.decode()}, len(data)
    except UnicodeDecodeError as error:
        # At most 3 bytes at the very end may be the beginning of a character.
        if error.reason == "unexpected end of data" and error.start > 0:
            return {"text": data[: error.start].decode()}, error.start
        return {"base64": base64.b64encode(data).decode()}, len(data)


def _incomplete(data: bytes) -> bool:
    """Whether the bytes are only the beginning of one character."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


# --- positions: what a reader sends as Last-Event-ID --------------------------------------------------------------------------

_POSITION = re.compile(r"[0-9]{1,9}(-[0-9]{1,18}){1,3}", re.ASCII)


def parse_position(text: str | None, numbers: int) -> tuple[int, ...] | None:
    """Read a position of so many numbers, or None if the text is not one."""
    if text is None or not _POSITION.fullmatch(text):
        return None
    parts = tuple(int(part) for part in text.split("-"))
    return parts if len(parts) == numbers else None


def _position(*numbers: int) -> str:
    return "-".join(str(number) for number in numbers)


def _end(record: EvaluationRecord) -> bytes:
    data = {"state": record.state, "reason": record.reason, "exit_code": record.exit_code}
    return sse(event="end", data=data)


# --- one stream -------------------------------------------------------------------------------------------------------------


async def follow(
    api: Api, evaluation_id: str, stream: StreamName, resume: tuple[int, ...] | None
) -> AsyncIterator[bytes]:
    """Yield one stream as events: `output` as it grows, `reset` when an attempt was void, `end` at last.

    The id of an event is attempt and offset after it; `resume` is such a pair.
    """
    attempt, offset = resume or (0, 0)
    with api.streams.listen(lambda event: about(event, evaluation_id)) as listener:
        while True:
            # The record first: if it has ended by now, the output read after it is complete.
            record = await whole(api.storage.get(evaluation_id))
            if record.attempt != attempt:
                if offset:
                    yield sse(event="reset", data={"attempt": record.attempt}, id=_position(record.attempt, 0))
                attempt, offset = record.attempt, 0
            while data := (await whole(api.storage.output(evaluation_id, stream, start=offset, length=CHUNK_BYTES)))[0]:
                if _incomplete(data) and not record.state.terminal:
                    break
                part, used = text_part(data)
                message = {"stream": stream, "offset": offset, **part}
                offset += used
                yield sse(event="output", data=message, id=_position(attempt, offset))
                if listener.closing:
                    return
            if record.state.terminal:
                yield _end(record)
                return
            if not await listener.wait(KEEPALIVE_SECONDS):
                yield KEEPALIVE_COMMENT
            if listener.closing:
                return


# --- both streams, in order ---------------------------------------------------------------------------------------------------


class _Counter:
    """Turns frames into messages, keeping count of each stream's offset."""

    def __init__(self, number: int = 0, stdout: int = 0, stderr: int = 0) -> None:
        self.number = number
        self._offsets = {Kind.STDOUT: stdout, Kind.STDERR: stderr}

    def message(self, frame: Frame) -> dict[str, Any]:
        try:
            part = {"text": frame.payload.decode()}
        except UnicodeDecodeError:
            part = {"base64": base64.b64encode(frame.payload).decode()}
        offset = self._offsets[frame.kind]
        self._offsets[frame.kind] = offset + len(frame.payload)
        return {"stream": frame.kind.name.lower(), "offset": offset, "at_ms": frame.at_ms, **part}

    def position(self, attempt: int) -> str:
        return _position(attempt, self.number, self._offsets[Kind.STDOUT], self._offsets[Kind.STDERR])

    @property
    def moved(self) -> bool:
        return self.number > 0


async def lines(api: Api, evaluation_id: str, frames: list[Frame], after: int) -> AsyncIterator[bytes]:
    """Yield both streams in order, a JSON object a line, beginning with frames that were read already."""
    counter = _Counter()
    while frames:
        yield b"".join(orjson.dumps(counter.message(frame)) + b"\n" for frame in frames)
        frames, after = await whole(first_frames(api, evaluation_id, after))


async def first_frames(api: Api, evaluation_id: str, after: int = 0) -> tuple[list[Frame], int]:
    """Return the next frames, and the number of the one after them."""
    return await api.storage.frames(evaluation_id, after=after, limit=_FRAMES_AT_ONCE)


async def follow_both(api: Api, evaluation_id: str, resume: tuple[int, ...] | None) -> AsyncIterator[bytes]:
    """Yield both streams in order as events, as `follow` does for one.

    The id of an event is attempt, number of the next frame, and the offsets of both streams after it.
    """
    attempt, *place = resume or (0, 0, 0, 0)
    counter = _Counter(*place)
    with api.streams.listen(lambda event: about(event, evaluation_id)) as listener:
        while True:
            record = await whole(api.storage.get(evaluation_id))
            if record.attempt != attempt:
                if counter.moved:
                    yield sse(event="reset", data={"attempt": record.attempt}, id=_position(record.attempt, 0, 0, 0))
                attempt, counter = record.attempt, _Counter()
            while True:
                frames, after = await whole(first_frames(api, evaluation_id, counter.number))
                for frame in frames:
                    message = counter.message(frame)
                    counter.number += 1
                    yield sse(event="output", data=message, id=counter.position(attempt))
                counter.number = after if frames else counter.number
                if not frames or listener.closing:
                    break
            if record.state.terminal and not listener.closing:
                yield _end(record)
                return
            if listener.closing:
                return
            if not await listener.wait(KEEPALIVE_SECONDS):
                yield KEEPALIVE_COMMENT
