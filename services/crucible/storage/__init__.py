"""The owner of PostgreSQL and the object store."""
