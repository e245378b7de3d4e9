"""Reading server-sent events in tests: from an app in this process as they come, and from text that was received whole."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable


@dataclass(frozen=True)
class SentEvent:
    """One event as a browser would dispatch it; `id` is the last event id after it."""

    event: str
    id: str | None
    data: Any


def parse_events(text: str, last_id: str | None = None) -> tuple[list[SentEvent], str | None]:
    """Read events by the rules of the HTML standard (section 9.2.6); also return the last event id."""
    found: list[SentEvent] = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields: dict[str, list[str]] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            if name:
                fields.setdefault(name, []).append(value.removeprefix(" "))
        last_id = fields["id"][-1] if "id" in fields else last_id
        if "data" in fields:
            name = fields.get("event", ["message"])[-1]
            found.append(SentEvent(event=name, id=last_id, data=json.loads("\n".join(fields["data"]))))
    return found, last_id


class OpenStream:
    """An answer that is still being sent by an app in this process."""

    def __init__(self, parts: asyncio.Queue[bytes | None], start: asyncio.Future[dict[str, Any]]) -> None:
        self._parts = parts
        self._start = start
        self.sending: asyncio.Task[None] | None = None
        self._text = ""
        self._events: list[SentEvent] = []
        self.last_id: str | None = None

    async def status(self) -> int:
        """The status of the answer, once it has begun."""
        return (await asyncio.wait_for(asyncio.shield(self._start), 5))["status"]  # type: ignore[no-any-return]

    async def event(self) -> SentEvent | None:
        """The next event; None once the answer has ended."""
        while not self._events:
            part = await asyncio.wait_for(self._parts.get(), 5)
            if part is None:
                return None
            self._text += part.decode()
            whole, cut, self._text = self._text.rpartition("\n\n")
            events, self.last_id = parse_events(whole + cut, self.last_id)
            self._events += events
        return self._events.pop(0)

    def sizes(self) -> list[int]:
        """The sizes of the pieces received and not yet read, in bytes."""
        pieces = [self._parts.get_nowait() for _ in range(self._parts.qsize())]
        return [len(piece) for piece in pieces if piece is not None]

    async def finished(self) -> None:
        """Wait until all is sent; raises what the app raised."""
        assert self.sending is not None
        await asyncio.wait_for(asyncio.shield(self.sending), 5)

    async def rest(self) -> list[SentEvent]:
        """Every further event, until the answer ends."""
        found = []
        while event := await self.event():
            found.append(event)
        return found


@asynccontextmanager
async def open_stream(
    app: Callable[..., Awaitable[None]], path: str, headers: Iterable[tuple[str, str]], query: str = ""
) -> AsyncIterator[OpenStream]:
    """GET a path of an app in this process and read its answer while it is being sent; on exit the client disconnects."""
    parts: asyncio.Queue[bytes | None] = asyncio.Queue()
    start: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    gone = asyncio.Event()
    requested = False

    async def receive() -> dict[str, Any]:
        nonlocal requested
        if not requested:
            requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.set_result(message)
            return
        if message.get("body"):
            parts.put_nowait(message["body"])
        if not message.get("more_body"):
            parts.put_nowait(None)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    # `app` answers with an awaitable, which is a coroutine in all but its declared type.
    task: asyncio.Task[None] = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    stream = OpenStream(parts, start)
    stream.sending = task
    try:
        yield stream
    finally:
        gone.set()
        await asyncio.wait([task], timeout=5)
