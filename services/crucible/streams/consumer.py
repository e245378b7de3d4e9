"""A consumer of a group: each event goes to one consumer of the group, is acknowledged once handled, and comes again if it was not.

At least once, and in order per evaluation as long as one consumer of the group is alive; several share the events among them, so that
order holds only within what each of them gets. What a consumer left behind by dying is claimed by another one. What nobody can
handle is moved to a stream of dead events instead of coming back for ever.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

from redis import exceptions

from crucible import logs, metrics
from crucible.events import Lagged
from crucible.streams.connection import ANSWER_SECONDS, answer, connect, stream_errors
from crucible.streams.contract import DEAD_LENGTH, DEAD_STREAM, STREAM, MalformedEntryError, decode
from crucible.streams.errors import StreamError
from crucible.streams.outage import Outage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from crucible.events import Event
    from crucible.settings import BrokerSettings, EventSettings

log = logs.get_logger("streams.consumer")

_BLOCK_S = 2.0
# Few, since a consumer's death delays all that it was given by the time that it takes to be noticed.
_BATCH = 32
_DELIVERIES_MAX = 5
_BEGINNING = "0-0"
# Evaluations whose handled events are remembered, to tell what comes again.
_REMEMBERED = 10_000
_ERROR_CHARACTERS = 2000
# How Redis says, to one command or another, that the stream or the group does not exist any more.
_GONE = ("NOGROUP", "UNBLOCKED", "no such key")

Fields: TypeAlias = dict[str, str]
Handler: TypeAlias = "Callable[[Event | Lagged], Awaitable[None]]"


class StopConsuming(Exception):  # noqa: N818 - a wish, no error
    """Raised by a handler: end the run. The event that it was given is not acknowledged."""


class _Handled:
    """Remembers what was handled, by evaluation, for as many evaluations as fit."""

    def __init__(self) -> None:
        self._by_evaluation: OrderedDict[str, set[int]] = OrderedDict()

    def has(self, event: Event) -> bool:
        return event.seq in self._by_evaluation.get(event.evaluation_id, ())

    def is_late(self, event: Event) -> bool:
        """Whether a later event of the same evaluation was handled before."""
        return event.seq < max(self._by_evaluation.get(event.evaluation_id, ()), default=0)

    def add(self, event: Event) -> None:
        self._by_evaluation.setdefault(event.evaluation_id, set()).add(event.seq)
        self._by_evaluation.move_to_end(event.evaluation_id)
        if len(self._by_evaluation) > _REMEMBERED:
            self._by_evaluation.popitem(last=False)


class EventConsumer:
    """One consumer of a group. Names must differ within the group, and one that dies need not come back.

    Args:
        redis_url: where the stream is.
        settings: when an event that was not acknowledged goes to another consumer; also how long handling one may take.
        broker: the certificates to trust and to present.
        group: name of the group; made where it does not exist, to begin with the oldest event in the stream.
        name: name of this consumer.
        max_deliveries: an event that was delivered so often without being handled is given up.
    """

    def __init__(
        self,
        redis_url: SecretStr | str,
        settings: EventSettings,
        broker: BrokerSettings,
        *,
        group: str,
        name: str,
        max_deliveries: int = _DELIVERIES_MAX,
    ) -> None:
        self._redis = connect(redis_url, broker)
        self._idle_s = settings.claim_idle_seconds
        self._group, self._name = group, name
        self._max_deliveries = max_deliveries
        self._handled = _Handled()
        self._outage = Outage("consumer")
        self._claim_at = 0.0
        self._left = math.inf
        self._redelivered = metrics.EVENT_REDELIVERED.labels(group)
        self._out_of_order = metrics.EVENT_OUT_OF_ORDER.labels(group)
        self._dead = metrics.EVENT_DEAD.labels(group)

    async def run(self, handle: Handler, *, limit: int | None = None) -> None:
        """Hand every event to `handle`, until cancelled or `limit` events are handled; a Redis that is away is waited for.

        `handle` gets each event at least once and must not mind a repetition. `Lagged` means that events may be missing: the
        group is new, Redis lost it, or more was trimmed than was read; whoever keeps a state reads the table then. An exception
        is a failed delivery: the event comes again after `claim_idle_seconds`, to whichever consumer asks first.

        Raises:
            StopConsuming: `handle` raised it.
        """
        self._left = math.inf if limit is None else limit
        while self._left > 0:
            try:
                with stream_errors():
                    await self._join(handle)
                    while self._left > 0:
                        await self._turn(handle)
                        self._outage.ended()
            except StreamError as error:
                if any(mark in str(error) for mark in _GONE):
                    log.warning("the group is gone from Redis and is made again", group=self._group)
                    continue
                self._outage.failed(error)
                await asyncio.sleep(self._outage.seconds_left)

    async def aclose(self) -> None:
        """Leave the group, if nothing was left unhandled, and close the connections."""
        try:
            with stream_errors():
                async with asyncio.timeout(ANSWER_SECONDS):
                    mine = await self._redis.xpending_range(
                        STREAM, self._group, "-", "+", count=1, consumername=self._name
                    )
                    # Leaving would also forget what is still to be claimed by another.
                    if not mine:
                        await self._redis.xgroup_delconsumer(STREAM, self._group, self._name)
        except StreamError:
            log.debug("Redis was not told that a consumer leaves", group=self._group, consumer=self._name)
        await self._redis.aclose()

    # -- the group

    async def _join(self, handle: Handler) -> None:
        try:
            await answer(self._redis.xgroup_create(STREAM, self._group, id=_BEGINNING, mkstream=True))
        except exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
            return
        await self._tell(handle, Lagged())

    async def _turn(self, handle: Handler) -> None:
        if time.monotonic() >= self._claim_at:
            self._claim_at = time.monotonic() + self._idle_s / 2
            await self._claim(handle)
            if self._left <= 0:
                return
        if await self._was_overtaken():
            await self._tell(handle, Lagged())
        block = min(_BLOCK_S, self._idle_s / 2)
        found = await answer(
            self._redis.xreadgroup(self._group, self._name, {STREAM: ">"}, count=self._batch, block=int(block * 1000)),
            block_seconds=block,
        )
        await self._work_off([(entry_id, fields, 1) for entry_id, fields in (found[0][1] if found else [])], handle)

    async def _was_overtaken(self) -> bool:
        """Whether entries were trimmed that no consumer of the group was given. Reading goes on after them, so it is asked before."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xinfo_groups(STREAM)
            pipeline.xinfo_stream(STREAM)
            groups, stream = await answer(pipeline.execute())
        read = next((group["entries-read"] for group in groups if group["name"] == self._group), None)
        return read is not None and bool(read < stream["entries-added"] - stream["length"])

    async def _claim(self, handle: Handler) -> None:
        """Take over what was given to a consumer, perhaps this one, and was not acknowledged for long."""
        start = _BEGINNING
        while True:
            start, entries, *gone = await answer(
                self._redis.xautoclaim(
                    STREAM, self._group, self._name, int(self._idle_s * 1000), start, count=self._batch
                )
            )
            if gone and gone[0]:
                # Trimmed before it was handled.
                await self._tell(handle, Lagged())
            if entries:
                self._redelivered.inc(len(entries))
                ids = [entry_id for entry_id, _ in entries]
                pending = await answer(
                    self._redis.xpending_range(
                        STREAM, self._group, ids[0], ids[-1], count=10 * _BATCH, consumername=self._name
                    )
                )
                deliveries = {entry["message_id"]: entry["times_delivered"] for entry in pending}
                await self._work_off([(each, fields, deliveries.get(each, 1)) for each, fields in entries], handle)
            if start == _BEGINNING or self._left <= 0:
                return

    @property
    def _batch(self) -> int:
        return int(min(_BATCH, self._left))

    # -- entries

    async def _work_off(self, entries: list[tuple[str, Fields, int]], handle: Handler) -> None:
        kept_until = time.monotonic() + self._idle_s / 4
        for place, (entry_id, fields, deliveries) in enumerate(entries):
            if time.monotonic() > kept_until:
                # What waits here behind slow ones must not look abandoned.
                rest = [each for each, _, _ in entries[place:]]
                await answer(self._redis.xclaim(STREAM, self._group, self._name, 0, rest, justid=True))
                kept_until = time.monotonic() + self._idle_s / 4
            await self._deal_with(entry_id, fields, deliveries, handle)

    async def _deal_with(self, entry_id: str, fields: Fields, deliveries: int, handle: Handler) -> None:
        if deliveries > self._max_deliveries:
            await self._give_up(entry_id, fields, deliveries - 1, "no consumer acknowledged it")
            return
        try:
            event = decode(fields)
        except MalformedEntryError as error:
            await self._give_up(entry_id, fields, deliveries, str(error))
            return
        if event is not None and self._handled.has(event):
            self._redelivered.inc()
        elif event is not None:
            error_text = await self._attempt(handle, event)
            if error_text is not None:
                log.warning(
                    "an event could not be handled",
                    group=self._group,
                    evaluation_id=event.evaluation_id,
                    seq=event.seq,
                    deliveries=deliveries,
                    error=error_text,
                )
                if deliveries >= self._max_deliveries:
                    await self._give_up(entry_id, fields, deliveries, error_text)
                return
            if self._handled.is_late(event):
                self._out_of_order.inc()
            self._handled.add(event)
            self._left -= 1
        await answer(self._redis.xack(STREAM, self._group, entry_id))

    async def _attempt(self, handle: Handler, item: Event | Lagged) -> str | None:
        """Return what went wrong, if anything. Longer than until another consumer takes over, handling may not take."""
        try:
            async with asyncio.timeout(self._idle_s):
                await handle(item)
        except StopConsuming:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is a failed delivery
            return f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
        return None

    async def _tell(self, handle: Handler, mark: Lagged) -> None:
        error_text = await self._attempt(handle, mark)
        if error_text is not None:
            log.warning(
                "a consumer could not take note that events may be missing", group=self._group, error=error_text
            )

    async def _give_up(self, entry_id: str, fields: Fields, deliveries: int, error: str) -> None:
        dead = {
            "event": fields.get("event", ""),
            "entry_id": entry_id,
            "group": self._group,
            "consumer": self._name,
            "deliveries": str(deliveries),
            "error": error,
        }
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xadd(DEAD_STREAM, dead, maxlen=DEAD_LENGTH, approximate=True)
            pipeline.xack(STREAM, self._group, entry_id)
            await answer(pipeline.execute())
        self._dead.inc()
        log.error("an event was given up", group=self._group, entry_id=entry_id, deliveries=deliveries, error=error)
