"""Waking those who wait for work: at once within this process, through LISTEN/NOTIFY for other instances.

A NOTIFY within the submitting transaction would make commits wait for each other (PostgreSQL orders notifications with a lock held
through the commit), so it is sent after it, a few milliseconds' worth at a time. A bell that is lost costs a waiting worker one
poll interval and nothing else: the table is the truth.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crucible import logs
from crucible.limits import SizeClass
from crucible.storage.engine import connect
from crucible.storage.loops import keep_trying

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logs.get_logger("storage.bell")

CHANNEL = "crucible_queue"
_GATHER_S = 0.01
_CHECK_S = 5.0


class Bell:
    """Rings for size classes; those who listen for one of them wake."""

    def __init__(self, url: str, instance: str) -> None:
        self._url = url
        self._instance = instance
        self._listeners: dict[SizeClass, set[asyncio.Event]] = {size: set() for size in SizeClass}
        self._untold: set[SizeClass] = set()
        self._something_untold = asyncio.Event()

    @contextmanager
    def listen(self, sizes: Iterable[SizeClass]) -> Iterator[asyncio.Event]:
        """Give an event that is set by the next ring for one of `sizes`."""
        event = asyncio.Event()
        chosen = list(sizes)
        for size in chosen:
            self._listeners[size].add(event)
        try:
            yield event
        finally:
            for size in chosen:
                self._listeners[size].discard(event)

    def ring(self, sizes: Iterable[SizeClass]) -> None:
        """There is new work of these size classes: wake listeners here now, and those of other instances soon."""
        chosen = set(sizes)
        self.ring_here(chosen)
        self._untold |= chosen
        self._something_untold.set()

    def ring_here(self, sizes: Iterable[SizeClass]) -> None:
        """Wake listeners of this process only."""
        for size in sizes:
            for event in self._listeners[size]:
                event.set()

    def _heard(self, _connection: object, _pid: object, _channel: object, payload: object) -> None:
        sender, _, sizes = str(payload).partition(" ")
        if sender != self._instance:
            self.ring_here(size for size in SizeClass if size in sizes.split(","))

    async def run(self) -> None:
        """Listen to and tell other instances, for ever."""
        await keep_trying("bell", self._session)

    async def _session(self) -> None:
        async with connect(self._url) as connection:
            await connection.add_listener(CHANNEL, self._heard)
            # Whatever was rung while nothing listened here was missed.
            self.ring_here(SizeClass)
            while True:
                try:
                    async with asyncio.timeout(_CHECK_S):
                        await self._something_untold.wait()
                except TimeoutError:
                    # Nothing was rung: find out whether the connection still lives.
                    await connection.execute("SELECT 1")
                    continue
                self._something_untold.clear()
                sizes, self._untold = self._untold, set()
                await connection.execute(
                    "SELECT pg_notify($1, $2)", CHANNEL, f"{self._instance} {','.join(sorted(sizes))}"
                )
                await asyncio.sleep(_GATHER_S)
