"""What the settings ask for. Imports the Redis client only where they name a Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crucible.settings import Settings
    from crucible.streams.bus import StreamBus
    from crucible.streams.log import EventLog


def make_event_log(settings: Settings) -> EventLog | None:
    """Return the writing end, for the process that has storage; None without a Redis. To be closed after storage.

    Raises:
        SettingsError: the URL is none of Redis.
    """
    if settings.redis_url is None:
        return None
    from crucible.streams.log import EventLog  # noqa: PLC0415 - only where it is used

    return EventLog(settings.redis_url, settings.events, settings.broker)


def make_bus(settings: Settings) -> StreamBus | None:
    """Return the feed for a process without storage, to be started and closed; None without a Redis.

    Raises:
        SettingsError: the URL is none of Redis.
    """
    if settings.redis_url is None:
        return None
    from crucible.streams.bus import StreamBus  # noqa: PLC0415 - only where it is used

    return StreamBus(settings.redis_url, settings.broker)
