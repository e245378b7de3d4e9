"""Submissions: all or nothing, once per Idempotency-Key, and never over the quota, however many come at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest
import structlog

from crucible import contracts as c
from crucible.evaluation import Reason, State
from crucible.limits import SizeClass
from crucible.resilience import CallFailedError
from tests.support.storage import Bench, new_evaluation, new_id, running_storage, storage_over
from tests.support.waits import pass_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

_TABLES = ("evaluations", "payloads", "events", "outbox")
Status = c.StoredStatus


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


async def counts(bench: Bench) -> dict[str, int]:
    return {table: (await bench.sql(f"SELECT count(*) AS n FROM {table}"))[0]["n"] for table in _TABLES}


async def test_a_submission_is_stored_whole(bench: Bench) -> None:
    new = new_evaluation(
        "print('שלום')",
        stdin="in",
        priority=7,
        timeout_seconds=9,
        queue_timeout_seconds=99,
        memory_limit="512Mi",
        labels={"team": "red"},
    )
    (stored,) = (await bench.client.create(c.NewEvaluations(items=[new]))).results
    record = await bench.client.get(new.id)
    assert stored.evaluation == record
    assert (record.state, record.seq, record.attempt) == (State.QUEUED, 2, 0)
    assert (record.priority, record.effective_priority, record.size_class) == (7, 7, SizeClass.MEDIUM)
    assert (record.resources, record.labels, record.timeout_seconds) == (new.spec.resources, {"team": "red"}, 9)
    assert record.queue_timeout_seconds == 99
    assert await bench.client.payload(new.id) == c.Payload(code="print('שלום')", stdin="in")
    events = await bench.events(new.id)
    assert [(event.seq, event.state, event.actor) for event in events] == [
        (1, State.SUBMITTED, "ada"),
        (2, State.QUEUED, "storage"),
    ]
    assert events[0].data == {"priority": 7, "size_class": "medium"}


async def test_a_submission_that_fails_half_way_leaves_nothing(bench: Bench) -> None:
    await bench.sql(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no more'; END $$"""
    )
    for table in _TABLES:
        await bench.sql(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()")
        for max_active in (None, 100):
            request = c.NewEvaluations(items=[new_evaluation() for _ in range(3)], max_active=max_active)
            with structlog.testing.capture_logs():
                answer = await bench.client._http.post("/internal/evaluations", json=request.model_dump(mode="json"))
            assert answer.status_code == 500
        await bench.sql(f"DROP TRIGGER refuse ON {table}")
        assert set((await counts(bench)).values()) == {0}


async def test_one_key_gives_one_evaluation_also_to_twenty_at_once(bench: Bench) -> None:
    async def submit() -> c.Stored:
        item = new_evaluation(key="k-1", request="same")
        return (await bench.client.create(c.NewEvaluations(items=[item], max_active=1000))).results[0]

    stored = await asyncio.gather(*(submit() for _ in range(20)))
    assert sorted(result.status for result in stored) == [Status.CREATED] + [Status.EXISTING] * 19
    assert len({result.evaluation.id for result in stored if result.evaluation}) == 1
    assert await counts(bench) | {"outbox": 0} == {"evaluations": 1, "payloads": 1, "events": 2, "outbox": 0}


async def test_a_key_used_for_another_request_is_a_conflict(bench: Bench) -> None:
    first = await bench.submit(key="k", request="one")
    (other,) = await bench.submit_many([new_evaluation(key="k", request="two")])
    assert other.status is Status.KEY_CONFLICT
    assert other.evaluation is not None
    assert other.evaluation.id == first.id


async def test_a_key_belongs_to_its_owner(bench: Bench) -> None:
    first = await bench.submit(key="k", request="same", owner="ada")
    second = await bench.submit(key="k", request="same", owner="bob")
    assert first.id != second.id


async def test_storing_the_same_id_again_is_one_evaluation(bench: Bench) -> None:
    item = new_evaluation()
    for expected in (Status.CREATED, Status.EXISTING, Status.EXISTING):
        (stored,) = await bench.submit_many([item])
        assert stored.status is expected
    assert (await counts(bench))["evaluations"] == 1


async def test_what_comes_twice_in_one_batch_is_stored_once(bench: Bench) -> None:
    item = new_evaluation()
    keyed = [new_evaluation(key="k", request="r"), new_evaluation(key="k", request="r")]
    changed = new_evaluation(key="k", request="other")
    stored = await bench.submit_many([item, item, *keyed, changed])
    assert [result.status for result in stored] == [
        Status.CREATED,
        Status.EXISTING,
        Status.CREATED,
        Status.EXISTING,
        Status.KEY_CONFLICT,
    ]
    assert (await counts(bench))["evaluations"] == 2


async def test_two_batches_with_the_same_keys_in_opposite_order_both_succeed(bench: Bench) -> None:
    def batch(order: range) -> c.NewEvaluations:
        return c.NewEvaluations(items=[new_evaluation(key=f"k{n}", request="r") for n in order], max_active=10_000)

    for round_ in range(5):
        ups = batch(range(round_ * 100, round_ * 100 + 100))
        downs = batch(range(round_ * 100 + 99, round_ * 100 - 1, -1))
        answers = await asyncio.gather(bench.client.create(ups), bench.client.create(downs))
        statuses = [result.status for answer in answers for result in answer.results]
        assert statuses.count(Status.CREATED) == statuses.count(Status.EXISTING) == 100


async def test_a_batch_keeps_its_order_in_the_queue(bench: Bench) -> None:
    items = [new_evaluation(f"print({n})") for n in range(100)]
    await bench.submit_many(items)
    claims = await bench.claim(100)
    assert [claim.evaluation_id for claim in claims] == [item.id for item in items]
    assert [claim.spec.code for claim in claims] == [item.spec.code for item in items]


async def test_a_batch_takes_what_the_quota_leaves_and_says_so_of_the_rest(bench: Bench) -> None:
    await bench.submit_many([new_evaluation() for _ in range(3)])
    known = new_evaluation(key="k", request="r")
    await bench.submit_many([known])
    items = [new_evaluation(key="k", request="r"), *(new_evaluation() for _ in range(5))]
    stored = (await bench.client.create(c.NewEvaluations(items=items, max_active=6))).results
    assert [result.status for result in stored] == [Status.EXISTING] + [Status.CREATED] * 2 + [Status.OVER_QUOTA] * 3
    assert {result.active for result in stored if result.status is Status.OVER_QUOTA} == {6}


@pytest.mark.parametrize("max_active", [1, 37, 100])
async def test_the_quota_holds_against_many_at_once(bench: Bench, max_active: int) -> None:
    async def submit(count: int) -> list[c.Stored]:
        items = [new_evaluation() for _ in range(count)]
        return (await bench.client.create(c.NewEvaluations(items=items, max_active=max_active))).results

    # 64 connections may submit at once: quotas below and above that number take different ways.
    answers = await asyncio.gather(*(submit(5 if n % 10 == 0 else 1) for n in range(150)))
    statuses = [result.status for answer in answers for result in answer]
    assert statuses.count(Status.CREATED) == max_active
    assert statuses.count(Status.OVER_QUOTA) == len(statuses) - max_active
    assert (await counts(bench))["evaluations"] == max_active


async def test_the_quota_holds_over_two_instances_and_counts_only_what_is_under_way(bench: Bench) -> None:
    async with storage_over(bench.url, bench.data_dir, instance="instance-2") as other:

        async def submit(n: int) -> c.StoredStatus:
            client = (bench, other)[n % 2].client
            return (await client.create(c.NewEvaluations(items=[new_evaluation()], max_active=120))).results[0].status

        statuses = await asyncio.gather(*(submit(n) for n in range(200)))
        assert statuses.count(Status.CREATED) == 120
        claims = await bench.claim(10)
        for claim in claims:
            await bench.finish(claim.evaluation_id, Reason.EXIT_NONZERO)
        again = await asyncio.gather(*(submit(n) for n in range(30)))
        assert again.count(Status.CREATED) == 10


async def test_an_owner_at_its_quota_does_not_hold_up_another(bench: Bench) -> None:
    async with bench.connection() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('crucible.quota ada', 0))")
        held_up = asyncio.create_task(
            bench.client.create(c.NewEvaluations(items=[new_evaluation(owner="ada")], max_active=10))
        )
        others = c.NewEvaluations(items=[new_evaluation(owner="bob")], max_active=10)
        assert (await bench.client.create(others)).results[0].status is Status.CREATED
        await pass_time(0.1)
        assert not held_up.done()
    assert (await held_up).results[0].status is Status.CREATED


