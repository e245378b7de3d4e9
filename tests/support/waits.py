"""The one way a test waits: ask until it is true, or say clearly what did not happen.

A fixed pause is either too short on a busy machine or too long on an idle one. These helpers poll a condition against a
deadline and fail with what was awaited, how long, and what was last seen. Nothing outside `tests/support` may sleep
(`make lint` checks).
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


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
