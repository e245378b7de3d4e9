"""The owner of PostgreSQL and the object store."""

from crucible.storage.app import make_storage_app
from crucible.storage.migrate import MigrationError, migrate
from crucible.storage.storage import Storage

__all__ = ["MigrationError", "Storage", "make_storage_app", "migrate"]
