"""API keys as rows. Storage never sees a key's secret, only its SHA-256."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible.auth import same
from crucible.contracts import ApiKey, NewApiKey
from crucible.problems import ProblemError
from crucible.storage.engine import timed

if TYPE_CHECKING:
    from crucible.storage.engine import Database, Row


def _key(row: Row) -> ApiKey:
    return ApiKey(**{name: row[name] for name in ApiKey.model_fields})


class Keys:
    """The table of keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @timed("add_key")
    async def add(self, key: NewApiKey) -> ApiKey:
        """Store a key; storing the same again changes nothing.

        Raises:
            ProblemError: `conflict`, the id belongs to another key.
        """
        await self._database.execute(
            """INSERT INTO api_keys (key_id, owner, role, name, secret_sha256, expires_at) VALUES ($1, $2, $3, $4, $5, $6)
               ON CONFLICT (key_id) DO NOTHING""",
            key.key_id,
            key.owner,
            key.role,
            key.name,
            key.secret_sha256,
            key.expires_at,
        )
        row = await self._database.fetchrow("SELECT * FROM api_keys WHERE key_id = $1", key.key_id)
        if row is None or not same(row["secret_sha256"], key.secret_sha256):
            raise ProblemError("conflict", f"key id {key.key_id} is taken")
        return _key(row)

    @timed("list_keys")
    async def list(self) -> list[ApiKey]:
        """Return every key, oldest first, revoked and expired ones too."""
        return [_key(row) for row in await self._database.fetch("SELECT * FROM api_keys ORDER BY created_at, key_id")]

    @timed("find_key")
    async def find(self, key_id: str, secret_sha256: str) -> ApiKey:
        """Return a key if id and secret belong together and it is neither revoked nor expired.

        Raises:
            ProblemError: `not-found`, whichever of these it was.
        """
        row = await self._database.fetchrow(
            """SELECT * FROM api_keys
                WHERE key_id = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())""",
            key_id,
        )
        if row is None or not same(row["secret_sha256"], secret_sha256):
            raise ProblemError("not-found", "no such key")
        return _key(row)

    @timed("revoke_key")
    async def revoke(self, key_id: str) -> None:
        """Revoke a key, for ever.

        Raises:
            ProblemError: `not-found`.
        """
        done = await self._database.execute(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = $1", key_id
        )
        if done != "UPDATE 1":
            raise ProblemError("not-found", f"there is no key {key_id}")
