"""The storage service as an object: its parts, put together, started and stopped."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from crucible import logs
from crucible.events import FanOut
from crucible.storage.attempts import Attempts
from crucible.storage.bell import Bell
from crucible.storage.dead_letters import DeadLetters
from crucible.storage.engine import Database
from crucible.storage.hints import Hints
from crucible.storage.keys import Keys
from crucible.storage.loops import every
from crucible.storage.migrate import migrate
from crucible.storage.objects import ObjectStore
from crucible.storage.output import Outputs
from crucible.storage.queue import Queue
from crucible.storage.reading import Reading
from crucible.storage.relay import Relay
from crucible.storage.route import Route
from crucible.storage.submission import Submissions
from crucible.storage.transitions import Lifecycle
from crucible.storage.upkeep import Upkeep

if TYPE_CHECKING:
    from pathlib import Path

    from crucible.events import EventBus
    from crucible.health import Health
    from crucible.limits import Limits, SizeClass
    from crucible.settings import StorageSettings
    from crucible.storage.hints import Brokers
    from crucible.streams.log import EventLog

log = logs.get_logger("storage")

# Well below the 15 s at which Prometheus commonly scrapes.
_GAUGE_S = 5.0


class Storage:
    """The owner of PostgreSQL and the object store. Each attribute is one concern; `crucible.storage.app` puts them on HTTP."""

    def __init__(
        self,
        settings: StorageSettings,
        limits: Limits,
        bus: EventBus,
        *,
        database_url: str,
        data_dir: Path,
        instance: str,
        event_log: EventLog | None = None,
        brokers: Brokers | None = None,
    ) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self.database = Database(database_url, settings.pool_size)
        self.relay = Relay(database_url, bus, event_log)
        self.bell = Bell(database_url, instance)
        self.objects = ObjectStore(self.database, settings, data_dir)
        lifecycle = Lifecycle(self.database, self.relay.wake)
        self.submissions = Submissions(self.database, self._queued)
        self.outputs = Outputs(self.database, self.objects, FanOut(bus, event_log) if event_log else bus, limits)
        self.attempts = Attempts(self.database, lifecycle, self.outputs, self.bell, settings)
        self.queue = Queue(
            self.database,
            lifecycle,
            self.bell,
            self.attempts.give_back,
            instance=instance,
            lease_seconds=settings.lease_seconds,
        )
        self.hints = Hints(brokers, self.database, self.bell) if brokers else None
        self.route = Route(self.database, self.hints.lanes if self.hints else {})
        self.reading = Reading(self.database)
        self.dead_letters = DeadLetters(self.database, self.submissions)
        self.keys = Keys(self.database)
        self.upkeep = Upkeep(
            database=self.database,
            lifecycle=lifecycle,
            attempts=self.attempts,
            outputs=self.outputs,
            objects=self.objects,
            dead_letters=self.dead_letters,
            settings=settings,
        )

    def _queued(self, sizes: set[SizeClass]) -> None:
        self.relay.wake()
        self.bell.ring(sizes)

    async def start(self) -> None:
        """Migrate the database, open everything, and begin to relay and to keep house.

        Raises:
            ProblemError: `unavailable`, the database does not answer.
            MigrationError: the database's schema is not one that this version can use.
        """
        await migrate(self.database.url)
        try:
            await self.database.open()
            await self.objects.open()
            await self.submissions.open()
            await self.dead_letters.gauge()
        except BaseException:
            await self.database.close()
            raise
        loops = {"relay": self.relay.run, "bell": self.bell.run, "upkeep": self.upkeep.run, "gauge": self._gauge}
        if self.hints:
            loops["hints"] = self.hints.run
        self._tasks = [asyncio.create_task(run(), name=f"storage-{name}") for name, run in loops.items()]

    async def _gauge(self) -> None:
        async with asyncio.TaskGroup() as group:
            for gauge in (self.queue.gauge, *([self.hints.gauge] if self.hints else [])):
                group.create_task(every("gauge", _GAUGE_S, gauge))

    async def aclose(self) -> None:
        """Answer waiting claims, stop the loops and close every connection. What is not yet relayed is relayed by the next start."""
        await self.queue.aclose()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self.hints:
            await self.hints.aclose()
        await self.database.close()

    async def reclaim_foreign(self, instance: str) -> int:
        """Take back what any other instance than `instance` holds; for where only one can live. Returns how many."""
        return await self.upkeep.reclaim_foreign(instance)

    def watch(self, health: Health) -> None:
        """Register what tells whether storage can do its work now; every check reads memory only."""
        health.add("database", self.database.problem)
        health.add("relay", self.relay.heartbeat.check)
        if self.hints:
            self.hints.watch(health)
        health.add("upkeep", self.upkeep.heartbeat.check)
