"""Alembic's entry point. It only ever runs on a connection that `crucible.storage.migrate` hands in."""

from __future__ import annotations

from alembic import context

from crucible.storage.migrate import LOCK_KEY
from crucible.storage.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    # Services that start together take turns; the lock goes with the transaction, even if this process dies.
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
    context.run_migrations()
