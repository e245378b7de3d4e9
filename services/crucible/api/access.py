"""Who may do what: recognising API keys, roles, the audit trail, and how fast an owner may submit.

A key that storage has verified is trusted for some seconds, so that a submission costs no look-up; a revoked key therefore
works for at most that long elsewhere. Nothing that is not the caller's own is ever shown to exist.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from crucible import logs
from crucible.auth import Principal, split_key
from crucible.contracts import ApiKey, Role
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.clients import StorageClient

log = logs.get_logger("access")

_KEYS_CACHED = 4096
# Refusals are remembered too, or a client with a wrong key would ask storage each time; more briefly, since they may be mended.
_REFUSAL_SECONDS = 2.0

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
    """How fast each owner may submit."""

    def __init__(self, per_second: float) -> None:
        # Counted over a minute, so that short bursts pass; a counter per owner, not an entry per submission.
        self._item = RateLimitItemPerMinute(max(1, round(per_second * 60)))
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def take(self, owner: str, submissions: int) -> None:
        """Count submissions.

        Raises:
            ProblemError: 429 with Retry-After; none of them is counted.
        """
        if await self._limiter.hit(self._item, owner, cost=submissions):
            return
        stats = await self._limiter.get_window_stats(self._item, owner)
        raise ProblemError(
            "rate-limited",
            f"more than {self._item.amount} submissions in a minute",
            retry_after=max(1, math.ceil(stats.reset_time - time.time())),
            limit=self._item.amount,
            remaining=stats.remaining,
        )
