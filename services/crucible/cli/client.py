"""The command line's client of the public API.

It stands on `urllib` and plain dictionaries: importing httpx and the pydantic models would take longer than most commands do.
Untrusted text in answers is passed on as it is; whoever shows it must pass it through `crucible.cli.text`.
"""

from __future__ import annotations

import ipaddress
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from crucible import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from http.client import HTTPResponse

Document = dict[str, Any]

# The words of `crucible.evaluation`, whose import would cost more time than most commands take; a test holds the two together.
TERMINAL_STATES = frozenset({"completed", "failed", "timeout", "cancelled"})
# Above the server's own work; a long-poll adds its wait.
_TIMEOUT_S = 30.0
# The API holds a long-poll this long at most.
LONGEST_WAIT_S = 60
# Streams send a comment at least every 15 s (sse-starlette's default); three missed mean that the connection is dead.
_STREAM_TIMEOUT_S = 45.0
_RECONNECT_S = 0.5
# How long a stream that had been connected is asked for again, so that a restart of the platform is survived.
_PATIENCE_S = 30.0
_CHUNK_BYTES = 256 * 1024


class ApiError(Exception):
    """The API refused: `problem` is its RFC 9457 body, `status` the HTTP status."""

    def __init__(self, status: int, problem: Document) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or f"HTTP {status}"))
        self.status = status
        self.problem = problem


class UnreachableError(Exception):
    """No answer: nothing listens there, or it broke off."""


class StoppedError(Exception):
    """Whoever owns the client wants no more of what it does."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One server-sent event. `id` is what resumes the stream after it."""

    event: str
    data: str
    id: str


