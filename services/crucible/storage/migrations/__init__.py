"""Alembic's folder: how the database comes to have the schema of `crucible.storage.tables`."""
