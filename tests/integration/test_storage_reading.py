"""Reading back: lists that filter before they page, events that no cursor can miss, figures that the database computes."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from crucible import contracts as c
from crucible.evaluation import Reason, State
from crucible.frames import Frame, Kind
from crucible.storage.engine import compile_select
from crucible.storage.reading import make_cursor, page_statement
from tests.support.storage import Bench, new_evaluation, running_storage
from tests.support.waits import pass_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


async def walk(bench: Bench, *, limit: int = 3, **filters: Any) -> list[c.EvaluationRecord]:
    """Read a whole list page by page; every page but the last is full."""
    found: list[c.EvaluationRecord] = []
    cursor = None
    while True:
        page = await bench.client.page(limit=limit, cursor=cursor, **filters)
        found += page.items
        if page.next_cursor is None:
            return found
        assert len(page.items) == limit
        cursor = page.next_cursor


async def mixed(bench: Bench) -> list[c.EvaluationRecord]:
    """Evaluations of two owners in many states, oldest first."""
    chance = random.Random(21)
    ids = []
    for number in range(40):
        record = await bench.submit(
            owner=chance.choice(["ada", "bob"]),
            priority=chance.randint(0, 10),
            labels={"team": chance.choice(["red", "blue"]), "n": str(number % 4)},
        )
        ids.append(record.id)
        if chance.random() < 0.6:
            claim = await bench.claim_one()
            if chance.random() < 0.8:
                reason = chance.choice([Reason.EXIT_ZERO, Reason.EXIT_NONZERO, Reason.OOM_KILLED, Reason.WALL_CLOCK])
                await bench.finish(claim.evaluation_id, reason, attempt=claim.attempt)
        if chance.random() < 0.2:
            await bench.client.cancel(record.id, c.CancelRequest(actor="x"))
    return [await bench.client.get(evaluation_id) for evaluation_id in ids]


# -- lists


async def test_filters_work_before_pages_are_cut(bench: Bench) -> None:
    everything = list(reversed(await mixed(bench)))
    middle = everything[20].submitted_at
    cases: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda r: True),
        ({"owner": "ada"}, lambda r: r.owner == "ada"),
        ({"state": [State.QUEUED]}, lambda r: r.state is State.QUEUED),
        ({"state": [State.COMPLETED, State.FAILED]}, lambda r: r.state in (State.COMPLETED, State.FAILED)),
        ({"reason": [Reason.OOM_KILLED]}, lambda r: r.reason is Reason.OOM_KILLED),
        (
            {"reason": [Reason.OOM_KILLED, Reason.WALL_CLOCK]},
            lambda r: r.reason in (Reason.OOM_KILLED, Reason.WALL_CLOCK),
        ),
        ({"state": [State.TIMEOUT], "reason": [Reason.OOM_KILLED]}, lambda r: False),
        ({"priority": 3}, lambda r: r.priority == 3),
        ({"label": ["team=red"]}, lambda r: r.labels["team"] == "red"),
        ({"label": ["team=red", "n=2"]}, lambda r: (r.labels["team"], r.labels["n"]) == ("red", "2")),
        ({"since": middle}, lambda r: r.submitted_at >= middle),
        ({"until": middle}, lambda r: r.submitted_at < middle),
        ({"owner": "bob", "label": ["team=blue"], "since": middle}, lambda r: (
            r.owner == "bob" and r.labels["team"] == "blue" and r.submitted_at >= middle
        )),
    ]  # fmt: skip
    for filters, passes in cases:
        expected = [record for record in everything if passes(record)]
        assert await walk(bench, **filters) == expected, filters
    assert [len(await walk(bench, **filters)) for filters, _ in cases].count(0) <= 2


async def test_newcomers_neither_repeat_nor_hide_what_is_being_paged_through(bench: Bench) -> None:
    first = [record.id for record in [await bench.submit() for _ in range(10)]]
    page = await bench.client.page(limit=4)
    await bench.submit_many([new_evaluation() for _ in range(5)])
    seen = [record.id for record in page.items]
    while page.next_cursor:
        page = await bench.client.page(limit=4, cursor=page.next_cursor)
        seen += [record.id for record in page.items]
    assert seen == list(reversed(first))


async def test_evaluations_of_one_moment_are_all_listed(bench: Bench) -> None:
    items = [new_evaluation() for _ in range(25)]
    await bench.submit_many(items)
    assert [record.id for record in await walk(bench, limit=4)] == [item.id for item in reversed(items)]


async def test_a_time_may_be_given_in_any_zone_or_none(bench: Bench) -> None:
    record = await bench.submit()
    for since in (
        record.submitted_at,
        record.submitted_at.astimezone(timezone(timedelta(hours=9))),
        record.submitted_at.replace(tzinfo=None),
    ):
        assert len((await bench.client.page(since=since)).items) == 1
        assert (await bench.client.page(until=since)).items == []


@pytest.mark.parametrize(
    "hostile", ["x' OR '1'='1", "ada'; DROP TABLE evaluations; --", "$1", "%", "a\\", "\u202eada", "{}", "ada\n"]
)
async def test_hostile_filters_find_nothing_and_harm_nothing(bench: Bench, hostile: str) -> None:
    record = await bench.submit(labels={"team": "red"})
    assert (await bench.client.page(owner=hostile)).items == []
    assert (await bench.client.page(label=[f"team={hostile}"])).items == []
    assert (await bench.client.page(label=[f"{hostile}=red"])).items == []
    assert (await bench.client.statistics(owner=hostile)).total == 0
    assert (await bench.client.event_stream(owner=hostile, cursor=make_cursor(0, 0))).events == []
    assert await bench.client.get(record.id) == record


@pytest.mark.parametrize(
    "query",
    [
        "owner=a%00b",
        "label=a%00b%3Dc",
        "label=nonsense",
        "label=%3Dx",
        "cursor=%00",
        "cursor=AAAA",
        "cursor=" + make_cursor(10**18 - 1, 0) + "x",
        "limit=0",
        "limit=1001",
        "limit=x",
        "state=done",
        "reason=bad-luck",
        "priority=9999999999999999999",
        "priority=x",
        "since=yesterday",
        "owner=%ED%A0%80",
    ],
)
async def test_a_filter_that_cannot_be_is_a_clear_4xx(bench: Bench, query: str) -> None:
    await bench.submit(labels={"a": "b"})
    response = await bench.client._http.get(f"/internal/evaluations?{query}")
    if query == "owner=%ED%A0%80":  # not UTF-8: the server reads it as replacement characters, which nobody is called
        assert (response.status_code, response.json()["items"]) == (200, [])
        return
    assert response.status_code in (400, 422), response.text
    assert response.json()["type"] == "/problems/invalid-request"


async def test_the_largest_cursor_is_a_place_like_any_other(bench: Bench) -> None:
    record = await bench.submit()
    page = await bench.client.page(cursor=make_cursor(10**18 - 1, 10**18 - 1))
    assert [found.id for found in page.items] == [record.id]
    assert (await bench.client.page(cursor=make_cursor(0, 0))).items == []


async def test_lists_over_100000_evaluations_walk_an_index(bench: Bench) -> None:
    await bench.sql(
        """INSERT INTO evaluations (id, owner, state, reason, priority, effective_priority, size_class, cpu_millis,
                                    memory_bytes, image, labels, timeout_seconds, code_sha256, seq, request_sha256,
                                    submitted_at, finished_at)
           SELECT 'ev-' || lpad(n::text, 26, '0'), 'owner-' || n % 50,
                  CASE WHEN n % 1000 = 0 THEN 'timeout' ELSE 'completed' END,
                  CASE WHEN n % 1000 = 0 THEN 'wall_clock' ELSE 'exit_zero' END, n % 11, n % 11, 'small', 250, 268435456,
                  'python', CASE WHEN n % 500 = 0 THEN '{"rare": "yes"}' ELSE '{}' END::jsonb, 60, '', 5, '',
                  now() - n * interval '1 s', now()
             FROM generate_series(1, 100000) AS n"""
    )
    await bench.sql("ANALYZE evaluations")
    deep = make_cursor(int((datetime.now(UTC) - timedelta(seconds=90_000)).timestamp() * 1e6), 5)
    filters: list[dict[str, Any]] = [
        {"cursor": deep},
        {"owner": "owner-7"},
        {"owner": "owner-7", "cursor": deep},
        {"state": [State.TIMEOUT], "cursor": deep},
        {"reason": [Reason.WALL_CLOCK]},
        {"state": [State.RUNNING]},
        {"label": ["rare=yes"]},
        {"since": datetime.now(UTC) - timedelta(seconds=99_990), "cursor": deep},
    ]
    nothing: dict[str, Any] = dict.fromkeys(("owner", "priority", "since", "until", "cursor")) | dict.fromkeys(
        ("state", "reason", "label"), ()
    )
    async with bench.connection() as connection:
        for chosen in filters:
            sql, args = compile_select(page_statement(**(nothing | chosen), limit=51))
            plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {sql}", *args))
            assert "Seq Scan" not in plan, (chosen, plan)
            assert "Rows Removed by Filter" not in plan or "rare" in str(chosen), (chosen, plan)
    page = await bench.client.page(owner="owner-7", limit=100, cursor=deep)
    assert len(page.items) == 100


# -- events


async def test_events_after_a_number_are_the_rest(bench: Bench) -> None:
    record = await bench.run_one()
    assert [event.seq for event in await bench.events(record.id)] == [1, 2, 3, 4, 5]
    assert [event.seq for event in (await bench.client.events(record.id, after=3)).events] == [4, 5]
    assert (await bench.client.events(record.id, after=99)).events == []


async def stream(bench: Bench, cursor: str, **fields: Any) -> tuple[list[tuple[str, int]], str]:
    found: list[tuple[str, int]] = []
    while True:
        answer = await bench.client.event_stream(cursor=cursor, **fields)
        found += [(event.evaluation_id, event.seq) for event in answer.events]
        assert answer.cursor is not None
        if not answer.events:
            return found, answer.cursor
        cursor = answer.cursor


async def test_a_stream_begins_now_and_gives_every_event_once(bench: Bench) -> None:
    await bench.run_one()
    beginning = await bench.client.event_stream()
    assert beginning.events == []
    assert beginning.cursor is not None
    records = [await bench.run_one() for _ in range(3)]
    expected = [(record.id, seq) for record in records for seq in range(1, 6)]
    for limit in (1, 2, 500):
        found, _ = await stream(bench, beginning.cursor, limit=limit)
        assert found == expected


async def test_a_stream_goes_on_after_any_of_its_events(bench: Bench) -> None:
    beginning = (await bench.client.event_stream()).cursor
    assert beginning is not None
    await bench.run_one()
    events = (await bench.client.event_stream(cursor=beginning)).events
    for place, event in enumerate(events):
        assert event.cursor is not None
        found, _ = await stream(bench, event.cursor)
        assert found == [(later.evaluation_id, later.seq) for later in events[place + 1 :]]


async def test_a_stream_can_be_one_owners(bench: Bench) -> None:
    beginning = (await bench.client.event_stream()).cursor
    assert beginning is not None
    await bench.submit(owner="ada")
    bobs = await bench.submit(owner="bob")
    found, reached = await stream(bench, beginning, owner="bob")
    assert found == [(bobs.id, 1), (bobs.id, 2)]
    # What belongs to others has been passed for good, too.
    await bench.submit(owner="ada")
    assert (await stream(bench, reached, owner="bob"))[0] == []


async def test_a_transaction_that_commits_late_is_not_passed_over(bench: Bench) -> None:
    """Its events have lower numbers than others that are committed and could be read long before."""
    beginning = (await bench.client.event_stream()).cursor
    assert beginning is not None
    early, late = await bench.submit(), await bench.submit()
    found, cursor = await stream(bench, beginning)
    assert len(found) == 4
    async with bench.connection() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            """INSERT INTO events (evaluation_id, seq, type, at, owner, actor, state, attempt, data)
               VALUES ($1, 3, 'cancelled', now(), 'ada', 'test', 'cancelled', 0, '{}')""",
            late.id,
        )
        await bench.client.cancel(early.id, c.CancelRequest(actor="ada"))
        assert [event.seq for event in await bench.events(early.id)] == [1, 2, 3]
        for _ in range(3):
            found, cursor = await stream(bench, cursor)
            assert found == []
        await transaction.commit()
    found, cursor = await stream(bench, cursor)
    assert found == [(late.id, 3), (early.id, 3)]
    assert (await stream(bench, cursor))[0] == []


async def test_a_reader_that_races_with_writers_misses_nothing(bench: Bench) -> None:
    cursor = (await bench.client.event_stream()).cursor
    assert cursor is not None
    heard: list[tuple[str, int]] = []

    async def write() -> None:
        for _ in range(6):
            await bench.submit_many([new_evaluation() for _ in range(random.Random().choice([1, 30]))])

    writers = asyncio.gather(*(write() for _ in range(6)))
    while not writers.done():
        found, cursor = await stream(bench, cursor)
        heard += found
        await pass_time(0)
    heard += (await stream(bench, cursor))[0]
    rows = await bench.sql("SELECT evaluation_id, seq FROM events")
    assert sorted(heard) == sorted((row["evaluation_id"], row["seq"]) for row in rows)
    for evaluation_id in {evaluation_id for evaluation_id, _ in heard}:
        assert [seq for each, seq in heard if each == evaluation_id] == [1, 2]


@pytest.mark.parametrize("cursor", ["junk", "", "%00", make_cursor(10**18 - 1, 10**18 - 1)])
async def test_a_stream_cursor_that_cannot_be_is_refused_or_has_nothing_after_it(bench: Bench, cursor: str) -> None:
    await bench.submit()
    response = await bench.client._http.get(f"/internal/events?cursor={cursor}")
    if response.status_code == 200:
        assert response.json() == {"events": [], "cursor": cursor}
    else:
        assert response.status_code == 422


# -- figures


async def test_statistics_are_what_counting_by_hand_gives(bench: Bench) -> None:
    records = await mixed(bench)
    for owner in (None, "ada", "nobody"):
        for since in (None, records[15].submitted_at):
            chosen = [
                record
                for record in records
                if owner in (None, record.owner) and (since is None or record.submitted_at >= since)
            ]
            figures = await bench.client.statistics(owner=owner, since=since)
            assert figures.total == figures.last_24h == len(chosen)
            for name, attribute in (("by_state", "state"), ("by_reason", "reason"), ("by_priority", "priority")):
                values = [getattr(record, attribute) for record in chosen if getattr(record, attribute) is not None]
                assert getattr(figures, name) == {value: values.count(value) for value in set(values)}
            ended = [record for record in chosen if record.state.terminal]
            completed = [record for record in ended if record.state is State.COMPLETED]
            assert figures.success_rate == (len(completed) / len(ended) if ended else None)


async def test_percentiles_are_interpolated_over_times(bench: Bench) -> None:
    for number in range(1, 11):
        record = await bench.run_one()
        await bench.sql(
            """UPDATE evaluations SET provisioning_at = queued_at + $2::interval, started_at = queued_at + $2::interval,
                      finished_at = queued_at + $2::interval * 3, cpu_seconds = 0.5 WHERE id = $1""",
            record.id,
            timedelta(seconds=number),
        )
    figures = await bench.client.statistics()
    assert (figures.wait_seconds_p50, figures.wait_seconds_p95) == (pytest.approx(5.5), pytest.approx(9.55))
    assert (figures.run_seconds_p50, figures.run_seconds_p95) == (pytest.approx(11), pytest.approx(19.1))
    assert figures.cpu_seconds == pytest.approx(5)


async def test_nothing_has_no_figures(bench: Bench) -> None:
    figures = await bench.client.statistics()
    assert (figures.total, figures.success_rate, figures.wait_seconds_p50) == (0, None, None)


async def test_reads_go_on_beside_writes_and_see_whole_records(bench: Bench) -> None:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)

    async def write() -> None:
        for batch in range(40):
            frames = [Frame(Kind.STDOUT, 0, b"x" * 10), Frame(Kind.STDERR, 0, b"y" * 5)]
            await bench.client.append_output(record.id, frames, attempt=1, frame=2 * batch)

    writing = asyncio.create_task(write())
    while not writing.done():
        seen = await bench.client.get(record.id)
        assert seen.stdout.size == 2 * seen.stderr.size
    await writing
