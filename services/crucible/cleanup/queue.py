"""Keys that are to be looked at: urgent ones first, each by one worker at a time, again after a pause that grows."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")

_PAUSE_FIRST_S = 0.25
_PAUSE_MAX_S = 15.0


class WorkQueue(Generic[K]):
    """`add` what has changed, `get` what to look at, and say `done` or `retry` of each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[K, tuple[bool, float]] = {}
        self._active: set[K] = set()
        self._again: set[K] = set()
        self._pauses: dict[K, float] = {}
        self._changed = asyncio.Event()
        # Set while nothing is waiting, paused or being looked at.
        self.empty = asyncio.Event()
        self.empty.set()

    def add(self, key: K, *, urgent: bool = True) -> None:
        """Have a key that has changed looked at now; once more afterwards if that is just being done. Its pauses begin anew."""
        self._pauses.pop(key, None)
        if key in self._active:
            self._again.add(key)
            return
        self._put(key, urgent, self._clock())

    def _put(self, key: K, urgent: bool, due: float) -> None:
        known = self._due.get(key)
        self._due[key] = (urgent or known[0], min(due, known[1])) if known else (urgent, due)
        self._changed.set()
        self.empty.clear()

    async def get(self) -> K:
        """Wait for a key that is due, and take it."""
        while True:
            now = self._clock()
            ready = [(not urgent, due, key) for key, (urgent, due) in self._due.items() if due <= now]
            if ready:
                key = min(ready, key=lambda entry: entry[:2])[2]
                del self._due[key]
                self._active.add(key)
                return key
            self._changed.clear()
            soonest = min((due for _, due in self._due.values()), default=None)
            try:
                async with asyncio.timeout(None if soonest is None else soonest - now):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """Give a key back: there is nothing more to do, unless it has changed meanwhile."""
        self._pauses.pop(key, None)
        self._release(key)

    def retry(self, key: K) -> None:
        """Give a key back to be looked at again: after a pause, or at once if it has changed meanwhile."""
        if key not in self._again:
            pause = self._pauses.get(key, _PAUSE_FIRST_S)
            self._pauses[key] = min(pause * 2, _PAUSE_MAX_S)
            self._put(key, urgent=True, due=self._clock() + pause)
        self._release(key)

    def _release(self, key: K) -> None:
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        if not self._due and not self._active:
            self.empty.set()
