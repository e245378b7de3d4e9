"""How one service calls another: bounded in time, tried again when that can help, and not at all while the other is down.

Retries (stamina: exponential, jittered, capped) are only for failures that may pass: no connection, a time-out of a call that
may be repeated, and the statuses of `RETRYABLE_STATUSES`. A circuit breaker (purgatory) opens after repeated failures, so that a dead
service costs its callers an immediate error and not a time-out each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import stamina
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from crucible import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

# 408 and 425 ask for another try by definition (RFC 9110, RFC 8470); 429 and the rest may pass by themselves.
RETRYABLE_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
_ATTEMPTS = 5
_WAIT_INITIAL_S = 0.05
_WAIT_MAX_S = 2.0
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
        kind = self.problem.get("type", "")
        return kind.rsplit("/", 1)[-1] if kind else None


class _TransientError(Exception):
    def __init__(self, cause: CallFailedError) -> None:
        super().__init__(str(cause))
        self.cause = cause


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
    """Calls one named service over a given httpx client."""

    def __init__(self, target: str, client: httpx.AsyncClient, *, attempts: int = _ATTEMPTS) -> None:
        self._target = target
        self._client = client
        self._attempts = attempts
        self._breakers = AsyncCircuitBreakerFactory(default_threshold=_BREAKER_THRESHOLD, default_ttl=_BREAKER_SECONDS)

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
            CallFailedError: no usable answer within all attempts, or a failure that trying again cannot help.
        """
        accepted = frozenset(ok)
        try:
            async for attempt in stamina.retry_context(
                on=_TransientError,
                attempts=self._attempts,
                timeout=None,
                wait_initial=_WAIT_INITIAL_S,
                wait_max=_WAIT_MAX_S,
                wait_jitter=_WAIT_INITIAL_S,
            ):
                with attempt:
                    if attempt.num > 1:
                        metrics.CALL_RETRIES.labels(self._target).inc()
                    return await self._once(method, path, accepted, idempotent=idempotent, **kwargs)
        except _TransientError as error:
            raise error.cause from error.__cause__
        raise AssertionError("unreachable: the retry context returns or raises")

    async def _once(
        self, method: str, path: str, accepted: frozenset[int], *, idempotent: bool, **kwargs: Any
    ) -> httpx.Response:
        breaker = await self._breakers.get_breaker(self._target)
        try:
            async with breaker:
                response = await self._client.request(method, path, **kwargs)
                if response.status_code in (502, 503, 504) and response.status_code not in accepted:
                    raise _TransientError(_failure(self._target, response))
        except OpenedState as error:
            metrics.BREAKER_OPEN.labels(self._target).set(1)
            raise _TransientError(
                CallFailedError(self._target, "is not answering; calls are held back for a moment", status=503)
            ) from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _TransientError(CallFailedError(self._target, f"no connection: {error}")) from error
        except httpx.HTTPError as error:
            failed = CallFailedError(self._target, f"{type(error).__name__}: {error}")
            raise (_TransientError(failed) if idempotent else failed) from error
        metrics.BREAKER_OPEN.labels(self._target).set(0)
        if response.status_code in accepted:
            return response
        failed = _failure(self._target, response)
        raise _TransientError(failed) if response.status_code in RETRYABLE_STATUSES else failed
