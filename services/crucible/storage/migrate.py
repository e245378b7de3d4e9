"""Bring a database to the schema of this version, before anything else uses it.

Several services may start at once: an advisory lock lets one migrate and the others find it done. A database that is already
up to date is recognised with one query, without loading Alembic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from crucible import logs
from crucible.storage.engine import connect, unavailable_if_down

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logs.get_logger("storage.migrate")

# The newest file in migrations/versions; a test holds the two together.
HEAD = "0003"
LOCK_KEY = 0x6372756369626C65  # "crucible"
_FOLDER = Path(__file__).parent / "migrations"


class MigrationError(Exception):
    """The database cannot be brought to this version's schema; the message says why."""


async def migrate(url: str, revision: str = "head") -> None:
    """Upgrade (or, with an older `revision`, downgrade) the database at `url` (`postgresql://...`).

    Any number of processes may do so at once; within one process, once at a time (Alembic keeps its context in globals).

    Raises:
        MigrationError: the schema is newer than this program, or not ours.
        ProblemError: `unavailable`, the database does not answer.
    """
    present = await _present_revision(url)
    if present == (HEAD if revision == "head" else revision):
        return
    await _run(url, present, revision)
    log.info("the database schema was migrated", was=present or "empty", now=await _present_revision(url))


async def _present_revision(url: str) -> str | None:
    async with connect(url) as connection:
        with unavailable_if_down():
            if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
                return None
            found: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
            return found


async def _run(url: str, present: str | None, revision: str) -> None:
    # Alembic takes a while to load; only a start that migrates waits for it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        raise MigrationError(f"the database has schema {present}, which this version does not know (newest: {HEAD})")
    back = revision == "base" or (present is not None and revision != "head" and revision < present)

    def step(connection: Connection) -> None:
        config.attributes["connection"] = connection
        (command.downgrade if back else command.upgrade)(config, revision)

    # The driver reads the URL itself: SQLAlchemy's own form differs where a unix socket is named.
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), poolclass=NullPool
    )
    with unavailable_if_down():
        async with engine.connect() as connection:
            await connection.run_sync(step)
    await engine.dispose()
