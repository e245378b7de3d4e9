"""From Redis to RabbitMQ and back with work in flight: every step holds at once, can be repeated and undone, and loses or doubles nothing."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from crucible import contracts as c
from crucible.broker.publisher import Publisher
from crucible.broker.urls import BrokerUrl
from crucible.contracts import BrokerAction, BrokerPhase
from crucible.evaluation import State
from crucible.resilience import CallFailedError
from crucible.settings import BrokerSettings, SettingsError
from crucible.storage.hints import Brokers
from tests.support.broker import declare
from tests.support.capabilities import needs
from tests.support.hint_worker import HintWorker, hint_worker
from tests.support.postgres import fresh_database
from tests.support.storage import Bench, new_evaluation, storage_over
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.integration, needs("rabbitmq"), needs("redis")]

SETTINGS = BrokerSettings(reconcile_seconds=0.5)
START, DRAIN, FINISH, ROLLBACK = BrokerAction


@pytest.fixture
def new(rabbitmq: RabbitCluster, rabbit_vhost: str) -> BrokerUrl:
    return declare(rabbitmq.url(vhost=rabbit_vhost), SETTINGS)


@pytest.fixture
def legacy(redis_server: RedisServer) -> BrokerUrl:
    url = BrokerUrl.parse(f"{redis_server.url}/1")
    with Publisher(url, SETTINGS) as publisher:
        publisher.purge()
    return url


@dataclass
class Between:
    """A storage between two brokers, a worker at each, and all that was submitted."""

    bench: Bench
    new: HintWorker
    legacy: HintWorker
    submitted: list[str]

    async def move(self, action: BrokerAction, share: int | None = None) -> c.BrokerReport:
        return await self.bench.client.move_broker(c.BrokerMove(action=action, share=share, actor="op"))

    async def submit(self, count: int) -> None:
        items = [new_evaluation(priority=n % 11) for n in range(count)]
        self.submitted += [item.id for item in items]
        await self.bench.submit_many(items)

    async def all_told(self) -> c.BrokerReport:
        async def told() -> c.BrokerReport | None:
            report = await self.bench.client.broker()
            return report if report.untold == 0 else None

        report = await wait_until_async(told, timeout=20, describe="all that waits to be told of")
        assert report is not None
        return report

    async def waiting(self) -> tuple[int, int]:
        new, legacy = (await self.all_told()).brokers
        return new.waiting, legacy.waiting

    async def completed(self) -> int:
        rows = await self.bench.sql("SELECT count(*) AS n FROM evaluations WHERE state = 'completed'")
        count: int = rows[0]["n"]
        return count

    def check_once(self) -> None:
        """Every evaluation ran, and none twice, on whichever side."""
        ran = self.new.ran + self.legacy.ran
        assert sorted(ran) == sorted(self.submitted)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Have both workers work."""
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for worker in (self.new, self.legacy):
                group.create_task(worker.work(enough))
            try:
                yield
            finally:
                enough.set()

    async def all_ran(self) -> None:
        async def done() -> bool:
            return await self.completed() == len(self.submitted)

        await wait_until_async(done, timeout=60, describe=f"{len(self.submitted)} evaluations to end", poll=0.1)


@pytest.fixture
async def between(new: BrokerUrl, legacy: BrokerUrl, database: str, folder: Path) -> AsyncIterator[Between]:
    async with AsyncExitStack() as stack:
        brokers = Brokers(new, legacy, SETTINGS)
        bench = await stack.enter_async_context(storage_over(database, folder, brokers=brokers))
        yield Between(
            bench,
            await stack.enter_async_context(hint_worker(new, SETTINGS, bench.client)),
            await stack.enter_async_context(hint_worker(legacy, SETTINGS, bench.client)),
            [],
        )


async def refused(between: Between, action: BrokerAction, share: int | None = None) -> str:
    with pytest.raises(CallFailedError) as caught:
        await between.move(action, share)
    assert caught.value.status in {409, 422}
    return str(caught.value)


# -- steps


async def test_before_the_start_all_work_goes_to_the_broker_that_is_to_be_left(between: Between) -> None:
    await between.submit(30)
    assert await between.waiting() == (0, 30)
    report = await between.bench.client.broker()
    assert (report.phase, report.share, report.drained) == (BrokerPhase.LEGACY, 0, False)
    assert "start --share" in report.next
    assert [side.kind for side in report.brokers] == ["rabbitmq", "redis"]
    assert all(side.up for side in report.brokers)


async def test_steps_out_of_turn_are_refused_and_name_the_one_that_comes_first(between: Between) -> None:
    assert "`start`" in await refused(between, DRAIN)
    assert "`drain` first" in await refused(between, FINISH)
    assert "share" in await refused(between, START)
    await between.move(START, 50)
    assert "`drain` first" in await refused(between, FINISH)
    await between.submit(20)
    await between.all_told()
    await between.move(DRAIN)
    assert "`rollback` first" in await refused(between, START, 10)
    messages = sum(((await between.bench.client.broker()).brokers[1].queued or {}).values())
    assert messages > 0
    assert f"{messages} messages" in await refused(between, FINISH)
    async with between.working():
        await between.all_ran()
        await wait_until_async(lambda: drained(between), timeout=20, describe="the legacy broker to be drained")
    await between.move(FINISH)
    assert "finished" in await refused(between, DRAIN)
    assert "`rollback` first" in await refused(between, START, 10)


