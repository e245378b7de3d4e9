"""The object store: large outputs in a folder or in S3, with a ledger in the database of what is where.

The ledger (`objects`) decides; a backend only holds bytes. Before a copy is written anywhere, the table `object_garbage` says that it may
be garbage, and the transaction that makes the copy count takes that entry out. So whatever dies in between leaves an entry that
the sweep later acts on, and never bytes that nobody knows of. Keys are never used twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from crucible import logs, metrics
from crucible.contracts import BackendUsage, MigrateRequest, MigrateResult
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from crucible.settings import StorageSettings
    from crucible.storage.engine import Connection, Database, Row

log = logs.get_logger("storage.objects")
T = TypeVar("T")

# Name of the folder under the data folder. A name and not a path, so that the data folder may be moved.
LOCAL = "local"
# No store at all: what is large stays in the database too. For several replicas that share no folder.
DATABASE = "database"
# How long a copy may be under way before the sweep takes it for abandoned.
_ABANDONED = "1 hour"
_SWEEP_BATCH = 100
_UNMARK = "DELETE FROM object_garbage WHERE backend = $1 AND key = $2"
_ONE_DELETED = "DELETE 1"
_MARK_DUE = """
INSERT INTO object_garbage (backend, key, due_at) VALUES ($1, $2, now())
    ON CONFLICT (backend, key) DO UPDATE SET due_at = excluded.due_at"""
_STORE_ERRORS = (BaseError, OSError, ValueError)


class DamagedObjectError(Exception):
    """An object is gone from every backend, or is not what was written; the message is its key."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A place for objects. `folder` is set where it is a local one."""

    name: str
    store: LocalStore | S3Store
    folder: Path | None

    @property
    def kind(self) -> str:
        """What the metrics call it."""
        return "s3" if self.folder is None else "file"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that has been written and does not count yet: `ObjectStore.adopt` makes it count."""

    backend: str
    key: str
    size: int
    sha256: bytes


def _folder_backend(name: str, folder: Path) -> Backend:
    # What people's code printed is theirs: no other user of the machine reads it past the API.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Backend(name, LocalStore(folder, automatic_cleanup=True, mkdir=True), folder)


def _s3_backend(url: str, settings: StorageSettings) -> Backend:
    parts = urlsplit(url)
    config: dict[str, object] = {"region": settings.s3_region}
    client: dict[str, object] = {"timeout": "30s", "connect_timeout": "5s"}
    if settings.s3_endpoint is not None:
        # Other S3 implementations rarely answer to bucket names as host names.
        config |= {"endpoint": settings.s3_endpoint, "virtual_hosted_style_request": False}
        client["allow_http"] = settings.s3_endpoint.startswith("http://")
    store = S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        config=config,  # type: ignore[arg-type]
        client_options=client,  # type: ignore[arg-type]
        retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)},
    )
    return Backend(url, store, None)


def open_backend(url: str, settings: StorageSettings, data_dir: Path) -> Backend:
    """Return the backend that a URL (`file:///path`, `s3://bucket/prefix`) or the name `local` stands for.

    Raises:
        ValueError: neither of these.
    """
    own = data_dir / "objects"
    if url == LOCAL:
        return _folder_backend(LOCAL, own)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        folder = Path(url2pathname(parts.path))
        return _folder_backend(LOCAL if folder.resolve() == own.resolve() else url.rstrip("/"), folder)
    if parts.scheme == "s3" and parts.netloc:
        return _s3_backend(url.rstrip("/"), settings)
    raise ValueError(f"{url!r} is not an object store; write file:///path or s3://bucket/prefix")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


async def _sha256(data: bytes) -> bytes:
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())


def _make_durable(path: Path) -> None:
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _delete_unfinished(path: Path) -> None:
    """Delete what a write that was killed has left beside its object: the library writes to `name#1` and then renames."""
    for left in path.parent.glob(f"{path.name}#*"):
        left.unlink(missing_ok=True)


class ObjectStore:
    """All backends, and the ledger."""

    def __init__(self, database: Database, settings: StorageSettings, data_dir: Path) -> None:
        self._database = database
        self._settings = settings
        self._data_dir = data_dir
        self._backends: dict[str, Backend] = {}
        self._primary: Backend | None = None

    async def open(self) -> None:
        """Open every backend that is configured or in use, and log once which is primary, why, and what else is read."""
        named = self._settings.objects_url
        self._primary = None if named == DATABASE else self._add(named or LOCAL)
        for url in self._settings.objects_fallback_urls:
            self._add(url)
        # A migration may have led to where no setting points: what the ledger names is read as well.
        for row in await self._database.fetch("SELECT DISTINCT backend FROM objects ORDER BY 1"):
            self._backend(row["backend"])
        log.info(
            "object store",
            primary=self.primary_name,
            why="objects_url names it" if named else "objects_url is unset: a folder under the data folder",
            folder=str(self._primary.folder) if self._primary and self._primary.folder else None,
            fallbacks=[name for name in self._backends if name != self.primary_name],
            fallbacks_are="read where the ledger says so, or where an object is not where it should be; written by migrations only",
        )

    def _add(self, url: str) -> Backend:
        backend = open_backend(url, self._settings, self._data_dir)
        return self._backends.setdefault(backend.name, backend)

    def _backend(self, name: str) -> Backend | None:
        """Return the backend that the ledger calls by this name, or None if this machine cannot open it."""
        if name not in self._backends:
            try:
                return self._add(name)
            except _STORE_ERRORS as error:
                log.warning("an object store that is in use cannot be opened", backend=name, error=_words(error))
        return self._backends.get(name)

    @property
    def in_use(self) -> bool:
        """Whether large outputs go to a backend; without one they stay in the database."""
        return self._primary is not None

    @property
    def primary_name(self) -> str:
        """Where large outputs go, as people are told."""
        return DATABASE if self._primary is None else self._primary.name

    @property
    def primary(self) -> Backend:
        """Where new objects go."""
        if self._primary is None:
            raise RuntimeError("the object store has not been opened, or is not used here")
        return self._primary

    # -- writing

    async def write(self, name: str, data: bytes) -> StoredObject:
        """Write an object to the primary. It stays garbage until it is adopted.

        Raises:
            ProblemError: `unavailable`, the backend does not take it.
        """
        key = f"{name}-{secrets.token_hex(4)}"
        await self._mark_garbage(self.primary.name, key)
        await self._put(self.primary, key, data)
        return StoredObject(self.primary.name, key, len(data), await _sha256(data))

    async def adopt(self, connection: Connection, stored: StoredObject) -> int:
        """Make an object count, within the caller's transaction, and return its id.

        Raises:
            ProblemError: `unavailable`, the sweep has taken it for abandoned; write it again.
        """
        await self._keep(connection, stored.backend, stored.key)
        added: int = await connection.fetchval(
            "INSERT INTO objects (key, backend, size, sha256) VALUES ($1, $2, $3, $4) RETURNING id",
            stored.key,
            stored.backend,
            stored.size,
            stored.sha256,
        )
        return added

    async def _mark_garbage(self, backend: str, key: str) -> None:
        await self._database.execute(
            f"""INSERT INTO object_garbage (backend, key, due_at) VALUES ($1, $2, now() + interval '{_ABANDONED}')
                ON CONFLICT (backend, key) DO UPDATE SET due_at = excluded.due_at""",  # noqa: S608 - a constant
            backend,
            key,
        )

    @staticmethod
    async def _keep(connection: Connection, backend: str, key: str) -> None:
        # The sweep deletes while it holds the entry: if it is still there now, the copy is too.
        if await connection.execute(_UNMARK, backend, key) != _ONE_DELETED:
            raise ProblemError("unavailable", "an object was swept before it could be used", retry_after=1)

    @staticmethod
    async def discard(connection: Connection, ids: Sequence[int]) -> tuple[int, int]:
        """Take objects out of the ledger, within the caller's transaction; the sweep deletes them. Returns count and bytes."""
        rows = await connection.fetch(
            """WITH gone AS (DELETE FROM objects WHERE id = ANY($1) RETURNING backend, key, size),
                    due AS (INSERT INTO object_garbage (backend, key, due_at) SELECT backend, key, now() FROM gone
                            ON CONFLICT (backend, key) DO UPDATE SET due_at = excluded.due_at)
               SELECT size FROM gone""",
            list(ids),
        )
        return len(rows), sum(row["size"] for row in rows)

    # -- reading

    async def read(self, object_id: int, start: int = 0, length: int | None = None) -> bytes:
        """Read a range of an object, from the backend that the ledger names, or any other that has it.

        Raises:
            ProblemError: `unavailable`, no backend gives it now; `not-found`, the ledger has no such object (any more).
            DamagedObjectError: no backend has what was written. Only a whole object can be held against its sha256.
        """
        row = await self._database.fetchrow("SELECT * FROM objects WHERE id = $1", object_id)
        if row is None:
            raise ProblemError("not-found", "the output has been deleted")
        wanted = row["size"] - start if length is None else length
        if wanted <= 0:
            return b""
        away = False
        for backend in self._where(row["backend"]):
            try:
                data = await self._get(backend, row["key"], start, wanted)
            except (DamagedObjectError, *_STORE_ERRORS) as error:
                away |= not isinstance(error, (FileNotFoundError, DamagedObjectError))
                log.warning("an object could not be read", backend=backend.name, object=row["key"], error=_words(error))
                continue
            if wanted < row["size"] or await _sha256(data) == row["sha256"]:
                return data
            log.error("an object does not match its sha256", backend=backend.name, object=row["key"])
        if away:
            raise ProblemError("unavailable", "the object store does not give the output now", retry_after=2)
        raise DamagedObjectError(row["key"])

    def _where(self, name: str) -> list[Backend]:
        named = self._backend(name)
        others = [backend for backend in self._backends.values() if backend is not named]
        return [named, *others] if named else others

    async def _measured(self, backend: Backend, op: str, size: int, call: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            result = await call
        finally:
            metrics.STORAGE_SECONDS.labels(backend.kind, op).observe(time.perf_counter() - started)
        metrics.OBJECT_BYTES.labels(backend.kind, op).inc(size)
        return result

    async def _get(self, backend: Backend, key: str, start: int, length: int) -> bytes:
        reading = obstore.get_range_async(backend.store, key, start=start, length=length)
        try:
            data = await self._measured(backend, "get", length, reading)
        except BaseError as error:
            # Backends word a range beyond the end differently; whether it is one can be asked.
            if (await obstore.head_async(backend.store, key))["size"] < start + length:
                raise DamagedObjectError(key) from error
            raise
        if len(data) != length:
            raise DamagedObjectError(key)
        return bytes(data)

    async def _put(self, backend: Backend, key: str, data: bytes) -> None:
        try:
            await self._measured(
                backend, "put", len(data), obstore.put_async(backend.store, key, data, use_multipart=False)
            )
            if backend.folder is not None:
                await asyncio.to_thread(_make_durable, backend.folder / key)
        except _STORE_ERRORS as error:
            log.warning("an object could not be written", backend=backend.name, object=key, error=_words(error))
            raise ProblemError(
                "unavailable", f"the object store {backend.name} takes nothing now", retry_after=2
            ) from error

    # -- moving

    async def migrate(self, request: MigrateRequest) -> MigrateResult:
        """Move some objects to another backend. May be killed and called again at any point.

        Raises:
            ProblemError: `invalid-request`, no such backend; `unavailable`, it takes nothing.
        """
        target = self._target(request.target)
        rows = await self._database.fetch(
            "SELECT * FROM objects WHERE backend <> $1 ORDER BY copy_failures, id LIMIT $2", target.name, request.limit
        )
        moved = moved_bytes = 0
        failed = []
        for row in rows:
            if not await self._copy(row, target):
                await self._database.execute(
                    "UPDATE objects SET copy_failures = copy_failures + 1 WHERE id = $1", row["id"]
                )
                failed.append(row["key"])
            elif await self._switch(row, target):
                moved += 1
                moved_bytes += row["size"]
        remaining = await self._database.fetchval("SELECT count(*) FROM objects WHERE backend <> $1", target.name)
        await self.sweep()
        return MigrateResult(moved=moved, moved_bytes=moved_bytes, remaining=remaining, failed=failed)

    def _target(self, url: str) -> Backend:
        found = self._backends.get(url.rstrip("/"))
        if found is not None:
            return found
        try:
            return self._add(url)
        except _STORE_ERRORS as error:
            raise ProblemError("invalid-request", str(error)) from error

    async def _copy(self, row: Row, target: Backend) -> bool:
        """Write a copy and read it back; False if there is nothing right to copy, or what came back is not what it should be."""
        source = self._backend(row["backend"])
        if source is None:
            return False
        try:
            data = await self._get(source, row["key"], 0, row["size"])
        except (DamagedObjectError, *_STORE_ERRORS) as error:
            log.warning("an object could not be read to be moved", object=row["key"], error=_words(error))
            return False
        await self._mark_garbage(target.name, row["key"])
        await self._put(target, row["key"], data)
        if not await self._matches(target, row):
            # The copy stays marked as garbage and is swept; the original stays where it is.
            log.error("a copied object does not match its sha256", object=row["key"], target=target.name)
            return False
        return True

    async def _matches(self, target: Backend, row: Row) -> bool:
        try:
            copy = await self._get(target, row["key"], 0, row["size"])
        except DamagedObjectError:
            return False
        except _STORE_ERRORS as error:
            raise ProblemError(
                "unavailable", f"{target.name} does not give back what it took", retry_after=2
            ) from error
        return await _sha256(copy) == row["sha256"]  # type: ignore[no-any-return]

    async def _switch(self, row: Row, target: Backend) -> bool:
        """Make the copy count instead of the original; False if someone else has moved or deleted the object meanwhile."""
        async with self._database.transaction() as connection:
            kept = await connection.execute(_UNMARK, target.name, row["key"])
            switched = await connection.execute(
                "UPDATE objects SET backend = $3, copy_failures = 0 WHERE id = $1 AND backend = $2 AND $4",
                row["id"],
                row["backend"],
                target.name,
                kept == _ONE_DELETED,
            )
            # The copy that does not count now is garbage; the sweep looks again whether it counts before it deletes anything.
            moved: bool = switched == "UPDATE 1"
            await connection.execute(_MARK_DUE, row["backend"] if moved else target.name, row["key"])
        return moved

    # -- deleting

    async def sweep(self) -> int:
        """Delete copies that are due, unless the ledger has come to count on them. Returns how many."""
        swept = 0
        away: set[str] = set()
        while True:
            async with self._database.transaction() as connection:
                rows = await connection.fetch(
                    """SELECT g.backend, g.key, o.id IS NOT NULL AS counts
                         FROM object_garbage AS g LEFT JOIN objects AS o ON o.backend = g.backend AND o.key = g.key
                        WHERE g.due_at <= now() AND NOT g.backend = ANY($1)
                        ORDER BY g.due_at LIMIT $2 FOR UPDATE OF g SKIP LOCKED""",
                    list(away),
                    _SWEEP_BATCH,
                )
                done = []
                for row in rows:
                    # A backend that is away takes its time to say so, every time: once is enough.
                    if row["backend"] in away:
                        continue
                    if row["counts"] or await self._delete(row["backend"], row["key"]):
                        done.append((row["backend"], row["key"]))
                    else:
                        away.add(row["backend"])
                await connection.executemany(_UNMARK, done)
            swept += len(done)
            if len(rows) < _SWEEP_BATCH:
                return swept

    async def _delete(self, name: str, key: str) -> bool:
        backend = self._backend(name)
        if backend is None:
            return False
        try:
            if backend.folder is not None:
                await asyncio.to_thread(_delete_unfinished, backend.folder / key)
            await self._measured(backend, "delete", 0, obstore.delete_async(backend.store, key))
        except FileNotFoundError:
            return True
        except _STORE_ERRORS as error:
            log.warning("an object could not be deleted", backend=name, object=key, error=_words(error))
            return False
        return True

    async def usage(self) -> list[BackendUsage]:
        """Report what each backend holds, by the ledger."""
        rows = await self._database.fetch(
            "SELECT backend, count(*) AS objects, sum(size)::bigint AS bytes FROM objects GROUP BY 1 ORDER BY 1"
        )
        held = {row["backend"]: row for row in rows}
        return [
            BackendUsage(
                backend=name,
                objects=held[name]["objects"] if name in held else 0,
                bytes=held[name]["bytes"] if name in held else 0,
            )
            for name in sorted({*held, *self._backends})
        ]
