"""How one service calls another: bounded in time, tried again when that can help, and not at all while the other is down.

Retries (stamina: exponential, jittered, capped) are only for failures that may pass: no connection, a lost answer to a call that
may be repeated, and the statuses of `RETRYABLE_STATUSES`. A circuit breaker (purgatory) opens after repeated failures, so that a dead
service costs its callers an immediate error and not a time-out each. What is the caller's own mistake (4xx) neither repeats nor counts.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import stamina
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from crucible import logs, metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logs.get_logger("calls")

# 408 and 425 ask for another try by definition (RFC 9110, RFC 8470); 429 and 503 refuse before any effect; 502 and 504 may pass.
RETRYABLE_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
# A gateway that lost the answer cannot know whether the call had its effect (RFC 9110, 9.2.2).
_MAYBE_DONE_STATUSES = frozenset({502, 504})
# What says that the service is down, as against busy with the one call.
_DOWN_STATUSES = frozenset({502, 503, 504})
_ATTEMPTS = 5
_WAIT_INITIAL_S = 0.05
_WAIT_MAX_S = 2.0
# No further attempt begins later than this after the first, so that a service that hangs is not waited for five times over.
_RETRY_WINDOW_S = 30.0
# One attempt; longer than any long-poll (60 s). httpx's own time-outs do not reach over an in-process transport.
_ATTEMPT_LIMIT_S = 90.0
# Failed attempts in a row until calls are refused, and for how long they are.
_BREAKER_THRESHOLD = 10
_BREAKER_SECONDS = 2.0


class CallFailedError(Exception):
    """A call to another service failed for good: `status` is None when no answer came at all."""

    def __init__(
        self, target: str, message: str, *, status: int | None = None, problem: dict[str, Any] | None = None
    ) -> None:
        super().__init__(f"{target}: {message}")
        self.target = target
        self.status = status
        self.problem = problem or {}

    @property
    def slug(self) -> str | None:
        """The problem's slug, if the other side answered with a problem."""
        kind = self.problem.get("type")
        return kind.rsplit("/", 1)[-1] if isinstance(kind, str) and kind else None


class _TransientError(Exception):
    def __init__(self, cause: CallFailedError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _DownError(Exception):
    """Makes the breaker count an answer that says that the service is down."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def _failure(target: str, response: httpx.Response) -> CallFailedError:
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    return CallFailedError(
        target,
        str(problem.get("detail") or f"answered {response.status_code}"),
        status=response.status_code,
        problem=problem,
    )


class ServiceCaller:
    """Calls one named service over a given httpx client; keeps the one breaker of that service for this client."""

    def __init__(self, target: str, client: httpx.AsyncClient, *, attempts: int = _ATTEMPTS) -> None:
        self._target = target
        self._client = client
        self._attempts = attempts
        self._retries = metrics.CALL_RETRIES.labels(target)
        self._open = metrics.BREAKER_OPEN.labels(target)
        self._breakers = AsyncCircuitBreakerFactory(
            default_threshold=_BREAKER_THRESHOLD,
            default_ttl=_BREAKER_SECONDS,
            # A caller that went away (a cancelled long-poll) says nothing about the service.
            exclude=[asyncio.CancelledError],
        )
        self._breakers.add_listener(self._show_breaker)

    async def call(
        self, method: str, path: str, *, ok: Iterable[int] = (200, 201, 204), idempotent: bool = True, **kwargs: Any
    ) -> httpx.Response:
        """Send a request and return its answer.

        Args:
            method: HTTP method.
            path: path on the service.
            ok: statuses that are answers and not failures.
            idempotent: whether the call may be repeated after it may already have had its effect.
            **kwargs: passed to `httpx.AsyncClient.request`.

        Raises:
            CallFailedError: no usable answer within all attempts, a failure that trying again cannot help, or, with status 503
                and at once, calls are being held back because the service was down a moment ago.
        """
        accepted = frozenset(ok)
        try:
            async for attempt in stamina.retry_context(
                on=_TransientError,
                attempts=self._attempts,
                timeout=_RETRY_WINDOW_S,
                wait_initial=_WAIT_INITIAL_S,
                wait_max=_WAIT_MAX_S,
                wait_jitter=_WAIT_INITIAL_S,
            ):
                with attempt:
                    if attempt.num > 1:
                        self._retries.inc()
                    return await self._once(method, path, accepted, idempotent=idempotent, **kwargs)
        except _TransientError as error:
            raise error.cause from error.__cause__
        raise AssertionError("unreachable: the retry context returns or raises")

    async def _once(
        self, method: str, path: str, accepted: frozenset[int], *, idempotent: bool, **kwargs: Any
    ) -> httpx.Response:
        response = await self._send(method, path, accepted, idempotent=idempotent, **kwargs)
        status = response.status_code
        if status in accepted:
            return response
        again = status in RETRYABLE_STATUSES and (idempotent or status not in _MAYBE_DONE_STATUSES)
        failed = _failure(self._target, response)
        raise _TransientError(failed) if again else failed

    async def _send(
        self, method: str, path: str, accepted: frozenset[int], *, idempotent: bool, **kwargs: Any
    ) -> httpx.Response:
        """Get an answer, whatever it says, through the breaker."""
        breaker = await self._breakers.get_breaker(self._target)
        try:
            async with breaker:
                return await self._exchange(method, path, accepted, **kwargs)
        except _DownError as error:
            return error.response
        except OpenedState as error:
            # purgatory raises one object over and over; its traceback would grow with every call.
            error.__traceback__ = None
            raise CallFailedError(
                self._target, "is not answering; calls are held back for a moment", status=503
            ) from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _TransientError(CallFailedError(self._target, f"no connection: {error}")) from error
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, TimeoutError) as error:
            failed = CallFailedError(self._target, f"{type(error).__name__}: {error}")
            raise (_TransientError(failed) if idempotent else failed) from error
        except httpx.HTTPError as error:
            raise CallFailedError(self._target, f"{type(error).__name__}: {error}") from error

    async def _exchange(self, method: str, path: str, accepted: frozenset[int], **kwargs: Any) -> httpx.Response:
        async with asyncio.timeout(_ATTEMPT_LIMIT_S):
            response = await self._client.request(method, path, **kwargs)
        if response.status_code in _DOWN_STATUSES - accepted:
            raise _DownError(response)
        return response

    def _show_breaker(self, _name: str, kind: str, event: Any) -> None:
        if kind != "state_changed":
            return
        self._open.set(1 if event.state == "opened" else 0)
        if event.state != "half-opened":
            log.warning("calls are held back" if event.state == "opened" else "calls pass again", target=self._target)
