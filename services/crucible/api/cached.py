"""The last answer of a call to another service, shared by all requests that ask for the same thing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from crucible.resilience import CallFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


class Cached(Generic[T]):
    """One value that is fetched by at most one call at a time."""

    def __init__(self, fetch: Callable[[], Awaitable[T]]) -> None:
        self._fetch = fetch
        self._value: T | None = None
        self._read_at = float("-inf")
        self._refreshing: asyncio.Task[T] | None = None

    @property
    def age(self) -> float:
        """Seconds since the value was read; infinite if it never was."""
        return time.monotonic() - self._read_at

    async def _refresh(self) -> T:
        value = await self._fetch()
        self._value, self._read_at = value, time.monotonic()
        return value

    def _start(self) -> asyncio.Task[T]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
            # A refresh that nobody awaits may fail unheard: the value only grows older, which its readers look at.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._refreshing

    async def within(self, seconds: float) -> T:
        """Return a value at most this old, fetching it if need be.

        Raises:
            CallFailedError: the other service did not answer.
        """
        if self._value is not None and self.age <= seconds:
            return self._value
        # Shielded: one caller that goes away must not take the answer from the others.
        return await asyncio.shield(self._start())

    async def glance(self, seconds: float, *, patience: float) -> T | None:
        """Return a value at most this old, or None if it cannot be had within `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                return await self.within(seconds)
        except (TimeoutError, CallFailedError):
            return None

    def known(self, *, fresh: float, usable: float) -> T | None:
        """Return the value without waiting: None if older than `usable` seconds; a refresh begins if older than `fresh`."""
        age = self.age
        if age > fresh:
            self._start()
        return self._value if age <= usable else None

    async def aclose(self) -> None:
        """End a refresh that is under way."""
        if self._refreshing is not None and not self._refreshing.done():
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
