"""Who may do what: recognising API keys, roles, the audit trail, and how fast an owner may submit.

A key that storage has verified is trusted for some seconds, so that a submission costs no look-up; a revoked key therefore
works for at most that long elsewhere. Nothing that is not the caller's own is ever shown to exist.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute, WindowStats
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from crucible import logs
from crucible.auth import Principal, split_key
from crucible.contracts import ApiKey, Role
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from limits import RateLimitItem
    from pydantic import SecretStr

    from crucible.clients import StorageClient
    from crucible.settings import BrokerSettings, Settings

log = logs.get_logger("access")

_KEYS_CACHED = 4096
# Refusals are remembered too, or a client with a wrong key would ask storage each time; more briefly, since they may be mended.
_REFUSAL_SECONDS = 2.0
# Redis answers within a few milliseconds, or is taken for away: a submission does not wait for a counter.
_SHARED_SECONDS = 0.5

_bearer = HTTPBearer(
    scheme_name="apiKey",
    bearerFormat="crk_<id>_<secret>",
    description="An API key. `crucible up` prints one; an admin makes more at `POST /v1/keys`.",
    auto_error=False,
)


class KeyRing:
    """Recognises API keys, asking storage at most once per key and cache time."""

    def __init__(self, storage: StorageClient, cache_seconds: float) -> None:
        self._storage = storage
        self._cache_seconds = cache_seconds
        self._known: OrderedDict[tuple[str, str], tuple[ApiKey, float]] = OrderedDict()
        self._refused: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def recognise(self, key: str) -> Principal:
        """Return whom a key belongs to.

        Raises:
            ProblemError: 401, without a word on what is wrong with the key.
        """
        parts = split_key(key)
        if parts is None:
            raise ProblemError("unauthenticated", "the key does not have the form crk_<id>_<secret>")
        found = self._cached(parts) or await self._look_up(parts)
        if found is None or (found.expires_at is not None and found.expires_at <= datetime.now(UTC)):
            raise ProblemError("unauthenticated", "the key is unknown, expired or revoked")
        return Principal(owner=found.owner, role=found.role, key_id=found.key_id)

    def _cached(self, parts: tuple[str, str]) -> ApiKey | None:
        known = self._known.get(parts)
        return known[0] if known is not None and known[1] > time.monotonic() else None

    async def _look_up(self, parts: tuple[str, str]) -> ApiKey | None:
        now = time.monotonic()
        if self._refused.get(parts, 0.0) > now:
            return None
        found = await self._storage.find_key(*parts)
        if found is None:
            self._refused[parts] = now + min(_REFUSAL_SECONDS, self._cache_seconds)
            self._known.pop(parts, None)
            _trim(self._refused)
        else:
            self._known[parts] = (found, now + self._cache_seconds)
            self._known.move_to_end(parts)
            _trim(self._known)
        return found

    def forget(self, key_id: str) -> None:
        """Stop trusting a key at once: it was revoked here."""
        for parts in [parts for parts in self._known if parts[0] == key_id]:
            del self._known[parts]


def _trim(cache: OrderedDict[tuple[str, str], Any]) -> None:
    while len(cache) > _KEYS_CACHED:
        cache.popitem(last=False)


async def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    """Return the caller; a dependency."""
    if credentials is None or credentials.scheme.lower() != "bearer":
        raise ProblemError("unauthenticated", "there is no `Authorization: Bearer <key>` header")
    ring: KeyRing = request.app.state.api.keys
    return await ring.recognise(credentials.credentials)


def _needs(role: Role) -> Callable[[Principal], Awaitable[Principal]]:
    async def check(who: Annotated[Principal, Depends(authenticate)]) -> Principal:
        if not who.role.covers(role):
            raise ProblemError("forbidden", f"this needs the role {role}; the key has {who.role}")
        return who

    return check


Caller = Annotated[Principal, Depends(authenticate)]
Admin = Annotated[Principal, Depends(_needs(Role.ADMIN))]


def sees_all(who: Principal) -> bool:
    """Whether the caller may see other owners' evaluations."""
    return who.role.covers(Role.OPERATOR)


