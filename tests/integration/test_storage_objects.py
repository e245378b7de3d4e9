"""The object store: what is written is accounted for, can move between backends whatever dies, and goes when it is due.

S3 is played by moto's server on loopback, a stand-in: it shows that requests are signed, addressed and read as S3's API has it.
It does not show S3's own consistency, limits, throttling, encryption or permissions, and moto checks no signature.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import stat
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
import structlog

from crucible import contracts as c
from crucible.evaluation import Reason, State
from crucible.frames import Frame, Kind
from crucible.limits import Limits
from crucible.resilience import CallFailedError
from tests.support.aws import played_by_moto
from tests.support.postgres import fresh_database
from tests.support.storage import Bench, running_storage, storage_over
from tests.support.waits import pass_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.integration

# Every output becomes an object.
_ALL_OBJECTS = Limits(inline_output_bytes=1)
_BUCKET = "outputs"


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage(limits=_ALL_OBJECTS) as bench:
        yield bench


@pytest.fixture(scope="module")
def s3_by_moto(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from played_by_moto(
        request, "S3 is played by moto on loopback; see the module's docstring for what that leaves open"
    )


@pytest.fixture
def s3_endpoint(s3_by_moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    client = boto3.client("s3", endpoint_url=s3_by_moto, region_name="us-east-1")
    client.create_bucket(Bucket=_BUCKET)
    yield s3_by_moto
    for entry in client.list_objects_v2(Bucket=_BUCKET).get("Contents", []):
        client.delete_object(Bucket=_BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=_BUCKET)


def s3_keys(endpoint: str) -> list[str]:
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=_BUCKET).get("Contents", [])]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def ended_with_output(bench: Bench, text: bytes) -> str:
    record = await bench.submit()
    await bench.claim_one()
    await bench.client.append_output(record.id, [Frame(Kind.STDOUT, 0, text)], attempt=1, frame=0)
    await bench.finish(record.id)
    return record.id


async def outputs(bench: Bench, count: int) -> dict[str, bytes]:
    chance = random.Random(count)
    return {await ended_with_output(bench, text): text for text in (chance.randbytes(5000) for _ in range(count))}


async def assert_readable(bench: Bench, written: dict[str, bytes]) -> None:
    for evaluation_id, text in written.items():
        assert (await bench.client.output(evaluation_id, "stdout"))[0] == text


# -- S3


async def test_s3_by_moto_holds_outputs_like_a_folder_does(s3_endpoint: str) -> None:
    url = f"s3://{_BUCKET}/crucible"
    async with running_storage(limits=_ALL_OBJECTS, objects_url=url, s3_endpoint=s3_endpoint) as bench:
        text = random.Random(1).randbytes(9 * 1024 * 1024)
        record = await bench.submit()
        await bench.claim_one()
        for batch in range(9):
            piece = text[batch * 1024 * 1024 : (batch + 1) * 1024 * 1024]
            await bench.client.append_output(record.id, [Frame(Kind.STDERR, 0, piece)], attempt=1, frame=batch)
        final = await bench.finish(record.id)
        assert final.stderr == c.OutputInfo(size=len(text), sha256=hashlib.sha256(text).hexdigest())
        assert (await bench.client.output(record.id, "stderr", start=4_000_000, length=700_000))[0] == text[
            4_000_000:4_700_000
        ]
        assert (await bench.client.output(record.id, "stderr"))[0] == text
        keys = s3_keys(s3_endpoint)
        assert len(keys) == 3
        assert all(key.startswith(f"crucible/output/{record.id}/1/") for key in keys)
        usage = await bench.client.usage()
        assert usage.primary == url
        assert [(held.backend, held.objects) for held in usage.backends] == [(url, 3)]
        await bench.sql("UPDATE evaluations SET finished_at = now() - interval '2 days'")
        assert (await bench.client.cleanup(c.CleanupRequest(older_than_days=1))).objects == 3
        assert s3_keys(s3_endpoint) == []


async def test_outputs_move_from_the_folder_to_s3_by_moto_and_stay_readable(s3_endpoint: str) -> None:
    url = f"s3://{_BUCKET}/moved"
    async with running_storage(limits=_ALL_OBJECTS, s3_endpoint=s3_endpoint) as bench:
        written = await outputs(bench, 7)
        first = await bench.client.migrate(c.MigrateRequest(target=url, limit=3))
        assert (first.moved, first.moved_bytes, first.remaining, first.failed) == (3, 3 * 5013, 4, [])
        await assert_readable(bench, written)
        while (await bench.client.migrate(c.MigrateRequest(target=url, limit=3))).remaining:
            pass
        assert len(s3_keys(s3_endpoint)) == 7
        assert files_in(bench.data_dir / "objects") == []
        await assert_readable(bench, written)
        # Started anew, with settings that have not heard of the move, with S3 as the primary, and to be moved back.
        settings = {"limits": _ALL_OBJECTS, "s3_endpoint": s3_endpoint}
        async with storage_over(bench.url, bench.data_dir, instance="1", **settings) as unaware:
            await assert_readable(unaware, written)
        async with storage_over(bench.url, bench.data_dir, instance="2", objects_url=url, **settings) as other:
            await assert_readable(other, written)
        async with storage_over(
            bench.url, bench.data_dir, instance="3", objects_fallback_urls=(url,), **settings
        ) as back:
            await assert_readable(back, written)
            assert (await back.client.migrate(c.MigrateRequest(target="local"))).remaining == 0
            await assert_readable(back, written)
        assert s3_keys(s3_endpoint) == []


async def test_s3_that_does_not_answer_makes_a_migration_unavailable_and_changes_nothing(bench: Bench) -> None:
    written = await outputs(bench, 2)
    settings = {"limits": _ALL_OBJECTS, "s3_endpoint": "http://127.0.0.1:1"}
    async with storage_over(bench.url, bench.data_dir, instance="2", **settings) as cut_off:
        answer = await cut_off.client._http.post("/internal/migrate", json={"target": f"s3://{_BUCKET}/x"}, timeout=60)
        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/unavailable"
    await assert_readable(bench, written)


# -- moving


async def test_a_migration_killed_at_any_moment_goes_on_where_it_was(bench: Bench) -> None:
    """The program that migrates is killed with SIGKILL, again and again, at random moments."""
    target = f"file://{bench.data_dir}/target"
    written = await outputs(bench, 60)
    chance = random.Random(7)
    for _ in range(6):
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _MIGRATE, bench.url, str(bench.data_dir), target, stdout=asyncio.subprocess.PIPE
        )
        assert program.stdout is not None
        assert await program.stdout.readline() == b"ready\n"
        await pass_time(chance.uniform(0, 0.12))
        if program.returncode is None:
            program.send_signal(signal.SIGKILL)
        await program.communicate()
        await assert_readable(bench, dict(list(written.items())[::7]))
    moved_by_killed = (await bench.sql("SELECT count(*) AS n FROM objects WHERE backend = $1", target))[0]["n"]
    assert moved_by_killed > 0
    while (await bench.client.migrate(c.MigrateRequest(target=target, limit=17))).remaining:
        pass
    await assert_readable(bench, written)
    await bench.storage.objects.sweep()
    assert files_in(bench.data_dir / "objects") == []
    assert (await bench.sql("SELECT count(*) AS n FROM object_garbage"))[0]["n"] == 0
    # A write that was cut off may leave a piece beside its object; it goes when the object goes.
    whole = [path for path in files_in(bench.data_dir / "target") if "#" not in path.name]
    assert len(whole) == 60
    await bench.client.cleanup(c.CleanupRequest(older_than_days=0))
    assert list((bench.data_dir / "target").iterdir()) == []


_MIGRATE = """
import asyncio, sys
from pathlib import Path
from crucible import logs
from crucible.contracts import MigrateRequest
from crucible.settings import LogSettings, StorageSettings
from crucible.storage.engine import Database
from crucible.storage.objects import ObjectStore

