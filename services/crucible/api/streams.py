"""Server-sent events: waiting for something to happen, keeping the connection alive, and ending cleanly on drain.

The bus only wakes a stream; what the stream then sends it reads from storage. So a lost, late or repeated event costs at most
some seconds, never a gap or a duplicate.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import orjson
from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse

from crucible import logs
from crucible.events import Event, Lagged
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from typing import Any

    from starlette.requests import Request

    from crucible.events import EventFeed

log = logs.get_logger("streams")
T = TypeVar("T")

MEDIA_TYPE = "text/event-stream"
# Proxies commonly close a connection that is silent for 60 s; the HTML standard suggests a comment about every 15 s.
KEEPALIVE_SECONDS = 15.0
# Browsers wait this long before they reconnect to a stream that ended; soon, since ending is how a drain hands them on.
_RETRY_MS = 1000
PREAMBLE = format_sse_event(retry=_RETRY_MS)


def sse(*, event: str | None = None, data: Any = None, raw: str | None = None, id: str | None = None) -> bytes:  # noqa: A002
    """Format one event: `data` becomes JSON, `raw` is JSON already. Without either only the id is set, and nothing dispatched."""
    text = raw if raw is not None else None if data is None else orjson.dumps(data, default=str).decode()
    return format_sse_event(event=event, data_str=text, id=id)


def wants_stream(request: Request) -> bool:
    """Whether the caller asked for server-sent events."""
    return MEDIA_TYPE in request.headers.get("accept", "").lower()


class Listener:
    """Waits for what the bus says; hears also that the service is closing."""

    def __init__(self, queue: asyncio.Queue[Event | Lagged], streams: Streams) -> None:
        self._queue = queue
        self._streams = streams

    @property
    def closing(self) -> bool:
        """Whether the stream should end now, for its reader to resume it elsewhere."""
        return self._streams.closing

    async def wait(self, seconds: float) -> bool:
        """Return once something was heard (True) or the time is over (False); what was heard together counts once."""
        if self.closing:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._queue.get()
        except TimeoutError:
            return False
        while not self._queue.empty():
            self._queue.get_nowait()
        return True

    def wake(self) -> None:
        """Make `wait` return."""
        if not self._queue.full():
            self._queue.put_nowait(Lagged())


class Streams:
    """Every stream and long-poll that is open."""

    def __init__(self, bus: EventFeed) -> None:
        self._bus = bus
        self._listeners: set[Listener] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.closing = False

    @property
    def count(self) -> int:
        """Streams and long-polls that are open now."""
        return len(self._listeners)

    @contextmanager
    def listen(self, wants: Callable[[Event], bool]) -> Iterator[Listener]:
        """Listen for as long as the context is open. Begin before reading the table, so that nothing falls in between."""
        with self._bus.subscribe(wants) as queue:
            listener = Listener(queue, self)
            self._listeners.add(listener)
            self._idle.clear()
            try:
                yield listener
            finally:
                self._listeners.discard(listener)
                if not self._listeners:
                    self._idle.set()

    def close(self) -> None:
        """Ask every stream to end."""
        self.closing = True
        for listener in self._listeners:
            listener.wake()

    async def ended(self, seconds: float) -> None:
        """Wait until every stream has ended or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("streams are still open", count=len(self._listeners))


async def whole(call: Awaitable[T]) -> T:
    """Await a call that goes on by itself when the reader hangs up.

    A stream whose reader has gone is cancelled wherever it stands. In `local` that would reach through the call into storage,
    which would have to throw away a database connection.
    """
    return await asyncio.shield(call)


async def _guarded(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield PREAMBLE
    try:
        async for part in parts:
            yield part
    except CallFailedError as error:
        # The headers are out, so no problem can be told; ending lets the reader resume where it was.
        log.warning("a stream ends early", error=str(error))


def stream_response(parts: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> StreamingResponse:
    """Answer with server-sent events."""
    # no-transform and X-Accel-Buffering: a proxy that compresses or buffers would hold events back.
    unbuffered = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no", "Vary": "Accept"}
    return StreamingResponse(_guarded(parts), headers=unbuffered | (headers or {}), media_type=MEDIA_TYPE)
