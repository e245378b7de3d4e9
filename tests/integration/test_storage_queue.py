"""The queue in the table: strict order, no evaluation twice, leases that end, and waiting that is woken."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from crucible import contracts as c
from crucible import metrics
from crucible.evaluation import Reason, State
from crucible.limits import SizeClass
from crucible.resilience import CallFailedError
from crucible.storage.lane import _next as next_untold
from crucible.storage.queue import _NEXT
from crucible.storage.route import MINE
from tests.support.storage import WORKER, Bench, new_evaluation, running_storage, storage_over
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

SMALL, MEDIUM, LARGE = SizeClass


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


async def fill_queue(bench: Bench, count: int) -> None:
    """Put many evaluations into the queue without submitting each; events are not what is looked at here."""
    await bench.sql(
        """INSERT INTO evaluations (id, owner, state, priority, effective_priority, size_class, cpu_millis, memory_bytes,
                                    image, labels, timeout_seconds, code_sha256, seq, request_sha256)
           SELECT 'ev-' || lpad(n::text, 26, '0'), 'crowd', 'queued', n % 11, n % 11, 'small', 250, 268435456,
                  'python', '{}', 60, '', 2, '' FROM generate_series(1, $1::int) AS n""",
        count,
    )
    await bench.sql(
        "INSERT INTO payloads (evaluation_id, code, stdin) SELECT id, 'pass', '' FROM evaluations WHERE owner = 'crowd'"
    )
    await bench.sql("ANALYZE evaluations")


# -- order


async def test_220_evaluations_come_out_in_strict_order_of_priority_then_submission(bench: Bench) -> None:
    order = [priority for priority in range(11) for _ in range(20)]
    random.Random(11).shuffle(order)
    items = [new_evaluation(f"print({n})", priority=priority) for n, priority in enumerate(order)]
    await bench.submit_many(items)
    expected = [item.id for _, item in sorted(enumerate(items), key=lambda pair: (-pair[1].spec.priority, pair[0]))]
    sizes = random.Random(12)
    claimed: list[str] = []
    while claims := await bench.claim(sizes.randint(1, 7)):
        claimed += [claim.evaluation_id for claim in claims]
    assert claimed == expected


async def test_size_classes_do_not_stand_in_each_others_way(bench: Bench) -> None:
    large = await bench.submit(memory_limit="2Gi", priority=10)
    small = await bench.submit(memory_limit="64Mi", priority=0)
    assert [claim.evaluation_id for claim in await bench.claim(5, size=SMALL)] == [small.id]
    assert await bench.claim(5, size=MEDIUM) == []
    both = c.ClaimRequest(worker=WORKER, wanted={SMALL: 1, LARGE: 1})
    assert [claim.evaluation_id for claim in (await bench.client.claim(both)).claims] == [large.id]


async def test_a_claim_carries_all_that_is_needed_to_run_it(bench: Bench) -> None:
    item = new_evaluation("print(input())", stdin="x\n", labels={"a": "b"}, timeout_seconds=7, owner="ada")
    item = item.model_copy(update={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    await bench.submit_many([item])
    claim = await bench.claim_one()
    assert claim == c.Claim(
        evaluation_id=item.id, attempt=1, owner="ada", spec=item.spec, lease_seconds=30.0, traceparent=item.traceparent
    )
    record = await bench.client.get(item.id)
    assert (record.state, record.attempt) == (State.PROVISIONING, 1)
    assert record.provisioning_at is not None
    assert (await bench.events(item.id))[-1].data == {"worker": WORKER}


async def test_fifty_claims_at_once_never_give_one_evaluation_twice(bench: Bench) -> None:
    items = [new_evaluation() for _ in range(120)]
    await bench.submit_many(items)
    answers = await asyncio.gather(*(bench.claim(4, worker=f"w{n}") for n in range(50)))
    claimed = [claim.evaluation_id for claims in answers for claim in claims]
    assert sorted(claimed) == sorted(item.id for item in items)
    assert {claim.attempt for claims in answers for claim in claims} == {1}


async def test_a_claim_out_of_100000_costs_what_one_out_of_few_does(bench: Bench) -> None:
    await fill_queue(bench, 100_000)
    async with bench.connection() as connection:
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {_NEXT}", 3, 0, 0))
    assert "ix_evaluations_queue" in plan
    assert "Seq Scan on evaluations" not in plan
    assert "Sort" not in plan
    claims = await bench.claim(3)
    assert [claim.spec.priority for claim in claims] == [10, 10, 10]
    took = await bench.sql("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'evaluations'")
    assert took[0]["n_tup_upd"] <= 3
    report = await bench.client.queue()
    assert sum(band.waiting for band in report.bands) == 100_000 - 3
    last = await bench.sql(
        "SELECT id FROM evaluations WHERE state = 'queued' AND priority = 0 ORDER BY number DESC LIMIT 1"
    )
    assert (await bench.client.position(last[0]["id"])).position == 100_000 - 3


async def test_what_a_broker_must_be_told_of_is_found_without_looking_at_what_it_knows(bench: Bench) -> None:
    await fill_queue(bench, 30_000)
    await bench.sql("UPDATE evaluations SET hint_priority = effective_priority, hint_broker = 'b' WHERE number > 20")
    await bench.sql("ANALYZE evaluations")
    for condition in ("true", *MINE.values()):
        async with bench.connection() as connection:
            statement = f"EXPLAIN (ANALYZE) {next_untold(condition)}"
            plan = "\n".join(row[0] for row in await connection.fetch(statement, 500, ["large"]))
        assert "ix_evaluations_unhinted" in plan
        assert "Seq Scan on evaluations" not in plan


# -- waiting


async def test_a_waiting_claim_is_woken_by_a_submission(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.claim(wait=30))
    await pass_time(0.2)
    assert not waiting.done()
    record = await bench.submit()
    async with asyncio.timeout(1):
        assert [claim.evaluation_id for claim in await waiting] == [record.id]


async def test_a_waiting_claim_is_woken_from_another_instance(bench: Bench) -> None:
    async with storage_over(bench.url, bench.data_dir, instance="instance-2") as other:
        for _ in range(3):
            waiting = asyncio.create_task(other.claim(wait=30))
            await pass_time(0.3)
            record = await bench.submit()
            # Well below the interval at which a waiting claim looks by itself.
            async with asyncio.timeout(1):
                assert [claim.evaluation_id for claim in await waiting] == [record.id]


async def test_a_waiting_claim_is_woken_by_work_that_comes_back(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    waiting = asyncio.create_task(bench.claim(wait=30))
    await pass_time(0.1)
    await bench.client.release(record.id, c.Release(worker=WORKER, attempt=1, detail="drain"))
    async with asyncio.timeout(1):
        assert [claim.evaluation_id for claim in await waiting] == [record.id]


async def test_a_claim_that_waits_in_vain_ends_empty_in_time(bench: Bench) -> None:
    async with asyncio.timeout(3):
        assert await bench.claim(wait=0.3) == []
    assert await bench.claim(0) == []


async def test_closing_answers_waiting_claims(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.claim(wait=60))
    await pass_time(0.1)
    await bench.storage.queue.aclose()
    async with asyncio.timeout(1):
        assert await waiting == []


async def test_a_claim_whose_caller_goes_away_loses_nothing(bench: Bench) -> None:
    chance = random.Random(5)
    ids = {item.id for item in [new_evaluation() for _ in range(30)]}
    items = [new_evaluation(evaluation_id=evaluation_id) for evaluation_id in sorted(ids)]
    await bench.submit_many(items)
    received: list[str] = []
    for _ in range(40):
        claiming = asyncio.create_task(bench.claim(2, wait=5))
        await pass_time(chance.uniform(0, 0.006))
        claiming.cancel()
        try:
            received += [claim.evaluation_id for claim in await claiming]
        except asyncio.CancelledError:
            continue

    async def queued_again() -> bool:
        rows = await bench.sql("SELECT id FROM evaluations WHERE state = 'queued'")
        return {row["id"] for row in rows} | set(received) == ids

    await wait_until_async(queued_again, timeout=5, describe="undelivered claims to come back to the queue")
    assert len(received) == len(set(received))


# -- giving back


async def test_released_work_keeps_its_place_and_its_attempts(bench: Bench) -> None:
    first, second = await bench.submit(), await bench.submit()
    await bench.claim_one()
    before = (await bench.client.get(first.id)).queued_at
    record = await bench.client.release(first.id, c.Release(worker=WORKER, attempt=1, detail="no capacity"))
    assert (record.state, record.provisioning_at, record.queued_at) == (State.QUEUED, None, before)
    again = c.Release(worker=WORKER, attempt=1, detail="no capacity")
    assert (await bench.client.release(first.id, again)).seq == record.seq
    claims = await bench.claim(2)
    assert [claim.evaluation_id for claim in claims] == [first.id, second.id]
    # The number is new, so that nothing left over from the released attempt can speak for this one; it costs no attempt.
    assert claims[0].attempt == 2
    assert (await bench.sql("SELECT losses FROM evaluations WHERE id = $1", first.id))[0]["losses"] == 0
    event = (await bench.events(first.id))[3]
    assert (event.state, event.actor, event.detail, event.reason) == (State.QUEUED, WORKER, "no capacity", None)


async def test_releasing_any_number_of_times_uses_up_no_attempts(bench: Bench) -> None:
    record = await bench.submit()
    for attempt in range(1, 8):
        assert (await bench.claim_one()).attempt == attempt
        await bench.client.release(record.id, c.Release(worker=WORKER, attempt=attempt, detail="drain"))
    assert (await bench.client.get(record.id)).state is State.QUEUED


async def test_only_its_holder_can_give_work_back(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    for worker, attempt in (("someone", 1), (WORKER, 2)):
        with pytest.raises(CallFailedError) as caught:
            await bench.client.release(record.id, c.Release(worker=worker, attempt=attempt, detail=""))
        assert caught.value.slug == "stale-attempt"


# -- leases


async def test_renewing_tells_what_is_cancelled_and_what_is_lost(bench: Bench) -> None:
    kept, cancelled, lost, done, foreign = [await bench.submit() for _ in range(5)]
    for _ in range(4):
        await bench.claim_one()
    await bench.claim_one(worker="other")
    await bench.client.cancel(cancelled.id, c.CancelRequest(actor="ada"))
    await bench.client.release(lost.id, c.Release(worker=WORKER, attempt=1, detail=""))
    await bench.finish(done.id)
    records = (kept, cancelled, lost, done, foreign)
    held = [c.Held(evaluation_id=record.id, attempt=1) for record in records]
    before = await bench.sql("SELECT lease_until FROM evaluations WHERE id = $1", kept.id)
    answer = await bench.client.renew(c.LeaseRenewal(worker=WORKER, held=held))
    after = await bench.sql("SELECT lease_until FROM evaluations WHERE id = $1", kept.id)
    assert answer.cancelled == [cancelled.id]
    assert sorted(answer.lost) == sorted([lost.id, foreign.id])
    assert after[0]["lease_until"] > before[0]["lease_until"]
    assert await bench.client.renew(c.LeaseRenewal(worker=WORKER, held=[])) == c.LeaseAnswer()


async def test_a_silent_worker_loses_what_it_held_and_its_late_word_does_not_count() -> None:
    async with running_storage(lease_seconds=0.4) as bench:
        record = await bench.submit()
        await bench.claim_one()
        await bench.start(record.id)

        async def requeued() -> bool:
            return (await bench.client.get(record.id)).state is State.QUEUED

        await wait_until_async(requeued, timeout=5, describe="the lease to end")
        for word in (bench.start(record.id), bench.finish(record.id)):
            with pytest.raises(CallFailedError) as caught:
                await word
            assert caught.value.slug == "stale-attempt"
        event = (await bench.events(record.id))[-1]
        assert (event.state, event.reason, event.actor) == (State.QUEUED, Reason.NODE_LOST, "storage")
        assert (await bench.claim_one()).attempt == 2
        assert (await bench.finish(record.id, attempt=2)).state is State.COMPLETED


async def test_a_renewed_lease_does_not_end() -> None:
    async with running_storage(lease_seconds=0.6) as bench:
        record = await bench.submit()
        await bench.claim_one()
        for _ in range(8):
            await pass_time(0.2)
            held = [c.Held(evaluation_id=record.id, attempt=1)]
            assert await bench.client.renew(c.LeaseRenewal(worker=WORKER, held=held)) == c.LeaseAnswer()
        assert (await bench.client.get(record.id)).attempt == 1


async def test_what_is_watched_outlives_its_worker() -> None:
    # Long enough that a busy machine gets round to the first of them before it ends.
    async with running_storage(lease_seconds=2.0) as bench:
        watched, unwatched, cancelled, other_attempt = [await bench.submit() for _ in range(4)]
        for _ in range(4):
            await bench.claim_one()
        await bench.start(watched.id)
        await bench.client.cancel(cancelled.id, c.CancelRequest(actor="ada"))
        held = [
            c.Held(evaluation_id=watched.id, attempt=1),
            c.Held(evaluation_id=cancelled.id, attempt=1),
            c.Held(evaluation_id=other_attempt.id, attempt=2),
        ]

        async def kept_while_the_rest_is_lost() -> bool:
            answer = await bench.client.sustain(c.Sustaining(watched=held))
            assert answer.lease_seconds == 2.0
            assert (await bench.client.get(watched.id)).state is State.RUNNING
            rest = [(await bench.client.get(record.id)).state for record in (unwatched, other_attempt, cancelled)]
            return rest == [State.QUEUED, State.QUEUED, State.CANCELLED]

        await wait_until_async(kept_while_the_rest_is_lost, timeout=10, poll=0.1, describe="the other leases to end")
        assert (await bench.finish(watched.id)).state is State.COMPLETED


async def test_a_lease_that_its_worker_renews_needs_nobody_else(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    held = [c.Held(evaluation_id=record.id, attempt=1)]
    assert (await bench.client.sustain(c.Sustaining(watched=held))).leases == 0
    await bench.sql("UPDATE evaluations SET lease_until = now() + interval '1 s' WHERE id = $1", record.id)
    assert (await bench.client.sustain(c.Sustaining(watched=held))).leases == 1
    # It is still its worker's.
    assert await bench.client.renew(c.LeaseRenewal(worker=WORKER, held=held)) == c.LeaseAnswer()


async def test_what_was_lost_keeps_its_place_in_the_queue(bench: Bench) -> None:
    first = await bench.submit(priority=5)
    await bench.submit(priority=5)
    await bench.claim_one()
    await bench.submit(priority=5)
    await bench.finish(first.id, Reason.SANDBOX_ERROR)
    assert (await bench.claim_one()).evaluation_id == first.id


async def test_a_new_start_takes_back_at_once_what_a_dead_one_held(bench: Bench) -> None:
    records = [await bench.submit() for _ in range(3)]
    await bench.claim(3)
    await bench.start(records[1].id)
    async with storage_over(bench.url, bench.data_dir, instance="instance-2") as other:
        assert await other.storage.reclaim_foreign("instance-2") == 3
        assert await other.storage.reclaim_foreign("instance-2") == 0
        claims = await other.claim(3, worker="instance-2")
        assert [(claim.evaluation_id, claim.attempt) for claim in claims] == [(record.id, 2) for record in records]
        assert await other.storage.reclaim_foreign("instance-2") == 0


# -- age


async def set_back(bench: Bench, evaluation_id: str, by: timedelta) -> None:
    await bench.sql("UPDATE evaluations SET queued_at = queued_at - $2::interval WHERE id = $1", evaluation_id, by)


async def test_waiting_raises_the_effective_priority_step_by_step_up_to_the_highest(bench: Bench) -> None:
    record = await bench.submit(priority=3)
    for waited, expected in ((590, 3), (15, 4), (600 * 3, 7), (600 * 100, 10)):
        await set_back(bench, record.id, timedelta(seconds=waited))
        await bench.storage.upkeep.age()
        aged = await bench.client.get(record.id)
        assert (aged.priority, aged.effective_priority) == (3, expected)


async def test_no_one_waits_behind_newcomers_for_longer_than_it_takes_to_age() -> None:
    """At saturation, with a priority 10 arriving for every slot, priority 0 still runs once it has waited 10 aging steps."""
    async with running_storage(aging_seconds=0.1) as bench:
        low = await bench.submit(priority=0)
        began = asyncio.get_running_loop().time()
        while True:
            await bench.submit_many([new_evaluation(priority=10) for _ in range(2)])
            claim = await bench.claim_one()
            if claim.evaluation_id == low.id:
                break
            assert asyncio.get_running_loop().time() - began < 20, "priority 0 starves"
            await pass_time(0.02)
        # It overtakes every priority 10 that came after it, and it waited its ten steps: it does not jump the queue either.
        assert asyncio.get_running_loop().time() - began > 0.8


async def test_a_lost_attempt_keeps_the_priority_that_waiting_earned(bench: Bench) -> None:
    record = await bench.submit(priority=0)
    await set_back(bench, record.id, timedelta(seconds=601))
    await bench.storage.upkeep.age()
    await bench.claim_one()
    await bench.finish(record.id, Reason.NODE_LOST)
    await bench.storage.upkeep.age()
    assert (await bench.client.get(record.id)).effective_priority == 1


async def test_claims_do_not_overtake_while_priorities_are_being_raised(bench: Bench) -> None:
    old = await bench.submit(priority=2)
    await bench.submit(priority=1)
    await set_back(bench, old.id, timedelta(seconds=601))
    async with bench.connection() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('crucible.aging', 0))")
        await connection.execute("UPDATE evaluations SET effective_priority = 3 WHERE id = $1", old.id)
        claiming = asyncio.create_task(bench.claim_one())
        await pass_time(0.2)
        assert not claiming.done()
    assert (await claiming).evaluation_id == old.id


async def test_waiting_longer_than_agreed_ends_as_a_timeout_in_the_queue(bench: Bench) -> None:
    record = await bench.submit(queue_timeout_seconds=1)
    patient = await bench.submit(queue_timeout_seconds=3600)
    await bench.sql("UPDATE evaluations SET queue_deadline = now() - interval '1 ms' WHERE id = $1", record.id)
    # Even before anyone has noticed, it is not handed out any more.
    assert [claim.evaluation_id for claim in await bench.claim(2)] == [patient.id]

    async def ended() -> bool:
        return (await bench.client.get(record.id)).state is State.TIMEOUT

    await wait_until_async(ended, timeout=5, describe="the wait to be ended")
    final = await bench.client.get(record.id)
    assert (final.reason, final.exit_code, final.started_at) == (Reason.QUEUE_WAIT, None, None)
    assert final.finished_at is not None
    assert (await bench.states(record.id))[-1] is State.TIMEOUT


async def test_a_second_wait_has_its_own_time(bench: Bench) -> None:
    record = await bench.submit(queue_timeout_seconds=100)
    await bench.claim_one()
    await bench.sql("UPDATE evaluations SET queue_deadline = now() - interval '1 s' WHERE id = $1", record.id)
    await bench.finish(record.id, Reason.NODE_LOST)
    assert await bench.storage.upkeep.end_waits() == 0
    assert (await bench.claim_one()).attempt == 2


# -- what is told of it


async def test_the_report_tells_what_waits_and_what_is_held(bench: Bench) -> None:
    await bench.submit_many([new_evaluation(priority=5) for _ in range(3)])
    await bench.submit_many([new_evaluation(priority=9), new_evaluation(priority=1, memory_limit="2Gi")])
    claimed = await bench.claim_one()
    assert claimed.spec.priority == 9
    report = await bench.client.queue()
    bands = [(band.size_class, band.priority, band.waiting) for band in report.bands]
    assert bands == [(LARGE, 1, 1), (SMALL, 5, 3)]
    assert all(0 <= band.oldest_seconds < 60 for band in report.bands)
    assert report.running == {SMALL: 1}
    assert report.mean_hold_seconds == {}
    await bench.finish(claimed.evaluation_id)
    assert (await bench.client.queue()).mean_hold_seconds.keys() == {SMALL}


async def test_a_position_counts_who_is_ahead_in_the_same_class(bench: Bench) -> None:
    low = await bench.submit(priority=1)
    middle = [await bench.submit(priority=5) for _ in range(2)]
    high = await bench.submit(priority=9)
    large = await bench.submit(priority=0, memory_limit="2Gi")
    positions = [(await bench.client.position(record.id)).position for record in (high, *middle, low, large)]
    assert positions == [1, 2, 3, 4, 1]
    await bench.claim_one()
    assert (await bench.client.position(high.id)).position == 0
    assert (await bench.client.position(low.id)).position == 3


# -- what can be seen of it


async def test_metrics_show_what_waits_and_that_it_is_gone(bench: Bench) -> None:
    await bench.submit(priority=7)
    await bench.submit(priority=7)

    def depth() -> float | None:
        return metrics.REGISTRY.get_sample_value("evaluation_queue_depth", {"size_class": "small", "priority": "7"})

    await bench.storage.queue.gauge()
    assert depth() == 2

    def oldest() -> float | None:
        labels = {"size_class": "small", "priority": "7"}
        return metrics.REGISTRY.get_sample_value("evaluation_queue_oldest_seconds", labels)

    assert (oldest() or 0) > 0
    await bench.claim(2)
    await bench.storage.queue.gauge()
    assert (depth(), oldest()) == (0, 0)


# -- claiming what one was told of


async def claim_named(bench: Bench, evaluation_id: str, key: str = "k", worker: str = WORKER) -> c.ClaimAnswer:
    return await bench.client.claim_one(evaluation_id, c.ClaimOne(worker=worker, key=key))


async def test_an_evaluation_can_be_claimed_by_its_name_ahead_of_all_others(bench: Bench) -> None:
    first, named = await bench.submit(priority=10), await bench.submit(priority=0, stdin="x")
    answer = await claim_named(bench, named.id)
    assert answer.claim is not None
    assert (answer.claim.evaluation_id, answer.claim.attempt, answer.claim.spec.stdin) == (named.id, 1, "x")
    assert (await bench.client.get(named.id)).state is State.PROVISIONING
    assert (await bench.claim_one()).evaluation_id == first.id
    await bench.start(named.id)
    assert (await bench.finish(named.id)).state is State.COMPLETED


async def test_asking_again_with_the_same_key_gets_the_same_claim_and_a_whole_lease(bench: Bench) -> None:
    record = await bench.submit()
    first = await claim_named(bench, record.id)
    await bench.sql("UPDATE evaluations SET lease_until = now() + interval '1 s'")
    assert await claim_named(bench, record.id) == first
    (row,) = await bench.sql("SELECT lease_until - now() AS lease FROM evaluations")
    assert row["lease"] > timedelta(seconds=20)
    assert [event.state for event in await bench.events(record.id)].count(State.PROVISIONING) == 1
    for other in (claim_named(bench, record.id, key="other"), claim_named(bench, record.id, worker="other")):
        assert await other == c.ClaimAnswer(state=State.PROVISIONING)
    await bench.finish(record.id)
    assert await claim_named(bench, record.id) == c.ClaimAnswer(state=State.COMPLETED)


async def test_a_key_of_a_claim_that_was_given_back_makes_a_new_attempt(bench: Bench) -> None:
    record = await bench.submit()
    await claim_named(bench, record.id)
    await bench.client.release(record.id, c.Release(worker=WORKER, attempt=1, detail="drain"))
    answer = await claim_named(bench, record.id)
    assert answer.claim is not None
    assert answer.claim.attempt == 2


async def test_of_many_that_were_told_of_one_evaluation_one_gets_it(bench: Bench) -> None:
    record = await bench.submit()
    answers = await asyncio.gather(*(claim_named(bench, record.id, key=f"k{n}") for n in range(20)))
    assert sum(answer.claim is not None for answer in answers) == 1
    assert {answer.state for answer in answers if answer.claim is None} == {State.PROVISIONING}


async def test_a_named_claim_waits_for_whoever_looks_at_its_row(bench: Bench) -> None:
    record = await bench.submit()
    async with bench.connection() as connection:
        async with connection.transaction():
            # An aging pass, a mark of the publisher.
            await connection.execute("UPDATE evaluations SET effective_priority = 10 WHERE id = $1", record.id)
            claiming = asyncio.create_task(claim_named(bench, record.id))
            await pass_time(0.2)
            assert not claiming.done()
        answer = await claiming
    assert answer.claim is not None


async def test_a_named_claim_sees_what_came_back_to_the_queue_while_it_waited(bench: Bench) -> None:
    record = await bench.submit()
    async with bench.connection() as connection:
        async with connection.transaction():
            # A whole attempt that is claimed and given back, committed while the claim below waits for the row.
            await connection.execute("UPDATE evaluations SET seq = seq + 2, attempt = attempt + 1")
            await connection.execute(
                """INSERT INTO events (evaluation_id, seq, type, at, owner, actor, state, attempt, data)
                   SELECT e.id, e.seq - 1 + n, 'queued', now(), owner, 'test', 'queued', attempt, '{}'
                     FROM evaluations AS e, generate_series(0, 1) AS n"""
            )
            claiming = asyncio.create_task(claim_named(bench, record.id))
            await pass_time(0.2)
            assert not claiming.done()
        answer = await claiming
    assert answer.claim is not None
    assert answer.claim.attempt == 2


@pytest.mark.parametrize("column", ["queue_deadline = now() - interval '1 s'", "retry_at = now() + interval '9 s'"])
async def test_what_waited_too_long_or_rests_after_a_loss_cannot_be_claimed(bench: Bench, column: str) -> None:
    record = await bench.submit()
    await bench.sql(f"UPDATE evaluations SET {column}")
    answer = await claim_named(bench, record.id)
    assert answer.claim is None
    assert await bench.claim() == []


async def test_a_named_claim_of_what_does_not_exist_or_has_ended_says_so(bench: Bench) -> None:
    assert await claim_named(bench, "ev-00000000000000000000000000") == c.ClaimAnswer()
    record = await bench.submit()
    await bench.client.cancel(record.id, c.CancelRequest(actor="ada"))
    assert await claim_named(bench, record.id) == c.ClaimAnswer(state=State.CANCELLED)