def scope_of(who: Principal, owner: str | None) -> str | None:
    """Return whose evaluations a query is about: the caller's own, or for an operator anyone's (None: everyone's).

    Raises:
        ProblemError: 403, a submitter named another owner.
    """
    if sees_all(who):
        return owner
    if owner not in (None, who.owner):
        raise ProblemError("forbidden", f"to see other owners' evaluations needs the role {Role.OPERATOR}")
    return who.owner


def audit(who: Principal, action: str, **target: str | float | bool | None) -> None:
    """Write to the log that an operator or admin did something to what is not their own."""
    log.info("audit", action=action, actor=who.owner, role=str(who.role), key_id=who.key_id, **target)


class SubmissionRate:
    """How fast each owner may submit: counted in Redis for all replicas together, or by this process where there is no Redis.

    While Redis is away this process counts by itself too: a limit that is shared out wrongly for a while is better than no submissions.
    """

    def __init__(self, settings: Settings) -> None:
        # Counted over a minute, so that short bursts pass; a counter per owner, not an entry per submission.
        self._item = RateLimitItemPerMinute(max(1, round(settings.api.rate_per_second * 60)))
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared = _Shared(settings.redis_url, settings.broker) if settings.redis_url else None

    async def take(self, owner: str, submissions: int) -> None:
        """Count submissions.

        Raises:
            ProblemError: 429 with Retry-After; none of them is counted.
        """
        refused_until = await self._shared.hit(self._item, owner, submissions) if self._shared else None
        if refused_until is None:
            refused_until = await _hit(self._own, self._item, owner, submissions)
        if refused_until is _TAKEN:
            return
        raise ProblemError(
            "rate-limited",
            f"more than {self._item.amount} submissions in a minute",
            retry_after=max(1, math.ceil(refused_until.reset_time - time.time())),
            limit=self._item.amount,
            remaining=refused_until.remaining,
        )

    async def aclose(self) -> None:
        """Let go of Redis."""
        if self._shared:
            await self._shared.aclose()


_TAKEN = WindowStats(0.0, 0)


async def _hit(
    limiter: SlidingWindowCounterRateLimiter, item: RateLimitItem, owner: str, submissions: int
) -> WindowStats:
    """Count, and return `_TAKEN`, or when there will be room again."""
    if await limiter.hit(item, owner, cost=submissions):
        return _TAKEN
    return await limiter.get_window_stats(item, owner)


class _Shared:
    """The counters in Redis."""

    def __init__(self, url: SecretStr, settings: BrokerSettings) -> None:
        # Only an installation with a Redis has its client.
        from crucible.streams.connection import connect  # noqa: PLC0415
        from crucible.streams.outage import Outage  # noqa: PLC0415

        self._client = connect(url, settings)
        self._limiter = SlidingWindowCounterRateLimiter(
            RedisStorage(
                "async+redis://",
                implementation="redispy",
                key_prefix="crucible:rate",
                connection_pool=self._client.connection_pool,
            )
        )
        self._outage = Outage("rate", "Redis does not count submissions; each replica counts its own")

    async def hit(self, item: RateLimitItem, owner: str, submissions: int) -> WindowStats | None:
        """Return what `_hit` does; None if Redis does not answer now."""
        from crucible.streams.connection import stream_errors  # noqa: PLC0415 - as above
        from crucible.streams.errors import StreamError  # noqa: PLC0415

        if self._outage.seconds_left:
            return None
        try:
            with stream_errors():
                async with asyncio.timeout(_SHARED_SECONDS):
                    found = await _hit(self._limiter, item, owner, submissions)
        except StreamError as error:
            self._outage.failed(error)
            return None
        self._outage.ended()
        return found

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