async def main(url, data_dir, target):
    logs.configure("migration", LogSettings(level="error"))
    database = Database(url, 2)
    await database.open()
    store = ObjectStore(database, StorageSettings(), Path(data_dir))
    await store.open()
    print("ready", flush=True)
    while (await store.migrate(MigrateRequest(target=target, limit=5))).remaining:
        pass

asyncio.run(main(*sys.argv[1:]))
"""


async def test_an_object_that_does_not_match_is_named_and_left_where_it_is(bench: Bench) -> None:
    written = await outputs(bench, 3)
    (first, second, third) = await bench.sql("SELECT key FROM objects ORDER BY id")
    changed, gone = bench.data_dir / "objects" / first["key"], bench.data_dir / "objects" / second["key"]
    changed.write_bytes(b"x" + changed.read_bytes()[1:])
    gone.unlink()
    target = f"file://{bench.data_dir}/target"
    for _ in range(2):
        result = await bench.client.migrate(c.MigrateRequest(target=target, limit=3))
        assert sorted(result.failed) == sorted([first["key"], second["key"]])
        assert result.remaining == 2
    assert [path.relative_to(bench.data_dir / "target").as_posix() for path in files_in(bench.data_dir / "target")] in (
        [third["key"]],
        sorted([third["key"], first["key"]]),  # its copy is marked as garbage and goes within the hour
        sorted([third["key"], first["key"]], reverse=True),
    )
    await bench.sql("UPDATE object_garbage SET due_at = now()")
    await bench.storage.objects.sweep()
    assert len(files_in(bench.data_dir / "target")) == 1
    assert changed.exists()
    # What failed does not stand in the way of the rest.
    more = await outputs(bench, 2)
    result = await bench.client.migrate(c.MigrateRequest(target=target, limit=2))
    assert (result.moved, result.failed, result.remaining) == (2, [], 2)
    await assert_readable(bench, {**more, **dict([list(written.items())[2]])})


async def test_two_migrations_at_once_lose_nothing(bench: Bench) -> None:
    written = await outputs(bench, 20)
    target = f"file://{bench.data_dir}/target"
    request = c.MigrateRequest(target=target, limit=20)
    async with storage_over(bench.url, bench.data_dir, instance="2") as other:
        await asyncio.gather(bench.client.migrate(request), other.client.migrate(request), return_exceptions=True)
    while (await bench.client.migrate(request)).remaining:
        pass
    await bench.sql("UPDATE object_garbage SET due_at = now()")
    await bench.storage.objects.sweep()
    await assert_readable(bench, written)
    assert files_in(bench.data_dir / "objects") == []


async def test_a_target_that_is_no_object_store_is_refused(bench: Bench) -> None:
    with pytest.raises(CallFailedError) as caught:
        await bench.client.migrate(c.MigrateRequest(target="ftp://somewhere"))
    assert caught.value.slug == "invalid-request"


# -- accounting


async def test_a_copy_that_nobody_came_to_need_is_swept(bench: Bench) -> None:
    stored = await bench.storage.objects.write("output/abandoned", b"left behind")
    await bench.storage.objects.sweep()
    assert len(files_in(bench.data_dir / "objects")) == 1
    await bench.sql("UPDATE object_garbage SET due_at = now()")
    assert await bench.storage.objects.sweep() == 1
    assert files_in(bench.data_dir / "objects") == []
    async with bench.storage.database.transaction() as connection:
        with pytest.raises(Exception, match="swept"):
            await bench.storage.objects.adopt(connection, stored)


async def test_the_sweep_never_takes_what_counts(bench: Bench) -> None:
    written = await outputs(bench, 2)
    await bench.sql("INSERT INTO object_garbage (backend, key, due_at) SELECT backend, key, now() FROM objects")
    await bench.storage.objects.sweep()
    await assert_readable(bench, written)
    assert (await bench.sql("SELECT count(*) AS n FROM object_garbage"))[0]["n"] == 0


async def test_the_data_folder_may_be_moved(bench: Bench) -> None:
    written = await outputs(bench, 2)
    elsewhere = bench.data_dir / "moved"
    elsewhere.mkdir()
    (bench.data_dir / "objects").rename(elsewhere / "objects")
    async with storage_over(bench.url, elsewhere, instance="2") as other:
        await assert_readable(other, written)


@pytest.mark.parametrize(
    ("named", "why"),
    [(False, "objects_url is unset: a folder under the data folder"), (True, "objects_url names it")],
)
async def test_a_start_says_once_which_backend_is_primary_and_why(tmp_path: Path, named: bool, why: str) -> None:
    url = f"file://{tmp_path}/named"
    settings = {"objects_url": url, "objects_fallback_urls": (f"file://{tmp_path}/old",)} if named else {}
    async with fresh_database() as database:
        with structlog.testing.capture_logs() as records:
            async with storage_over(database, tmp_path, **settings) as bench:
                await bench.run_one()
    (record,) = [record for record in records if record["event"] == "object store"]
    assert (record["primary"], record["why"]) == (url if named else "local", why)
    assert record["fallbacks"] == ([f"file://{tmp_path}/old"] if named else [])


# -- retention


async def age(bench: Bench, evaluation_id: str, by: timedelta) -> None:
    await bench.sql("UPDATE evaluations SET finished_at = finished_at - $2::interval WHERE id = $1", evaluation_id, by)


async def rows_of(bench: Bench, evaluation_id: str) -> dict[str, int]:
    tables = {"evaluations": "id"} | dict.fromkeys(
        ("payloads", "events", "output_chunks", "dead_letters"), "evaluation_id"
    )
    return {
        table: (await bench.sql(f"SELECT count(*) AS n FROM {table} WHERE {column} = $1", evaluation_id))[0]["n"]
        for table, column in tables.items()
    }


async def test_retention_deletes_what_ended_long_ago_and_nothing_else(bench: Bench) -> None:
    old, young, waiting = (
        await ended_with_output(bench, b"old"),
        await ended_with_output(bench, b"young"),
        await bench.submit(),
    )
    await age(bench, old, timedelta(days=8))
    await bench.sql("UPDATE evaluations SET submitted_at = now() - interval '1 year' WHERE id = $1", waiting.id)
    request = c.CleanupRequest(older_than_days=7)
    dry = await bench.client.cleanup(request.model_copy(update={"dry_run": True}))
    assert dry == c.CleanupResult(evaluations=1, objects=1, bytes=16, dry_run=True, remaining=0)
    assert (await rows_of(bench, old))["events"] == 5
    done = await bench.client.cleanup(request)
    assert done == c.CleanupResult(evaluations=1, objects=1, bytes=16, dry_run=False, remaining=0)
    assert set((await rows_of(bench, old)).values()) == {0}
    assert len(files_in(bench.data_dir / "objects")) == 1
    assert (await bench.client.output(young, "stdout"))[0] == b"young"
    assert (await bench.client.get(waiting.id)).state is State.QUEUED
    again = await bench.client.cleanup(request)
    assert (again.evaluations, again.objects) == (0, 0)


async def test_retention_goes_in_steps_and_tells_what_remains(bench: Bench) -> None:
    for text in (b"one", b"two", b"three", b"four", b"five"):
        await age(bench, await ended_with_output(bench, text), timedelta(days=8))
    remaining = []
    for _ in range(3):
        done = await bench.client.cleanup(c.CleanupRequest(older_than_days=7, limit=2))
        remaining.append((done.evaluations, done.remaining))
    assert remaining == [(2, 3), (2, 1), (1, 0)]


async def test_retention_takes_dead_letters_along(bench: Bench) -> None:
    record = await bench.submit()
    for attempt in (1, 2, 3):
        await bench.claim_one()
        await bench.finish(record.id, Reason.NODE_LOST, attempt=attempt)
    await age(bench, record.id, timedelta(days=8))
    assert (await bench.client.cleanup(c.CleanupRequest(older_than_days=7))).evaluations == 1
    assert (await bench.client.dead_letters()).total == 0


async def test_an_idempotency_key_is_free_again_after_retention(bench: Bench) -> None:
    record = await bench.submit(key="k", request="r")
    await bench.claim_one()
    await bench.finish(record.id)
    await age(bench, record.id, timedelta(days=8))
    await bench.client.cleanup(c.CleanupRequest(older_than_days=7))
    assert (await bench.submit(key="k", request="r")).id != record.id


async def test_usage_tells_where_the_bytes_are(bench: Bench) -> None:
    await ended_with_output(bench, b"12345")
    await bench.run_one(owner="bob")
    usage = await bench.client.usage()
    assert usage.primary == "local"
    assert usage.database_bytes > 1_000_000
    assert usage.inline_output_bytes == 0
    assert usage.backends == [c.BackendUsage(backend="local", objects=1, bytes=18)]
    assert [(owner.owner, owner.evaluations, owner.output_bytes) for owner in usage.owners] == [
        ("ada", 1, 5),
        ("bob", 1, 0),
    ]


async def test_other_users_of_the_machine_cannot_read_the_folder(bench: Bench) -> None:
    assert stat.S_IMODE((bench.data_dir / "objects").stat().st_mode) == 0o700


# -- none at all


async def test_without_a_store_large_outputs_stay_in_the_database_whole() -> None:
    async with running_storage(limits=_ALL_OBJECTS, objects_url="database") as bench:
        text = random.Random(2).randbytes(9 * 1024 * 1024)
        record = await bench.submit()
        await bench.claim_one()
        for number in range(9):
            piece = text[number * 1024 * 1024 : (number + 1) * 1024 * 1024]
            await bench.client.append_output(record.id, [Frame(Kind.STDOUT, 0, piece)], attempt=1, frame=number)
        final = await bench.finish(record.id)
        assert final.stdout == c.OutputInfo(size=len(text), sha256=hashlib.sha256(text).hexdigest())
        assert (await bench.client.output(record.id, "stdout"))[0] == text
        middle = (await bench.client.output(record.id, "stdout", start=4_000_000, length=700_000))[0]
        assert middle == text[4_000_000:4_700_000]
        usage = await bench.client.usage()
        assert usage.primary == "database"
        assert usage.inline_output_bytes == len(text)
        assert usage.backends == []
