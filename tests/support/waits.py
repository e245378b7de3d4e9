"""The one way a test waits: ask until it is true, or say clearly what did not happen.

A fixed pause is either too short on a busy machine or too long on an idle one. `wait_until` and `wait_until_async` poll a
condition against a deadline; `wait_for` waits for evaluations, follows the platform's event stream and is as patient as the
cluster deserves (`patience.py`). All fail with what was awaited, how long, and what was last seen. Nothing outside
`tests/support` may sleep (`make lint` checks).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import httpx

from crucible.evaluation import State
from tests.support.patience import Cluster, FixedPatience, Patience

if TYPE_CHECKING:
    from tests.support.platform import Client

T = TypeVar("T")

POLL_SECONDS = 0.02
# The longest that one question to the API may take to be answered.
LONG_POLL_SECONDS = 20.0
# An event may be lost on its way, so everything is looked at this often, whatever is told.
LOOK_SECONDS = 15.0
RECONNECT_SECONDS = 0.5
# How long a simple wait for an evaluation lasts.
SIMPLE_SECONDS = 30.0
BASELINE_LIMIT_SECONDS = 60.0


class WaitTimeoutError(AssertionError):
    """What a test waited for did not come about; an assertion error, since the awaited behaviour is what failed."""


class _Deadline:
    """Counts the time and remembers the last answer, for both the waiting styles below."""

    def __init__(
        self, timeout: float, describe: str, clock: Callable[[], float], tolerate: tuple[type[Exception], ...]
    ):
        self.tolerate = tolerate
        self._describe = describe
        self._clock = clock
        self._started = clock()
        self._timeout = timeout
        self._last = "was never asked"

    def note(self, value: object) -> None:
        self._last = f"was {value!r}"

    def note_error(self, error: Exception) -> None:
        self._last = f"raised {type(error).__name__}: {error}"

    def check(self) -> None:
        waited = self._clock() - self._started
        if waited >= self._timeout:
            raise WaitTimeoutError(f"waited {waited:.1f} s for {self._describe}; at last the condition {self._last}")


def wait_until(
    predicate: Callable[[], T],
    *,
    timeout: float,
    describe: str,
    poll: float = POLL_SECONDS,
    tolerate: tuple[type[Exception], ...] = (),
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,  # noqa: TID251 - the place that everything else is sent to
) -> T:
    """Ask `predicate` every `poll` seconds until its answer is true, and return that answer.

    It is always asked at least once, and once more at the deadline. `describe` completes the sentence "waited 5.0 s
    for ...".

    Args:
        predicate: the condition; any true value ends the wait.
        timeout: seconds until the wait fails.
        describe: what is awaited, for the failure text.
        poll: seconds between two questions.
        tolerate: exceptions that mean "not yet"; any other ends the wait at once.
        clock: the monotonic clock, in seconds.
        pause: what passes the time between two questions.

    Raises:
        WaitTimeoutError: the condition was still false after `timeout` seconds.
    """
    deadline = _Deadline(timeout, describe, clock, tolerate)
    while True:
        try:
            value = predicate()
        except deadline.tolerate as error:
            deadline.note_error(error)
        else:
            if value:
                return value
            deadline.note(value)
        deadline.check()
        pause(poll)


async def wait_until_async(
    predicate: Callable[[], Awaitable[T] | T],
    *,
    timeout: float,  # noqa: ASYNC109 - the failure must say what was awaited, which asyncio.timeout cannot
    describe: str,
    poll: float = POLL_SECONDS,
    tolerate: tuple[type[Exception], ...] = (),
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """`wait_until` for a running event loop; `predicate` may be a plain or a coroutine function."""
    deadline = _Deadline(timeout, describe, clock, tolerate)
    while True:
        try:
            answer = predicate()
            value: T = await answer if inspect.isawaitable(answer) else answer
        except deadline.tolerate as error:
            deadline.note_error(error)
        else:
            if value:
                return value
            deadline.note(value)
        deadline.check()
        await pause(poll)


async def pass_time(seconds: float) -> None:
    """Let time pass for its own sake: to choose a moment at random, or to give what must not happen its chance."""
    await asyncio.sleep(seconds)


# --- waiting for evaluations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """One thing that happened to an evaluation, and when it became true."""

    type: str
    at: datetime


@dataclass(frozen=True)
class WaitResult:
    """How an evaluation ended: its final state, how long this wait took for it (seconds), what happened to it, and its view."""

    evaluation_id: str
    status: str
    duration: float
    timeline: list[Moment]
    result: dict[str, Any]


class News(Protocol):
    """What tells a wait when to look again."""

    async def next(self, outstanding: Sequence[str], seconds: float) -> Collection[str] | None:
        """Return which evaluations something was told of within so many seconds; None: it is not known, look at all."""


class AskingNews:
    """Asks the API, which answers when the first evaluation that is outstanding ends."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def next(self, outstanding: Sequence[str], seconds: float) -> Collection[str] | None:
        """Wait for the end of the first of them."""
        await self._client.get(outstanding[0], wait=max(0.0, min(seconds, LONG_POLL_SECONDS)))
        return None