async def drained(between: Between) -> bool:
    return bool((await between.bench.client.broker()).drained)


async def test_the_share_decides_who_is_told_and_what_is_told_stays_where_it_is(between: Between) -> None:
    await between.move(START, 25)
    await between.submit(400)
    new, legacy = await between.waiting()
    assert new + legacy == 400
    # A hash decides: with 400, five standard deviations are 43.
    assert 57 <= new <= 143
    report = await between.move(START, 75)
    assert (report.phase, report.share, report.changed_by) == (BrokerPhase.SHARING, 75, "op")
    assert await between.waiting() == (new, legacy)


@pytest.mark.parametrize("step", [START, DRAIN, FINISH, ROLLBACK])
async def test_a_step_that_is_taken_again_changes_nothing(between: Between, step: BrokerAction) -> None:
    way = {START: [], DRAIN: [START], FINISH: [START, DRAIN], ROLLBACK: [START, DRAIN]}[step]
    for action in way:
        await between.move(action, 40 if action is START else None)
    share = 40 if step is START else None
    first = await between.move(step, share)
    again = await between.move(step, share)
    assert (
        (again.phase, again.share, again.notes)
        == (first.phase, first.share, first.notes)
        == (again.phase, again.share, [])
    )


async def test_two_steps_at_once_are_taken_one_after_the_other(between: Between) -> None:
    await between.move(START, 10)
    answers = await asyncio.gather(
        *(between.move(action) for action in (DRAIN, ROLLBACK, DRAIN, ROLLBACK)), return_exceptions=True
    )
    assert all(isinstance(answer, c.BrokerReport | CallFailedError) for answer in answers)
    report = await between.bench.client.broker()
    assert (report.phase, report.share) in {(BrokerPhase.LEGACY, 0), (BrokerPhase.DRAINING, 100)}


# -- the whole way, with work in flight


async def test_a_migration_with_work_in_flight_loses_nothing_and_runs_nothing_twice(between: Between) -> None:
    await between.submit(100)
    await between.all_told()
    async with between.working():
        await between.move(START, 30)
        await between.submit(100)
        await between.move(START, 70)
        await between.submit(50)
        await between.move(DRAIN)
        await between.submit(50)
        await wait_until_async(lambda: drained(between), timeout=30, describe="the legacy broker to be drained")
        report = await between.move(FINISH)
        assert (report.phase, report.notes) == (BrokerPhase.FINISHED, [])
        assert "CRUCIBLE_LEGACY_BROKER_URL" in report.next
        before = len(between.legacy.ran)
        await between.submit(50)
        await between.all_ran()
    between.check_once()
    assert len(between.legacy.ran) == before, "the legacy broker was still used after the end"


@pytest.mark.parametrize("phase", [BrokerPhase.SHARING, BrokerPhase.DRAINING, BrokerPhase.FINISHED])
async def test_a_rollback_from_any_phase_brings_everything_back_and_loses_nothing(
    between: Between, phase: BrokerPhase
) -> None:
    await between.submit(45)
    await between.move(START, 50)
    await between.submit(45)
    await between.all_told()
    async with between.working():
        if phase is not BrokerPhase.SHARING:
            await between.move(DRAIN)
        if phase is BrokerPhase.FINISHED:
            await between.all_ran()
            await wait_until_async(lambda: drained(between), timeout=30, describe="the legacy broker to be drained")
            await between.move(FINISH)
        await between.submit(45)
        report = await between.move(ROLLBACK)
        assert (report.phase, report.share, report.notes) == (BrokerPhase.LEGACY, 0, [])
        await between.submit(45)
        await between.all_ran()
        before = len(between.new.ran)
        await between.submit(30)
        await between.all_ran()
    between.check_once()
    assert len(between.new.ran) == before, "the new broker was still used after the rollback"


async def test_work_leaves_a_legacy_broker_that_has_died(between: Between, redis_server: RedisServer) -> None:
    await between.submit(50)
    await between.all_told()
    await between.move(START, 10)
    redis_server.kill()
    await between.submit(50)
    report = await between.move(DRAIN)
    assert report.brokers[1].up is False
    enough = asyncio.Event()
    working = asyncio.create_task(between.new.work(enough))
    await between.all_ran()
    enough.set()
    await working
    between.check_once()
    why = await refused(between, FINISH)
    assert "does not say what it holds" in why
    assert "unset CRUCIBLE_LEGACY_BROKER_URL" in why