async def test_items_of_two_owners_in_one_call_are_refused(bench: Bench) -> None:
    with pytest.raises(CallFailedError) as caught:
        await bench.submit_many([new_evaluation(owner="ada"), new_evaluation(owner="bob")])
    assert caught.value.slug == "invalid-request"


@pytest.mark.parametrize("field", ["owner", "idempotency_key", "request_sha256", "traceparent", "replay_of"])
async def test_a_nul_in_any_text_is_refused_and_nothing_is_stored(bench: Bench, field: str) -> None:
    item = new_evaluation().model_copy(update={field: "a\x00b"})
    with pytest.raises(CallFailedError) as caught:
        await bench.submit_many([item])
    assert (caught.value.status, caught.value.slug) == (422, "invalid-request")
    assert set((await counts(bench)).values()) == {0}


async def test_nul_in_code_is_refused_even_if_nobody_checked_before(bench: Bench) -> None:
    good = new_evaluation()
    item = good.model_copy(update={"spec": good.spec.model_copy(update={"code": "a\x00b"})})
    with pytest.raises(CallFailedError) as caught:
        await bench.submit_many([item])
    assert caught.value.slug == "invalid-request"


async def test_the_database_refuses_a_state_that_does_not_exist(bench: Bench) -> None:
    record = await bench.submit()
    with pytest.raises(asyncpg.CheckViolationError):
        await bench.sql("UPDATE evaluations SET state = 'done' WHERE id = $1", record.id)


async def test_what_is_not_there_is_not_found(bench: Bench) -> None:
    for call in (
        bench.client.get(new_id()),
        bench.client.payload(new_id()),
        bench.client.events(new_id()),
        bench.client.position(new_id()),
        bench.client.output(new_id(), "stdout"),
        bench.client.frames(new_id()),
        bench.client.get("nonsense"),
    ):
        with pytest.raises(CallFailedError) as caught:
            await call
        assert (caught.value.status, caught.value.slug) == (404, "not-found")