class StreamNews:
    """Follows the platform's events of all evaluations; where the stream breaks off, it says that all must be looked at."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: set[str] = set()
        self._lost = False
        self._news = asyncio.Event()
        self.opened = asyncio.Event()

    async def follow(self) -> None:
        """Read the stream until cancelled, and open it again whenever it ends."""
        while True:
            with suppress(httpx.HTTPError):
                await self._read()
            self._lost = True
            self._news.set()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _read(self) -> None:
        headers = {"Accept": "text/event-stream"}
        async with self._client.http.stream("GET", "/v1/events", headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                # The first line comes once the stream misses nothing any more.
                self.opened.set()
                if line.startswith("data:"):
                    self._told.add(json.loads(line.removeprefix("data:"))["evaluation_id"])
                    self._news.set()

    async def next(self, outstanding: Sequence[str], seconds: float) -> Collection[str] | None:
        """Wait for an event."""
        try:
            async with asyncio.timeout(max(0.0, min(seconds, LOOK_SECONDS))):
                await self._news.wait()
        except TimeoutError:
            return None
        told, lost = self._told, self._lost
        self._told, self._lost = set(), False
        self._news.clear()
        return None if lost else told


@asynccontextmanager
async def stream_news(client: Client) -> AsyncIterator[StreamNews]:
    """Follow the events for as long as the context is open; from its beginning on nothing is missed."""
    news = StreamNews(client)
    following = asyncio.create_task(news.follow())
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            await news.opened.wait()
        yield news
    finally:
        following.cancel()
        await asyncio.wait([following])


@overload
async def wait_for(
    client: Client,
    evaluation_ids: str,
    *,
    simple: bool = ...,
    seconds: float | None = ...,
    patience: Patience | None = ...,
    news: News | None = ...,
    clock: Callable[[], float] = ...,
) -> WaitResult: ...


@overload
async def wait_for(
    client: Client,
    evaluation_ids: list[str],
    *,
    simple: bool = ...,
    seconds: float | None = ...,
    patience: Patience | None = ...,
    news: News | None = ...,
    clock: Callable[[], float] = ...,
) -> list[WaitResult]: ...


async def wait_for(
    client: Client,
    evaluation_ids: str | list[str],
    *,
    simple: bool = False,
    seconds: float | None = None,
    patience: Patience | None = None,
    news: News | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> WaitResult | list[WaitResult]:
    """Wait for the end of one evaluation, or of many, and say how each ended, in the order in which they were given.

    Args:
        client: the platform.
        evaluation_ids: one id, or several.
        simple: wait `seconds` (by default 30) and no longer, asking the API and not its event stream.
        seconds: with `simple`, the limit; otherwise the limit beyond which not even progress prolongs the wait.
        patience: how long to wait; by default judged by the capacity that the API tells.
        news: what says when to look again; by default the event stream, or with `simple` the API's long poll.
        clock: the monotonic clock, seconds.

    Raises:
        WaitTimeoutError: one of them had not ended when patience was.
    """
    ids = [evaluation_ids] if isinstance(evaluation_ids, str) else evaluation_ids
    if patience is None:
        patience = FixedPatience(seconds or SIMPLE_SECONDS) if simple else await _judge(client, seconds)
    if news is None and not simple:
        async with stream_news(client) as stream:
            found = await _wait_for(client, ids, patience, stream, clock)
    else:
        found = await _wait_for(client, ids, patience, news or AskingNews(client), clock)
    return found[evaluation_ids] if isinstance(evaluation_ids, str) else [found[one] for one in ids]


async def _judge(client: Client, limit: float | None) -> Patience:
    cluster = await _capacity(client)
    return Patience(cluster) if limit is None else Patience(cluster, limit_seconds=limit)


async def _capacity(client: Client) -> Cluster | None:
    response = await client.http.get("/v1/capacity")
    return Cluster.from_capacity(response.json()) if response.status_code == httpx.codes.OK else None


async def calibrated(client: Client, *, clock: Callable[[], float] = time.monotonic) -> Patience:
    """Run a trivial evaluation, and return the patience that a cluster deserves which takes as long for it as this one just did."""
    started = clock()
    submitted = await client.submit("print('baseline')")
    await wait_for(client, submitted["id"], simple=True, seconds=BASELINE_LIMIT_SECONDS, clock=clock)
    return Patience(await _capacity(client), baseline_seconds=clock() - started)


async def _wait_for(
    client: Client, ids: list[str], patience: Patience, news: News, clock: Callable[[], float]
) -> dict[str, WaitResult]:
    started = clock()
    patience.begin(len(ids), started)
    outstanding = dict.fromkeys(ids, "not seen")
    ended: dict[str, WaitResult] = {}
    told: Collection[str] | None = None
    while True:
        for one in [one for one in outstanding if told is None or one in told]:
            view = await client.get(one)
            if State(view["state"]).terminal:
                del outstanding[one]
                ended[one] = WaitResult(one, view["state"], clock() - started, await _timeline(client, one), view)
                patience.moved(clock())
            else:
                outstanding[one] = view["state"]
        if not outstanding:
            return ended
        left = patience.left(clock())
        if left <= 0:
            raise WaitTimeoutError(
                f"waited {clock() - started:.1f} s for {len(outstanding)} of {len(ids)} evaluations to end; at last "
                + ", ".join(f"{one} was {state}" for one, state in list(outstanding.items())[:10])
                + f" ({patience.explain(len(ids))})"
            )
        told = await news.next(list(outstanding), left)


async def _timeline(client: Client, evaluation_id: str) -> list[Moment]:
    response = await client.http.get(f"/v1/evaluations/{evaluation_id}/events")
    assert response.status_code == httpx.codes.OK, response.text
    return [Moment(event["type"], datetime.fromisoformat(event["at"])) for event in response.json()["events"]]