class _NoRedirects(HTTPRedirectHandler):
    # A redirect would carry the API key to another place; the API makes none.
    def redirect_request(self, *_args: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _problem(error: HTTPError) -> Document:
    try:
        body = json.loads(error.read())
    except (ValueError, OSError):
        body = None
    if isinstance(body, dict):
        return body
    return {"type": "about:blank", "title": error.reason, "status": error.code, "detail": f"HTTP {error.code}"}


def parse_events(lines: Iterator[bytes]) -> Iterator[StreamEvent]:
    """Cut a server-sent event stream into events (WHATWG HTML, section 9.2.6); comments keep the connection alive only."""
    name, data, event_id = "message", list[str](), ""
    for raw in lines:
        line = raw.decode().rstrip("\r\n")
        if not line:
            if data:
                yield StreamEvent(name, "\n".join(data), event_id)
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            event_id = value


class Client:
    """Speaks to one platform with one key.

    Args:
        url: where the API is, such as `http://127.0.0.1:8080`.
        api_key: `crk_...`, or None where the platform itself will say that one is needed.
        stop: once set, waiting ends with `StoppedError`.

    Raises:
        ValueError: the URL is not http or https.
    """

    def __init__(self, url: str, api_key: str | None, *, stop: Event | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of a platform; write for example http://127.0.0.1:8080")
        self.url = url.rstrip("/")
        self._stop = stop or Event()
        self._headers = {"User-Agent": f"crucible-cli/{__version__}"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # A proxy from the environment has no business between us and our own machine.
        proxies = [ProxyHandler({})] if _is_loopback(parts.hostname) else []
        self._opener = build_opener(_NoRedirects, *proxies)

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Document | list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = _TIMEOUT_S,
    ) -> Any:
        """Make a call and return its JSON body, or None if it has none.

        Args:
            method: HTTP method.
            path: below the platform's URL, quoted.
            params: query; None values are left out, lists repeat.
            body: sent as JSON.
            headers: further request headers.
            timeout: seconds that the platform may be silent.

        Raises:
            ApiError: an answer that is not 2xx.
            UnreachableError: no answer, or one that broke off.
        """
        with self._open(method, path, params=params, body=body, headers=headers, timeout=timeout) as response:
            content = response.read()
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise UnreachableError(f"what answers at {self.url} is not a platform: its answer is not JSON") from None

    def get(self, path: str, **params: Any) -> Any:
        """Read a JSON document. Errors as of `call`."""
        return self.call("GET", path, params=params)

    def evaluation(self, evaluation_id: str, *, wait: float = 0) -> Document:
        """Read one evaluation, waiting up to `wait` seconds (at most 60) for its end. Errors as of `call`."""
        document: Document = self.call(
            "GET", evaluation_path(evaluation_id), params={"wait": wait or None}, timeout=_TIMEOUT_S + wait
        )
        return document

    def wait_ended(self, evaluation_id: str) -> Document:
        """Return an evaluation once it has ended, however long that takes; a restart of the platform is survived.

        Raises:
            ApiError: the platform refused.
            UnreachableError: it does not answer, or once it had stayed away for longer than a restart takes.
        """
        answered_at: float | None = None
        while True:
            try:
                evaluation = self.evaluation(evaluation_id, wait=LONGEST_WAIT_S)
            except (UnreachableError, ApiError) as error:
                passing = isinstance(error, UnreachableError) or error.status == HTTPStatus.SERVICE_UNAVAILABLE
                if not passing or answered_at is None or time.monotonic() - answered_at > _PATIENCE_S:
                    raise
                self.pause(_RECONNECT_S)
                continue
            if evaluation["state"] in TERMINAL_STATES:
                return evaluation
            answered_at = time.monotonic()

    def chunks(self, path: str, **params: Any) -> Iterator[bytes]:
        """Read a body that may be large, piece by piece. Errors as of `call`."""
        with self._open("GET", path, params=params) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk

    def stream(self, path: str, *, last_id: str = "", params: Mapping[str, Any] | None = None) -> Iterator[StreamEvent]:
        """Follow a server-sent event stream; one that breaks off is taken up again where it was.

        It ends by itself only where the platform says that nothing will follow (204); else whoever reads it stops reading.

        Args:
            path: of the stream.
            last_id: resume after this event; empty starts at the beginning.
            params: query.

        Raises:
            ApiError: the platform refused.
            UnreachableError: it does not answer, or once connected stayed away for longer than a restart takes.
        """
        lost_at: float | None = None
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
            try:
                with self._open("GET", path, params=params, headers=headers, timeout=_STREAM_TIMEOUT_S) as response:
                    if response.status == HTTPStatus.NO_CONTENT:
                        return
                    lost_at = time.monotonic()
                    for event in parse_events(iter(response.readline, b"")):
                        last_id = event.id or last_id
                        yield event
                        lost_at = time.monotonic()
            except UnreachableError:
                if lost_at is None or time.monotonic() - lost_at > _PATIENCE_S:
                    raise
            self.pause(_RECONNECT_S)

    def pause(self, seconds: float) -> None:
        """Wait between two looks at the platform.

        Raises:
            StoppedError: the owner of this client set its `stop` event.
        """
        if self._stop.wait(seconds):
            raise StoppedError

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Document | list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = _TIMEOUT_S,
    ) -> Iterator[HTTPResponse]:
        # Only for reading the answer inside: any OSError in there is taken for a broken connection.
        query = urlencode(list(_flat(params or {})))
        request = Request(f"{self.url}{path}{'?' if query else ''}{query}", method=method)  # noqa: S310 - scheme checked
        for name, value in {**self._headers, **(headers or {})}.items():
            request.add_header(name, value)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=timeout) as response:
                yield response
        except HTTPError as error:
            with error:
                raise ApiError(error.code, _problem(error)) from None
        except (OSError, HTTPException) as error:
            raise UnreachableError(f"no platform answers at {self.url}: {getattr(error, 'reason', error)}") from error


def evaluation_path(evaluation_id: str, rest: str = "") -> str:
    """Return the path of an evaluation, whatever the id holds."""
    return f"/v1/evaluations/{quote(evaluation_id, safe='')}{rest}"


def _flat(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None:
                yield name, str(item).lower() if isinstance(item, bool) else str(item)
