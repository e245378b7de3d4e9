"""The waiting helpers themselves, on a clock of their own so that nothing here takes time."""

from __future__ import annotations

import pytest

from tests.support.waits import WaitTimeoutError, wait_until, wait_until_async

pytestmark = pytest.mark.unit


class ManualClock:
    """Time that passes only while someone pauses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def pause_async(self, seconds: float) -> None:
        self.pause(seconds)


def answers(*values: object):
    remaining = list(values)
    return lambda: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def test_a_true_condition_returns_its_value_without_pausing():
    clock = ManualClock()
    assert wait_until(lambda: "ready", timeout=5, describe="readiness", clock=clock, pause=clock.pause) == "ready"
    assert clock.pauses == []


def test_a_condition_is_asked_again_until_it_holds():
    clock = ManualClock()
    condition = answers(None, 0, [], 7)
    assert wait_until(condition, timeout=5, poll=0.5, describe="a number", clock=clock, pause=clock.pause) == 7
    assert clock.pauses == [0.5, 0.5, 0.5]


def test_the_failure_says_what_was_awaited_how_long_and_what_was_last_seen():
    clock = ManualClock()
    with pytest.raises(WaitTimeoutError, match=r"waited 2\.0 s for the queue to drain; at last the condition was 0"):
        wait_until(lambda: 0, timeout=2, poll=0.5, describe="the queue to drain", clock=clock, pause=clock.pause)


def test_the_condition_is_asked_once_more_at_the_deadline():
    clock = ManualClock()
    assert wait_until(lambda: clock.now >= 102, timeout=2, poll=2, describe="two", clock=clock, pause=clock.pause)


def test_a_tolerated_error_means_not_yet_and_is_named_in_the_failure():
    clock = ManualClock()

    def refuse() -> bool:
        raise ConnectionError("nobody listens")

    with pytest.raises(WaitTimeoutError, match="raised ConnectionError: nobody listens"):
        wait_until(refuse, timeout=1, poll=1, describe="a server", tolerate=(OSError,), clock=clock, pause=clock.pause)


def test_any_other_error_ends_the_wait_at_once():
    clock = ManualClock()

    def broken() -> bool:
        raise KeyError("typo")

    with pytest.raises(KeyError):
        wait_until(broken, timeout=1, describe="anything", tolerate=(OSError,), clock=clock, pause=clock.pause)
    assert clock.pauses == []


async def test_the_async_wait_takes_plain_and_coroutine_conditions():
    clock = ManualClock()
    plain = answers(False, "plain")

    async def coroutine() -> str:
        return "coroutine"

    options = {"timeout": 5, "describe": "an answer", "clock": clock, "pause": clock.pause_async}
    assert await wait_until_async(plain, **options) == "plain"
    assert await wait_until_async(coroutine, **options) == "coroutine"


async def test_the_async_wait_fails_with_the_same_words():
    clock = ManualClock()
    with pytest.raises(WaitTimeoutError, match=r"waited 1\.0 s for a reply; at last the condition was None"):
        await wait_until_async(
            lambda: None, timeout=1, poll=0.5, describe="a reply", clock=clock, pause=clock.pause_async
        )
