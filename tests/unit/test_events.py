"""Events and the in-process bus: order for each subscriber, honesty towards the slow, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crucible.evaluation import State
from crucible.events import DATA, Event, EventType, InProcessBus, Lagged

pytestmark = pytest.mark.unit


def event(seq: int, evaluation_id: str = "ev-a") -> Event:
    return Event(
        type=EventType.QUEUED,
        evaluation_id=evaluation_id,
        seq=seq,
        at=datetime(2026, 1, 1, tzinfo=UTC),
        owner="ann",
        actor="api",
        state=State.QUEUED,
    )


def everything(_: Event) -> bool:
    return True


def drain(queue: asyncio.Queue[Event | Lagged]) -> list[int | str]:
    found: list[int | str] = []
    while not queue.empty():
        item = queue.get_nowait()
        found.append("lagged" if isinstance(item, Lagged) else item.seq)
    return found


def test_each_subscriber_hears_what_it_wants_in_order() -> None:
    bus = InProcessBus()
    odd: Callable[[Event], bool] = lambda found: found.seq % 2 == 1  # noqa: E731
    with bus.subscribe(everything) as every, bus.subscribe(odd) as some, bus.subscribe(lambda _: False) as none:
        for seq in range(1, 6):
            bus.publish(event(seq))
        assert drain(every) == [1, 2, 3, 4, 5]
        assert drain(some) == [1, 3, 5]
        assert drain(none) == []


@given(st.integers(2, 6), st.lists(st.booleans(), max_size=40))
def test_a_subscriber_misses_nothing_without_being_told(capacity: int, reads: list[bool]) -> None:
    bus = InProcessBus(capacity)
    heard: list[int | str] = []
    published = 0
    with bus.subscribe(everything) as queue:
        for read in reads:
            if read and not queue.empty():
                item = queue.get_nowait()
                heard.append("lagged" if isinstance(item, Lagged) else item.seq)
            else:
                published += 1
                bus.publish(event(published))
            assert queue.qsize() <= capacity
        heard += drain(queue)
    last = 0
    for item in heard:
        if item == "lagged":
            last = -1
        else:
            # In order, and without a gap unless a mark came first.
            assert isinstance(item, int)
            assert item == last + 1 or (last == -1 and item > 0)
            last = item
    assert last == published


def test_a_slow_subscriber_delays_nobody() -> None:
    bus = InProcessBus(2)
    with bus.subscribe(everything) as slow, bus.subscribe(everything) as quick:
        heard = []
        for seq in range(1, 101):
            bus.publish(event(seq))
            heard += drain(quick)
        assert heard == list(range(1, 101))
        assert drain(slow) == ["lagged", 100]


def test_nothing_of_a_subscriber_stays_after_it_left_also_when_it_failed() -> None:
    bus = InProcessBus()

    def fail() -> None:
        with bus.subscribe(everything):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with bus.subscribe(everything) as queue:
        pass
    bus.publish(event(1))
    assert queue.empty()
    assert not bus._subscribers


async def test_a_subscriber_that_waits_is_woken() -> None:
    bus = InProcessBus()
    with bus.subscribe(everything) as queue:
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        bus.publish(event(1))
        found = await waiting
    assert isinstance(found, Event)
    assert found.seq == 1


def test_a_queue_too_small_for_the_mark_is_not_made() -> None:
    with pytest.raises(ValueError, match="at least"):
        InProcessBus(1)


def test_every_state_has_an_event_of_its_name() -> None:
    assert {str(state) for state in State} == {str(kind) for kind in EventType} - {"output", "collected"}


def test_an_event_survives_json_and_is_immutable() -> None:
    one = event(1)
    assert Event.model_validate_json(one.model_dump_json()) == one
    with pytest.raises(ValidationError):
        one.seq = 2  # type: ignore[misc]


def test_every_type_of_event_says_what_its_data_holds() -> None:
    assert set(DATA) == set(EventType)
    for model in DATA.values():
        assert all(field.description for field in model.model_fields.values())
