"""Attempts: exactly one end becomes visible, void attempts are told so, and what the platform loses is tried again or kept as a dead letter."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING

import pytest

from crucible import contracts as c
from crucible import metrics
from crucible.evaluation import RETRYABLE_REASONS, TRANSITIONS, Reason, State, terminal_state_of
from crucible.frames import Frame, Kind
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError
from tests.support.storage import WORKER, Bench, new_id, outcome_of, running_storage
from tests.support.waits import pass_time, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

pytestmark = pytest.mark.integration

_CANCEL = c.CancelRequest(actor="ada")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


async def refused(call: Coroutine[object, object, object]) -> str | None:
    with pytest.raises(CallFailedError) as caught:
        await call
    return caught.value.slug


def metric(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


# -- reports


@pytest.mark.parametrize("reason", sorted(set(Reason) - RETRYABLE_REASONS - {Reason.QUEUE_WAIT}))
async def test_every_cause_that_lies_with_the_code_or_a_person_is_final(bench: Bench, reason: Reason) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    final = await bench.finish(record.id, reason, run_seconds=0.25, cpu_seconds=0.2, peak_memory_bytes=9_000_000)
    assert (final.state, final.reason, final.detail) == (terminal_state_of(reason), reason, f"test: {reason}")
    assert final == await bench.client.get(record.id)
    assert (final.run_seconds, final.cpu_seconds, final.peak_memory_bytes) == (0.25, 0.2, 9_000_000)
    moments = [final.submitted_at, final.queued_at, final.provisioning_at, final.started_at, final.finished_at]
    assert moments == sorted(moment for moment in moments if moment is not None)
    event = (await bench.events(record.id))[-1]
    assert (event.state, event.reason, event.attempt, event.seq) == (final.state, reason, 1, final.seq)
    assert await bench.claim() == []


async def test_an_end_told_twice_is_recorded_once(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    first = await bench.finish(record.id, Reason.EXIT_NONZERO)
    for reason in (Reason.EXIT_NONZERO, Reason.EXIT_ZERO, Reason.NODE_LOST):
        assert await bench.finish(record.id, reason) == first
    assert [state for state in await bench.states(record.id) if state.terminal] == [State.FAILED]


async def test_an_end_without_a_start_records_both_in_order(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    provisioned = (await bench.client.get(record.id)).provisioning_at
    assert provisioned is not None
    report = c.Finish(attempt=1, actor="d", outcome=outcome_of(Reason.EXIT_NONZERO), started_at=provisioned)
    final = await bench.client.finish(record.id, report)
    assert (final.state, final.started_at, final.seq) == (State.FAILED, provisioned, 5)
    assert (await bench.states(record.id))[2:] == [State.PROVISIONING, State.RUNNING, State.FAILED]


async def test_what_never_ran_has_no_start(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    final = await bench.finish(record.id, Reason.IMAGE_ERROR)
    assert (final.state, final.started_at) == (State.FAILED, None)
    assert (await bench.states(record.id))[2:] == [State.PROVISIONING, State.FAILED]


async def test_a_start_told_twice_is_recorded_once(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    first = await bench.start(record.id)
    assert await bench.start(record.id) == first
    assert first.seq == 4


async def test_words_of_a_void_attempt_are_refused_and_change_nothing(bench: Bench) -> None:
    record = await bench.submit()
    assert await refused(bench.start(record.id)) == "stale-attempt"
    await bench.claim_one()
    await bench.finish(record.id, Reason.EVICTED)
    await bench.claim_one()
    before = await bench.client.get(record.id)
    assert await refused(bench.start(record.id, 1)) == "stale-attempt"
    assert await refused(bench.start(record.id, 3)) == "stale-attempt"
    assert await refused(bench.finish(record.id, attempt=1)) == "stale-attempt"
    output = bench.client.append_output(record.id, [Frame(Kind.STDOUT, 0, b"old")], attempt=1, frame=0)
    assert await refused(output) == "stale-attempt"
    assert await bench.client.get(record.id) == before
    assert await refused(bench.start(new_id())) == "not-found"
    assert await refused(bench.finish(new_id())) == "not-found"


async def test_hostile_reports_cannot_keep_the_end_from_being_recorded(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    outcome = Outcome.model_construct(
        state=State.FAILED,
        reason=Reason.EXCEPTION,
        detail="uncaught \x00 \ud800",
        exit_code=10**12,
        signal=None,
        exception_type="Evil\x00Error",
        peak_memory_bytes=10**30,
        cpu_seconds=float("inf"),
        run_seconds=float("nan"),
    )
    report = c.Finish.model_construct(attempt=1, actor="d", outcome=outcome, started_at=None)
    final = await bench.storage.attempts.finish(record.id, report)
    assert final.state is State.FAILED
    assert (final.detail, final.exception_type) == ("uncaught \ufffd \ufffd\ufffd\ufffd", "Evil\ufffdError")
    assert (final.exit_code, final.peak_memory_bytes, final.cpu_seconds, final.run_seconds) == (
        None,
        2**63 - 1,
        None,
        None,
    )
    assert (await bench.events(record.id))[-1].data == {"exception_type": "Evil\ufffdError"}


async def test_the_metrics_tell_what_happened(bench: Bench) -> None:
    before = metric("evaluation_terminal_total", status="failed", reason="exit_nonzero")
    requeued = metric("evaluation_requeued_total", reason="evicted")
    waits = metric("evaluation_queue_wait_seconds_count", priority="8")
    record = await bench.submit(priority=8)
    await bench.claim_one()
    await bench.finish(record.id, Reason.EVICTED)
    await bench.claim_one()
    await bench.finish(record.id, Reason.EXIT_NONZERO, attempt=2)
    await bench.finish(record.id, Reason.EXIT_NONZERO, attempt=2)
    assert metric("evaluation_terminal_total", status="failed", reason="exit_nonzero") == before + 1
    assert metric("evaluation_requeued_total", reason="evicted") == requeued + 1
    assert metric("evaluation_queue_wait_seconds_count", priority="8") == waits + 2
    assert metric("storage_op_duration_seconds_count", backend="postgres", op="finish") >= 3


# -- cancel


async def test_what_waits_is_cancelled_at_once(bench: Bench) -> None:
    record = await bench.submit()
    result = await bench.client.cancel(record.id, _CANCEL)
    assert (result.sandbox, result.evaluation.state) == (False, State.CANCELLED)
    assert result.evaluation.reason is Reason.CANCELLED_BY_USER
    assert await bench.claim() == []
    again = await bench.client.cancel(record.id, c.CancelRequest(actor="op", reason=Reason.CANCELLED_BY_OPERATOR))
    assert (again.evaluation, again.sandbox) == (result.evaluation, False)
    assert (await bench.events(record.id))[-1].actor == "ada"


@pytest.mark.parametrize("started", [False, True])
async def test_what_is_held_remembers_that_a_cancel_was_asked_for(bench: Bench, started: bool) -> None:
    record = await bench.submit()
    await bench.claim_one()
    if started:
        await bench.start(record.id)
    result = await bench.client.cancel(record.id, _CANCEL)
    assert (result.sandbox, result.evaluation.cancel_requested) == (True, True)
    assert await refused(bench.start(record.id)) == "stale-attempt"
    final = await bench.finish(record.id, Reason.CANCELLED_BY_USER)
    assert (final.state, final.reason) == (State.CANCELLED, Reason.CANCELLED_BY_USER)


async def test_a_cancel_after_the_end_changes_nothing(bench: Bench) -> None:
    record = await bench.run_one()
    result = await bench.client.cancel(record.id, _CANCEL)
    assert (result.evaluation, result.sandbox) == (record, False)


async def test_code_that_ended_before_the_cancel_reached_it_keeps_its_own_end(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    await bench.client.cancel(record.id, _CANCEL)
    final = await bench.finish(record.id, Reason.EXIT_ZERO)
    assert (final.state, final.reason) == (State.COMPLETED, Reason.EXIT_ZERO)


@pytest.mark.parametrize("way", ["finish", "release", "lease", "foreign"])
async def test_a_cancel_that_was_asked_for_wins_over_another_attempt(bench: Bench, way: str) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.client.cancel(record.id, c.CancelRequest(actor="op", reason=Reason.CANCELLED_BY_OPERATOR))
    match way:
        case "finish":
            await bench.finish(record.id, Reason.NODE_LOST)
        case "release":
            await bench.client.release(record.id, c.Release(worker=WORKER, attempt=1, detail="drain"))
        case "lease":
            await bench.sql("UPDATE evaluations SET lease_until = now() - interval '1 s'")
            assert await bench.storage.upkeep.reclaim_expired() == 1
        case _:
            assert await bench.storage.reclaim_foreign("instance-2") == 1
    final = await bench.client.get(record.id)
    assert (final.state, final.reason) == (State.CANCELLED, Reason.CANCELLED_BY_OPERATOR)
    assert (await bench.events(record.id))[-1].actor == "op"
    assert await bench.claim() == []


async def test_cancelling_what_is_not_there_is_not_found(bench: Bench) -> None:
    assert await refused(bench.client.cancel(new_id(), _CANCEL)) == "not-found"


# -- loss


@pytest.mark.parametrize("reason", sorted(RETRYABLE_REASONS - {Reason.PREEMPTED}))
async def test_what_the_platform_keeps_losing_becomes_a_dead_letter(bench: Bench, reason: Reason) -> None:
    added = metric("dlq_additions_total", reason=reason)
    record = await bench.submit(priority=4)
    for attempt in (1, 2):
        assert (await bench.claim_one()).attempt == attempt
        await bench.start(record.id, attempt)
        again = await bench.finish(record.id, reason, attempt=attempt)
        assert (again.state, again.started_at) == (State.QUEUED, None)
    await bench.claim_one()
    final = await bench.finish(record.id, reason, attempt=3, peak_memory_bytes=5)
    assert (final.state, final.reason, final.attempt, final.peak_memory_bytes) == (State.FAILED, reason, 3, 5)
    assert final.detail == f"test: {reason} (lost 3 times; no attempt is left)"
    page = await bench.client.dead_letters()
    (letter,) = page.items
    assert (letter.evaluation_id, letter.owner, letter.reason, letter.attempts) == (record.id, "ada", reason, 3)
    assert (page.total, letter.replayed_as) == (1, None)
    assert metric("dlq_size") == 1
    assert await bench.finish(record.id, reason, attempt=3) == final
    assert metric("dlq_additions_total", reason=reason) == added + 1
    assert (await bench.client.dead_letters()).total == 1


async def test_a_lost_attempt_rests_longer_after_each_loss_and_then_wakes_who_waits_for_work() -> None:
    async with running_storage(retry_seconds=0.2, max_attempts=4) as bench:
        record = await bench.submit(priority=7)
        for attempt, base in ((1, 0.2), (2, 0.4), (3, 0.8)):
            began = asyncio.get_running_loop().time()
            (claim,) = await bench.claim(wait=20)
            assert claim.attempt == attempt
            # A claim that waits looks by itself only every 2 s: what ends its wait sooner is being woken.
            assert asyncio.get_running_loop().time() - began < 1.9
            lost = await bench.finish(record.id, Reason.NODE_LOST, attempt=attempt)
            assert lost.retry_at is not None
            assert lost.queued_at is not None
            assert base * 0.5 <= (lost.retry_at - lost.queued_at).total_seconds() <= base * 1.5
            assert await bench.claim() == []
            assert (await bench.client.position(record.id)).position == 1
        (last,) = await bench.claim(wait=20)
        assert (await bench.client.get(record.id)).retry_at is None
        await bench.client.release(record.id, c.Release(worker=WORKER, attempt=last.attempt, detail="drain"))
        assert (await bench.claim_one()).attempt == 5, "what was given back does not rest"
        again = await bench.finish(record.id, Reason.PREEMPTED, attempt=5)
        assert (again.state, again.retry_at) == (State.QUEUED, None)


async def test_rests_after_losses_are_bounded_and_spread() -> None:
    async with running_storage(retry_seconds=50) as bench:
        rests = []
        for _ in range(12):
            record = await bench.submit()
            await bench.client.claim_one(record.id, c.ClaimOne(worker=WORKER, key="k"))
            lost = await bench.finish(record.id, Reason.NODE_LOST)
            assert lost.retry_at is not None
            assert lost.queued_at is not None
            rests.append((lost.retry_at - lost.queued_at).total_seconds())
        assert max(rests) <= 60
        assert len(set(rests)) > 3


async def test_what_gives_way_on_purpose_is_queued_again_however_often(bench: Bench) -> None:
    record = await bench.submit()
    for attempt in range(1, 7):
        assert (await bench.claim_one()).attempt == attempt
        again = await bench.finish(record.id, Reason.PREEMPTED, attempt=attempt)
        assert again.state == State.QUEUED
    assert (await bench.client.dead_letters()).total == 0


async def test_a_dead_letter_is_replayed_whole_and_once(bench: Bench) -> None:
    record = await bench.submit("print(input())", stdin="x", priority=9, labels={"a": "b"}, memory_limit="512Mi")
    await _kill(bench, record)
    (letter,) = (await bench.client.dead_letters()).items
    replay_id = new_id()
    retries = metric("dlq_retries_total")
    replayed = await bench.client.replay(letter.id, replay_id)
    assert (replayed.id, replayed.replay_of, replayed.state) == (replay_id, record.id, State.QUEUED)
    assert await bench.client.payload(replay_id) == await bench.client.payload(record.id)
    same = ("owner", "priority", "labels", "resources", "size_class", "timeout_seconds", "image", "code_sha256")
    assert [getattr(replayed, name) for name in same] == [getattr(record, name) for name in same]
    assert (await bench.client.replay(letter.id, replay_id)).id == replay_id
    assert await refused(bench.client.replay(letter.id, new_id())) == "conflict"
    assert (await bench.client.dead_letters()).items[0].replayed_as == replay_id
    assert (metric("dlq_size"), metric("dlq_retries_total")) == (0, retries + 1)
    (count,) = await bench.sql("SELECT count(*) AS n FROM evaluations")
    assert count["n"] == 2


async def test_of_many_replays_at_once_one_counts(bench: Bench) -> None:
    await _kill(bench, await bench.submit())
    (letter,) = (await bench.client.dead_letters()).items
    answers = await asyncio.gather(
        *(bench.client.replay(letter.id, new_id()) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(answer, c.EvaluationRecord) for answer in answers) == 1
    assert (await bench.sql("SELECT count(*) AS n FROM evaluations"))[0]["n"] == 2


async def test_a_deleted_dead_letter_leaves_its_evaluation_readable(bench: Bench) -> None:
    record = await bench.submit()
    await _kill(bench, record)
    (letter,) = (await bench.client.dead_letters()).items
    await bench.client.delete_dead_letter(letter.id)
    assert (await bench.client.dead_letters()).items == []
    assert (await bench.client.get(record.id)).state is State.FAILED
    assert await refused(bench.client.delete_dead_letter(letter.id)) == "not-found"
    assert await refused(bench.client.replay(letter.id, new_id())) == "not-found"


async def test_dead_letters_come_in_pages_newest_first(bench: Bench) -> None:
    records = [await bench.submit() for _ in range(5)]
    for record in records:
        await _kill(bench, record)
    seen: list[str] = []
    cursor = None
    while True:
        page = await bench.client.dead_letters(limit=2, cursor=cursor)
        assert page.total == 5
        seen += [letter.evaluation_id for letter in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == [record.id for record in reversed(records)]
    assert await refused(bench.client.dead_letters(cursor="junk")) == "invalid-request"


async def _kill(bench: Bench, record: c.EvaluationRecord) -> None:
    for attempt in (1, 2, 3):
        (claim,) = await bench.claim(size=record.size_class)
        assert claim.evaluation_id == record.id
        await bench.finish(record.id, Reason.NODE_LOST, attempt=attempt)


# -- in a cluster


async def test_what_a_cluster_may_delete_is_told_with_the_end_and_after_it(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    final = await bench.finish(record.id, Reason.EXIT_NONZERO, collected=True)
    *_, ended, collected = await bench.events(record.id)
    assert (ended.type, collected.type) == ("failed", "collected")
    assert (collected.seq, collected.state, collected.reason) == (ended.seq + 1, State.FAILED, Reason.EXIT_NONZERO)
    assert (final.seq, final.state, collected.data) == (collected.seq, State.FAILED, {})
    await bench.finish(record.id, Reason.EXIT_NONZERO, collected=True)
    assert len(await bench.events(record.id)) == collected.seq
    await wait_until_async(
        lambda: [event.type for event in bench.heard][-2:] == ["failed", "collected"],
        timeout=5,
        describe="the bus to say both, in order",
    )


async def test_an_attempt_that_was_lost_is_queued_again_and_nothing_is_collected(bench: Bench) -> None:
    record = await bench.submit()
    for attempt in (1, 2, 3):
        await bench.claim_one()
        assert "collected" not in [event.type for event in await bench.events(record.id)]
        await bench.finish(record.id, Reason.NODE_LOST, attempt=attempt, collected=True)
    assert [event.type for event in await bench.events(record.id)][-2:] == ["failed", "collected"]


async def test_attempts_under_way_are_listed_page_by_page(bench: Bench) -> None:
    ids = sorted([(await bench.submit()).id for _ in range(5)])
    for _ in range(4):
        await bench.claim_one()
    (waiting,) = [each for each in ids if (await bench.client.get(each)).state is State.QUEUED]
    under_way = [each for each in ids if each != waiting]
    await bench.start(under_way[1])
    items: list[c.HeldAttempt] = []
    after: str | None = ""
    while after is not None:
        page = await bench.client.held(after=after, limit=2)
        items += page.items
        after = page.after
    assert [item.evaluation_id for item in items] == under_way
    assert [item.state for item in items] == [State.PROVISIONING, State.RUNNING, *[State.PROVISIONING] * 2]
    assert {item.attempt for item in items} == {1}
    record = await bench.client.get(under_way[1])
    assert items[1].since == record.started_at


# -- everything at once


_ENDS = [Reason.EXIT_ZERO, Reason.EXIT_NONZERO, Reason.NODE_LOST, Reason.CANCELLED_BY_USER, Reason.WALL_CLOCK]


def _words(bench: Bench, claim: c.Claim, worker: str, chance: random.Random) -> list[Coroutine[object, object, object]]:
    """All that is ever said about an attempt, some of it twice, in a random order."""
    told, attempt = claim.evaluation_id, claim.attempt
    output = [Frame(Kind.STDOUT, 0, f"attempt {attempt}".encode())]
    words: list[Coroutine[object, object, object]] = [
        bench.start(told, attempt),
        bench.start(told, attempt),
        bench.client.append_output(told, output, attempt=attempt, frame=0),
        bench.client.append_output(told, output, attempt=attempt, frame=0),
        bench.finish(told, chance.choice(_ENDS), attempt=attempt),
        bench.finish(told, chance.choice(_ENDS), attempt=attempt),
        bench.client.release(told, c.Release(worker=worker, attempt=attempt, detail="")),
    ]
    chance.shuffle(words)
    return words


async def _said(word: Coroutine[object, object, object], after: float) -> None:
    await pass_time(after)
    try:
        await word
    except CallFailedError as error:
        if error.slug != "stale-attempt":
            raise


async def _chaos(bench: Bench, evaluation_id: str, chance: random.Random) -> None:
    """Everyone who may speak about an evaluation does, at random moments, until it has ended."""

    async def over() -> bool:
        return (await bench.client.get(evaluation_id)).state.terminal

    async def holder(worker: str) -> None:
        while not await over():
            for claim in await bench.claim(worker=worker):
                words = _words(bench, claim, worker, chance)
                await asyncio.gather(*(_said(word, chance.uniform(0, 0.02)) for word in words))

    async def reaper() -> None:
        while not await over():
            await pass_time(chance.uniform(0, 0.04))
            await bench.sql("UPDATE evaluations SET lease_until = now() - interval '1 s' WHERE lease_until IS NOT NULL")
            await bench.storage.upkeep.reclaim_expired()

    async def canceller() -> None:
        await pass_time(chance.uniform(0, 0.1))
        if chance.random() < 0.6:
            await bench.client.cancel(evaluation_id, _CANCEL)

    await asyncio.gather(holder("w1"), holder("w2"), reaper(), canceller())


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_order_words_come_in_exactly_one_end_is_recorded(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    cursor = (await bench.client.event_stream()).cursor
    assert cursor is not None
    for _ in range(8):
        record = await bench.submit()
        await _chaos(bench, record.id, chance)
        final = await bench.client.get(record.id)
        events = await bench.events(record.id)
        assert [event.seq for event in events] == list(range(1, final.seq + 1))
        assert [event.state for event in events if event.state.terminal] == [final.state]
        for before, after in itertools.pairwise(events):
            assert after.state in TRANSITIONS[before.state]
            assert after.at >= before.at
            assert after.attempt >= before.attempt
        claims = [event.attempt for event in events if event.state is State.PROVISIONING]
        assert claims == list(range(1, len(claims) + 1))
        text, _ = await bench.client.output(record.id, "stdout")
        assert text in (b"", f"attempt {final.attempt}".encode())
    streamed = (await bench.client.event_stream(cursor=cursor, limit=1000)).events
    stored = await bench.sql("SELECT count(*) AS n FROM events")
    assert len(streamed) == stored[0]["n"]
    for evaluation_id in {event.evaluation_id for event in streamed}:
        assert await bench.events(evaluation_id) == [
            event.model_copy(update={"cursor": None}) for event in streamed if event.evaluation_id == evaluation_id
        ]
    assert (
        await bench.sql(
            "SELECT count(*) AS n FROM output_chunks AS c LEFT JOIN evaluations AS e "
            "ON e.id = c.evaluation_id AND e.attempt = c.attempt WHERE e.id IS NULL"
        )
    )[0]["n"] == 0
