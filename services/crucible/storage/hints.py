"""Telling brokers what waits: one lane per broker, so that one that is down never holds up the other.

Hints follow from the table's state and from nothing else. A row that waits, may be claimed, and of which its broker was not told at its
present priority needs a hint; submission, requeueing, aging, repair and migration only change rows. Nothing that a caller waits for
ever waits for a broker: an outage makes rows pile up here, and they are told in strict order once it is over.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crucible import metrics
from crucible.settings import SettingsError, env_name
from crucible.storage.route import Role, broker_name
from crucible.storage.tables import DUE, UNHINTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crucible.broker.urls import BrokerUrl
    from crucible.health import Health
    from crucible.settings import BrokerSettings
    from crucible.storage.bell import Bell
    from crucible.storage.engine import Database
    from crucible.storage.lane import Lane

_BACKLOG = f"""
SELECT count(*) AS waiting, coalesce(max(extract(epoch FROM now() - greatest(queued_at, retry_at)))
                                     FILTER (WHERE hint_priority IS NULL), 0)::float8 AS oldest
  FROM evaluations WHERE {UNHINTED} AND {DUE}"""  # noqa: S608 - constants


@dataclass(frozen=True)
class Brokers:
    """The brokers of this installation: the one in use, and the one that is being left, if any.

    Raises:
        SettingsError: both are the same.
    """

    new: BrokerUrl
    legacy: BrokerUrl | None
    settings: BrokerSettings

    def __post_init__(self) -> None:
        """Refuse to leave a broker for itself."""
        if self.legacy is not None and broker_name(self.new) == broker_name(self.legacy):
            raise SettingsError(f"{env_name('legacy_broker_url')}: names the same broker as {env_name('broker_url')}")


class Hints:
    """The lanes to the brokers, and what can be said about all of them together."""

    def __init__(self, brokers: Brokers, database: Database, bell: Bell) -> None:
        # kombu takes a while to load; only an installation with a broker waits for it.
        from crucible.storage.lane import Lane  # noqa: PLC0415

        self._database = database
        urls = {Role.NEW: brokers.new, Role.LEGACY: brokers.legacy}
        present = {role: url for role, url in urls.items() if url is not None}
        self.lanes: Mapping[Role, Lane] = {
            role: Lane(role, present, brokers.settings, database.url, bell) for role in present
        }

    async def run(self) -> None:
        """Keep every lane going, for ever."""
        async with asyncio.TaskGroup() as group:
            for role, lane in self.lanes.items():
                group.create_task(lane.run(), name=f"hints-{role}")

    async def aclose(self) -> None:
        """Close the connections to the brokers; to be called once `run` has been cancelled."""
        await asyncio.gather(*(lane.aclose() for lane in self.lanes.values()))

    def watch(self, health: Health) -> None:
        """Register what tells whether the lanes turn. A broker that is down is no reason to refuse submissions."""
        for role, lane in self.lanes.items():
            health.add(f"hints-{role}", lane.heartbeat.check)

    async def gauge(self) -> None:
        """Feed the metrics of what no broker has been told of yet."""
        row = await self._database.fetchrow(_BACKLOG)
        if row is not None:
            metrics.HINT_BACKLOG.set(row["waiting"])
            metrics.HINT_OLDEST.set(max(0.0, row["oldest"]))
