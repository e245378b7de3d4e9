"""What becomes of a broker's message in a worker, with stand-ins for storage and for what holds claims.

That real brokers and services do so is shown in tests/integration/test_worker_celery.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crucible import contracts as c
from crucible.evaluation import EvaluationRequest, State, resolve
from crucible.limits import Limits, SizeClass
from crucible.resilience import CallFailedError
from crucible.worker.hints import Hints, Verdict
from crucible.worker.holding import Slots
from tests.support.waits import wait_until_async

pytestmark = pytest.mark.unit

NAME = "ev-00000000000000000000000001"
OTHER = "ev-00000000000000000000000002"
CLAIM = c.Claim(
    evaluation_id=NAME,
    attempt=1,
    owner="ada",
    spec=resolve(EvaluationRequest(code="pass"), Limits()),
    lease_seconds=30,
)


class ScriptedStorage:
    """Stand-in for storage: gives these answers in turn, the last one again and again."""

    def __init__(self, *answers: c.ClaimAnswer | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    async def claim_one(self, evaluation_id: str, request: c.ClaimOne) -> c.ClaimAnswer:
        self.asked.append((evaluation_id, request.key))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class ScriptedHolding:
    """Stand-in for what sees claims through: each lasts until `end` is set."""

    instance = "w"

    def __init__(self, slots: int = 1) -> None:
        self.slots = {SizeClass.SMALL: Slots(SizeClass.SMALL, slots)}
        self.held: list[str] = []
        self.end = asyncio.Event()

    def hold(self, claim: c.Claim, slots: Slots) -> asyncio.Task[None]:
        self.held.append(claim.evaluation_id)
        return asyncio.create_task(self._hold(slots))

    async def _hold(self, slots: Slots) -> None:
        await self.end.wait()
        slots.give_back()

    async def drain(self) -> None:
        self.end.set()


def follow(hints: Hints, name: str = NAME) -> asyncio.Task[Verdict]:
    return asyncio.create_task(hints.follow(name, SizeClass.SMALL))


def make(*answers: c.ClaimAnswer | Exception, slots: int = 1, **options: Any) -> tuple[Any, Any, Hints]:
    storage, holding = ScriptedStorage(*answers), ScriptedHolding(slots)
    return storage, holding, Hints(storage, holding, **options)  # type: ignore[arg-type]


AWAY = CallFailedError("storage", "no connection")
GRANTED = c.ClaimAnswer(claim=CLAIM)
ENDED = c.ClaimAnswer(state=State.COMPLETED)


async def until_held(holding: ScriptedHolding, count: int = 1) -> None:
    await wait_until_async(lambda: len(holding.held) == count, timeout=5, poll=0, describe="a claim to be held")


async def test_a_message_is_held_for_as_long_as_its_evaluation() -> None:
    _, holding, hints = make(GRANTED)
    message = follow(hints)
    await until_held(holding)
    assert not message.done()
    assert holding.slots[SizeClass.SMALL].free == 0
    holding.end.set()
    assert await message is Verdict.DONE
    assert holding.slots[SizeClass.SMALL].free == 1


async def test_what_does_not_wait_any_more_is_done_and_takes_no_slot() -> None:
    _, holding, hints = make(ENDED)
    assert await follow(hints) is Verdict.DONE
    assert holding.held == []
    assert holding.slots[SizeClass.SMALL].free == 1


async def test_a_second_message_of_a_run_joins_it_and_asks_nobody() -> None:
    storage, holding, hints = make(GRANTED)
    first = follow(hints)
    await until_held(holding)
    second = follow(hints)
    holding.end.set()
    assert await asyncio.gather(first, second) == [Verdict.DONE, Verdict.DONE]
    assert len(storage.asked) == 1


async def test_a_lost_connection_lets_go_of_its_messages_and_not_of_what_runs() -> None:
    storage, holding, hints = make(GRANTED)
    before = follow(hints)
    await until_held(holding)
    hints.lost_connection()
    assert await before is Verdict.LOST
    again = follow(hints)
    holding.end.set()
    assert await again is Verdict.DONE
    assert len(storage.asked) == 1


async def test_while_storage_is_away_it_is_asked_again_by_the_same_key() -> None:
    storage, holding, hints = make(AWAY, AWAY, GRANTED)
    message = follow(hints)
    await until_held(holding)
    holding.end.set()
    assert await message is Verdict.DONE
    assert len(storage.asked) == 3
    assert len(set(storage.asked)) == 1


async def test_when_storage_is_away_for_too_long_the_message_is_given_up() -> None:
    _, holding, hints = make(AWAY, budget_seconds=0.0)
    assert await follow(hints) is Verdict.GIVEN_UP
    assert holding.slots[SizeClass.SMALL].free == 1


async def test_a_drain_returns_what_has_no_slot_and_what_asks_in_vain_and_ends_what_is_held() -> None:
    _, holding, hints = make(GRANTED, AWAY, slots=2)
    held = follow(hints)
    await until_held(holding)
    asking = follow(hints, OTHER)
    waiting = follow(hints, "ev-00000000000000000000000003")
    await asyncio.sleep(0)
    await hints.drain()
    assert await asyncio.gather(held, asking, waiting) == [Verdict.DONE, Verdict.RETURNED, Verdict.RETURNED]
    assert await follow(hints) is Verdict.RETURNED
    assert holding.slots[SizeClass.SMALL].free == 2