async def test_a_new_broker_that_is_down_holds_up_nothing_of_the_other(
    legacy: BrokerUrl, database: str, folder: Path
) -> None:
    nowhere = BrokerUrl.parse("amqp://a:b@127.0.0.1:9/crucible")
    async with storage_over(database, folder, brokers=Brokers(nowhere, legacy, SETTINGS)) as bench:
        await bench.client.move_broker(c.BrokerMove(action=START, share=50, actor="op"))
        await bench.submit_many([new_evaluation() for _ in range(100)])

        async def shared() -> bool:
            report = await bench.client.broker()
            return report.brokers[1].waiting + report.untold == 100 and report.brokers[1].waiting > 20

        await wait_until_async(shared, timeout=10, describe="the legacy broker to have its share")
        report = await bench.client.move_broker(c.BrokerMove(action=ROLLBACK, actor="op"))
        (note,) = report.notes
        assert "could not be emptied" in note
        async with hint_worker(legacy, SETTINGS, bench.client) as worker:

            async def all_ran() -> bool:
                while await worker.work_one():
                    pass
                return len(worker.ran) == 100

            await wait_until_async(all_ran, timeout=20, describe="everything to run over the legacy broker")


async def test_without_the_right_to_delete_queues_the_end_says_so_and_holds(
    between: Between, rabbitmq: RabbitCluster, rabbit_vhost: str
) -> None:
    """The services' own users may not change the topology; emptying is a courtesy, and what is left over is void."""
    rabbitmq.manage("PUT", "users/poor", {"password": "poor", "tags": ""})
    rabbitmq.manage("PUT", f"permissions/{rabbit_vhost}/poor", {"configure": "^$", "write": ".*", "read": "^$"})
    lane = between.bench.storage.hints and between.bench.storage.hints.lanes
    assert lane
    poor = BrokerUrl.parse(rabbitmq.url(vhost=rabbit_vhost, user="poor", password="poor"))
    async with (
        fresh_database() as url,
        storage_over(url, between.bench.data_dir, brokers=Brokers(poor, between.legacy._url, SETTINGS)) as bench,
    ):
        await bench.client.move_broker(c.BrokerMove(action=START, share=100, actor="op"))
        record = await bench.submit()
        report = await bench.client.move_broker(c.BrokerMove(action=ROLLBACK, actor="op"))
        assert report.phase is BrokerPhase.LEGACY
        (note,) = report.notes
        assert "lacks a permission" in note
        async with hint_worker(between.legacy._url, SETTINGS, bench.client) as worker:
            await wait_until_async(worker.work_one, timeout=10, describe="the message at the legacy broker")
            assert worker.ran == [record.id]
        assert (await bench.client.get(record.id)).state is State.COMPLETED


async def test_what_workers_hold_counts_as_in_flight_however_fast_they_were(between: Between) -> None:
    await between.move(START, 50)
    await between.submit(30)
    held = 0
    # Claims race with the marks of what was told.
    while held < 30:
        for worker in (between.new, between.legacy):
            if (taken := await worker.take()) is not None:
                held += (await worker.claim(taken)).claim is not None
                await worker.ack(taken)

    async def counted() -> bool:
        return sum(side.in_flight for side in (await between.bench.client.broker()).brokers) == 30

    await wait_until_async(counted, timeout=10, describe="all held evaluations to be counted on their side")


async def test_a_migration_that_is_over_leaves_nothing_behind_for_the_next(
    between: Between, new: BrokerUrl, legacy: BrokerUrl, folder: Path
) -> None:
    for action, share in ((START, 10), (DRAIN, None), (FINISH, None)):
        await between.move(action, share)
    bench = between.bench
    await bench.storage.aclose()
    async with storage_over(bench.url, folder, brokers=Brokers(new, None, SETTINGS), instance="b") as alone:

        async def forgotten() -> bool:
            return await alone.sql("SELECT 1 FROM broker_route") == []

        await wait_until_async(forgotten, timeout=10, describe="the migration to be over")
    async with storage_over(bench.url, folder, brokers=Brokers(legacy, new, SETTINGS), instance="c") as back:
        report = await back.client.broker()
        assert (report.phase, report.share) == (BrokerPhase.LEGACY, 0)
        await back.client.move_broker(c.BrokerMove(action=START, share=50, actor="op"))


def test_a_broker_cannot_be_left_for_itself(new: BrokerUrl) -> None:
    with pytest.raises(SettingsError, match="CRUCIBLE_LEGACY_BROKER_URL: names the same broker"):
        Brokers(new, new, SETTINGS)


async def test_with_one_broker_or_none_there_is_nothing_to_move(new: BrokerUrl, database: str, folder: Path) -> None:
    for brokers, kinds in ((None, []), (Brokers(new, None, SETTINGS), ["rabbitmq"])):
        async with storage_over(database, folder, brokers=brokers) as bench:
            report = await bench.client.broker()
            assert ([side.kind for side in report.brokers], report.phase) == (kinds, None)
            with pytest.raises(CallFailedError, match="CRUCIBLE_LEGACY_BROKER_URL"):
                await bench.client.move_broker(c.BrokerMove(action=START, share=5, actor="op"))
