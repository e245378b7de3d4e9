"""Migrations lead to the schema that the tables describe, once, whoever starts first; and history cannot be rewritten."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from crucible.storage import MigrationError, migrate
from crucible.storage.tables import metadata
from tests.support.postgres import empty_database
from tests.support.storage import running_storage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

_SCHEMA = {
    "columns": """
        SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity, identity_generation
          FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2""",
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes
         WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1, 2""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
         WHERE connamespace = 'public'::regnamespace AND conrelid <> coalesce(to_regclass('alembic_version'), 0::oid)
         ORDER BY 1, 2""",
}


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with empty_database() as url:
        yield url


async def query(url: str, sql: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(sql)
    finally:
        await connection.close()


async def schema_of(url: str) -> dict[str, list[tuple[object, ...]]]:
    return {name: [tuple(row) for row in await query(url, sql)] for name, sql in _SCHEMA.items()}


async def create_from_tables(url: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


async def test_migrations_give_the_schema_that_the_tables_describe(url: str) -> None:
    await migrate(url)
    migrated = await schema_of(url)
    async with empty_database() as other:
        await create_from_tables(other)
        described = await schema_of(other)
    assert migrated == described
    assert {row[0] for row in migrated["columns"]} == set(metadata.tables)


async def test_the_schema_can_be_taken_back_and_made_again(url: str) -> None:
    await migrate(url)
    first = await schema_of(url)
    await migrate(url, "base")
    assert await schema_of(url) == {"columns": [], "indexes": [], "constraints": []}
    assert await query(url, "SELECT 1 FROM pg_proc WHERE proname = 'refuse_to_change_events'") == []
    await migrate(url)
    assert await schema_of(url) == first


async def test_services_that_start_together_migrate_once(url: str) -> None:
    program = "import asyncio, sys; from crucible.storage import migrate; asyncio.run(migrate(sys.argv[1]))"
    starting = [await asyncio.create_subprocess_exec(sys.executable, "-c", program, url) for _ in range(3)]
    assert [await process.wait() for process in starting] == [0, 0, 0]
    assert len(await query(url, "SELECT * FROM alembic_version")) == 1


async def test_a_schema_of_a_newer_version_is_refused_and_named(url: str) -> None:
    await migrate(url)
    await query(url, "UPDATE alembic_version SET version_num = '9999' RETURNING 1")
    with pytest.raises(MigrationError, match="9999"):
        await migrate(url)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET actor = 'someone else'",
        "UPDATE events SET seq = seq + 100",
        "DELETE FROM events",
        "TRUNCATE events",
    ],
)
async def test_history_cannot_be_rewritten(change: str) -> None:
    async with running_storage() as bench:
        record = await bench.submit()
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
            await bench.sql(change)
        assert len(await bench.events(record.id)) == 2


async def test_an_evaluation_never_has_two_events_of_one_number() -> None:
    async with running_storage() as bench:
        record = await bench.submit()
        with pytest.raises(asyncpg.UniqueViolationError):
            await bench.sql(
                """INSERT INTO events (evaluation_id, seq, type, at, owner, actor, state, attempt, data)
                   VALUES ($1, 2, 'queued', now(), 'ada', 'x', 'queued', 0, '{}')""",
                record.id,
            )
