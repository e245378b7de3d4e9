"""What every HTTP service of the platform has in common: problems as answers, health, metrics, request ids, the internal token."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from crucible import __version__, logs, metrics
from crucible.auth import same
from crucible.evaluation import Violation
from crucible.health import Health
from crucible.problems import CONTENT_TYPE, KINDS, ProblemError, invalid_request
from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logs.get_logger("http")
_SLUG_BY_STATUS = {
    400: "malformed-json",
    401: "unauthenticated",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media-type",
    416: "range-not-satisfiable",
    422: "invalid-request",
    503: "unavailable",
}
# Problems of an internal call that are the platform's own doing, so that its caller's caller cannot mend them.
_OURS = frozenset({"internal", "unauthenticated", "forbidden", "method-not-allowed", "unsupported-media-type"})
_VIOLATIONS_SHOWN = 50
_FIELD_SHOWN = 200
_RETRY_AFTER_S = 2.0
# RFC 9110 and RFC 5789. In metrics any other word is one label value, since callers can make up as many as they like.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def problem_response(error: ProblemError, instance: str | None = None) -> Response:
    """Turn a problem into its answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    if error.kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    headers |= error.extra.pop("headers", {})
    return Response(orjson.dumps(error.body(instance)), error.kind.status, headers, CONTENT_TYPE)


def violations_of(errors: Sequence[Mapping[str, Any]]) -> list[Violation]:
    """Turn what pydantic found wrong into violations; the first 50 are enough to mend a request by."""
    return [_violation(error) for error in errors[:_VIOLATIONS_SHOWN]]


def _violation(error: Mapping[str, Any]) -> Violation:
    path = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
    context = error.get("ctx") or {}
    limit = next(
        (
            str(context[key])
            for key in ("le", "lt", "ge", "gt", "max_length", "min_length", "pattern")
            if key in context
        ),
        None,
    )
    value = error.get("input")
    shown = ascii(value)[:80] if isinstance(value, (str, int, float, bool)) else None
    return Violation(
        # Members that the caller made up are part of the path: shortened, and ASCII, since they may hold anything.
        field=ascii(".".join(path))[1:-1][:_FIELD_SHOWN] or "body",
        message=str(error["msg"]),
        value=shown,
        limit=limit,
        accepted=str(context["expected"]) if "expected" in context else None,
    )


def problem_of(error: CallFailedError) -> ProblemError:
    """Return what a failed call to another service means to one's own caller: that service's problem, or 503."""
    if error.slug is None or error.slug not in KINDS or error.slug in _OURS:
        log.warning("a call to another service failed", target=error.target, error=str(error))
        return ProblemError("unavailable", f"{error.target} does not answer now", retry_after=_RETRY_AFTER_S)
    violations = error.problem.get("violations")
    return ProblemError(
        error.slug,
        str(error.problem.get("detail", error)),
        violations=[Violation.model_validate(item) for item in violations] if violations else None,
        retry_after=_RETRY_AFTER_S if KINDS[error.slug].retryable else None,
    )


def _instance(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


def _allowed(request: Request) -> str:
    """Return every method that the path knows; Starlette names only those of the first route with that path."""
    found = (
        method
        for method in _METHODS
        for route in request.app.router.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    )
    return ", ".join(sorted(set(found)))


def _install_handlers(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def problem(request: Request, error: ProblemError) -> Response:
        return problem_response(error, _instance(request))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        if any(found["type"] in ("json_invalid", "model_attributes_type") for found in errors):
            return problem_response(
                ProblemError("malformed-json", "; ".join(str(found["msg"]) for found in errors)[:500]),
                _instance(request),
            )
        return problem_response(
            invalid_request(
                violations_of(errors),
            ),
            _instance(request),
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        slug = _SLUG_BY_STATUS.get(error.status_code, "internal" if error.status_code >= 500 else "malformed-json")
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(request)
        return problem_response(ProblemError(slug, str(error.detail), headers=headers), _instance(request))

    @app.exception_handler(CallFailedError)
    async def call_failed(request: Request, error: CallFailedError) -> Response:
        return problem_response(problem_of(error), _instance(request))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:  # noqa: ARG001 - the handler's signature
        # Nobody reads this answer; without it the disconnect would be logged as a mistake of ours.
        return problem_response(ProblemError("malformed-json", "the body broke off"), _instance(request))

    @app.exception_handler(Exception)
    async def mistake(request: Request, error: Exception) -> Response:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        return problem_response(ProblemError("internal", "an unexpected error; it has been logged"), _instance(request))


class RequestContext:
    """ASGI middleware: a request id in the logs and the answer, request metrics by route, and problems for whatever escapes."""

    def __init__(self, app: ASGIApp, service: str) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        code = 500

        async def send_marked(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    # Much of what the services answer with was written by strangers: it is what its type says, no more.
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_marked)
            finally:
                # The route's pattern, not the path: ids would make a metric series each.
                route = getattr(scope.get("route"), "path", "unmatched")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                metrics.HTTP_REQUESTS.labels(self._service, route, method, code).inc()
                metrics.HTTP_SECONDS.labels(self._service, route, code).observe(time.perf_counter() - started)


def require_internal(token: str) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency that lets only the platform's own services in."""

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not same(given, f"Bearer {token}"):
            raise ProblemError("unauthenticated", "internal calls need the platform's own token")

    return check


def add_health_routes(app: FastAPI, health: Health) -> None:
    """Add `/healthz`, `/readyz`, `/health` and `/metrics`."""

    @app.get("/healthz", tags=["health"], summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        """Answers 200 for as long as the process can answer at all."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["health"],
        summary="Can it do its work now?",
        responses={503: {"description": "Not now; `problems` says why"}},
    )
    async def readyz(response: Response) -> dict[str, Any]:
        """Answers 503 while the service cannot do its own work, or is draining."""
        problems = health.problems()
        if problems:
            response.status_code = 503
        return {"status": "not ready" if problems else "ready", "problems": problems}

    @app.get("/health", tags=["health"], summary="The service's own health in detail", name="health")
    async def detail() -> dict[str, Any]:
        """The service's own checks; other services are asked nothing."""
        return health.report()

    @app.get(
        "/metrics",
        tags=["health"],
        name="metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)


def make_app(service: str, health: Health, *, title: str, description: str, **kwargs: Any) -> FastAPI:
    """Return a FastAPI app with everything that the services share. Routes and lifespan are the caller's."""
    app = FastAPI(title=title, description=description, version=__version__, **kwargs)
    _install_handlers(app)
    add_health_routes(app, health)
    app.add_middleware(RequestContext, service=service)
    return app
