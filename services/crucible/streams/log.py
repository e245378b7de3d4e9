"""The writing end: adds events to the stream and publishes them on their channels. Only the relay that holds the lock appends."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from crucible import metrics
from crucible.streams.connection import ANSWER_SECONDS, connect, stream_errors
from crucible.streams.contract import ENTRY, STREAM, channel, encode, entry
from crucible.streams.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import SecretStr

    from crucible.events import Event
    from crucible.settings import BrokerSettings, EventSettings

_APPEND = (Path(__file__).parent / "append.lua").read_text()
# Longest that one call may take, however slowly the answer drips in.
_CALL_SECONDS = 3 * ANSWER_SECONDS
# What was appended last is looked for among this many; more than one batch, and than transactions overtake each other by.
_TAIL = 2000
# Evaluations whose output may be hinted at once; more tell nobody anything that the next hint would not.
_HINTS_HELD = 10_000
# After a failure hints are dropped for this long, so that output never waits for a Redis that is away.
_HINTS_PAUSE_S = 1.0


class EventLog:
    """The stream `crucible:events` and the channels `evaluation:<type>`, as storage writes them.

    Whoever makes it closes it with `aclose`. Every call that speaks to Redis is bounded in time and raises `StreamError`.
    """

    def __init__(self, redis_url: SecretStr | str, settings: EventSettings, broker: BrokerSettings) -> None:
        self.length = settings.stream_length
        self._redis = connect(redis_url, broker)
        self._last: str | None = None
        self._hints: dict[str, Event] = {}
        self._hinting: asyncio.Task[None] | None = None
        self._hints_from = 0.0

    # -- what is kept

    @property
    def placed(self) -> bool:
        """Whether it knows the entry that was added last."""
        return self._last is not None

    def forget(self) -> None:
        """Forget which entry was added last: someone else may have added since, or it is known to be gone."""
        self._last = None

    async def has_lost(self, newest: tuple[str, int] | None) -> bool:
        """Whether the stream lacks what was appended last, because Redis lost its data or fell back to an older state.

        Args:
            newest: (`evaluation_id`, `seq`) of the newest event that was ever appended, which is looked for while no entry
                is known; None if there was none.
        """
        with stream_errors():
            async with asyncio.timeout(_CALL_SECONDS):
                if self._last is not None:
                    return not await self._redis.xrange(STREAM, self._last, self._last, count=1)
                if newest is None:
                    return False
                tail = await self._redis.xrevrange(STREAM, count=_TAIL)
        evaluation_id, seq = newest
        found = any((fields.get("evaluation_id"), fields.get("seq")) == (evaluation_id, str(seq)) for _, fields in tail)
        if found:
            self._last = tail[0][0]
        return not found

    async def append(self, events: Sequence[Event]) -> bool:
        """Add events in their order, all or none, and publish each on its channel. The oldest beyond the length are trimmed.

        Returns:
            False if nothing was added because the stream lacks what was appended last, as `has_lost` says.
        """
        args: list[str | int] = [self._last or "", self.length]
        for event in events:
            fields = entry(event)
            args += [channel(event.type), *(fields[name] for name in ENTRY)]
        with stream_errors():
            async with asyncio.timeout(_CALL_SECONDS):
                last = await self._redis.eval(_APPEND, 1, STREAM, *args)
        if last is None:
            return False
        self._last = last
        metrics.EVENT_STREAM_APPENDED.inc(len(events))
        return True

    async def measure(self) -> None:
        """Feed the metrics of the stream and its groups."""
        with stream_errors():
            async with asyncio.timeout(_CALL_SECONDS):
                length = await self._redis.xlen(STREAM)
                groups = await self._redis.xinfo_groups(STREAM) if length else []
        metrics.EVENT_STREAM_ENTRIES.set(length)
        # Groups come and go; one that is gone must not look like one that keeps up.
        metrics.EVENT_STREAM_LAG.clear()
        metrics.EVENT_STREAM_PENDING.clear()
        for group in groups:
            if group["lag"] is not None:
                metrics.EVENT_STREAM_LAG.labels(group["name"]).set(group["lag"])
            metrics.EVENT_STREAM_PENDING.labels(group["name"]).set(group["pending"])

    # -- what is only said

    def publish(self, event: Event) -> None:
        """Say something on its channel alone, soon and if possible. Never blocks; of one evaluation only the latest is said."""
        if time.monotonic() < self._hints_from or (
            len(self._hints) >= _HINTS_HELD and event.evaluation_id not in self._hints
        ):
            return
        self._hints[event.evaluation_id] = event
        if self._hinting is None:
            self._hinting = asyncio.create_task(self._say_hints(), name="event-hints")

    async def _say_hints(self) -> None:
        try:
            while self._hints:
                events, self._hints = list(self._hints.values()), {}
                with stream_errors():
                    async with asyncio.timeout(_CALL_SECONDS), self._redis.pipeline(transaction=False) as pipeline:
                        for event in events:
                            pipeline.publish(channel(event.type), encode(event))
                        await pipeline.execute()
        except StreamError:
            # The relay, which needs Redis more, is who says that it is away.
            self._hints.clear()
            self._hints_from = time.monotonic() + _HINTS_PAUSE_S
        finally:
            self._hinting = None

    async def aclose(self) -> None:
        """Close the connections. What was only to be said is not said any more."""
        if self._hinting is not None:
            self._hinting.cancel()
            with suppress(asyncio.CancelledError):
                await self._hinting
        await self._redis.aclose()
