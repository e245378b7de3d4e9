"""A real storage service over a database of its own, spoken to through the platform's own client."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from crucible import contracts as c
from crucible.clients import StorageClient, http_client
from crucible.evaluation import EvaluationRequest, Reason, State, make_evaluation_id, resolve, terminal_state_of
from crucible.events import Event, InProcessBus
from crucible.health import Health
from crucible.limits import Limits, SizeClass
from crucible.outcome import Outcome
from crucible.settings import StorageSettings
from crucible.storage import Storage, make_storage_app
from tests.support.folders import scratch_dir
from tests.support.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from crucible.storage.hints import Brokers
    from crucible.streams.log import EventLog

TOKEN = "storage-test-token"
WORKER = "worker-1"


def new_id() -> str:
    """Return a fresh evaluation id."""
    return make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))


def new_evaluation(
    code: str = "print('hello')",
    *,
    owner: str = "ada",
    key: str | None = None,
    request: str | None = None,
    evaluation_id: str | None = None,
    limits: Limits | None = None,
    **fields: Any,
) -> c.NewEvaluation:
    """Return an accepted request, as the API would hand it over."""
    spec = resolve(EvaluationRequest(code=code, **fields), limits or Limits())
    return c.NewEvaluation(
        id=evaluation_id or new_id(),
        owner=owner,
        spec=spec,
        idempotency_key=key,
        request_sha256=hashlib.sha256((request or spec.model_dump_json()).encode()).hexdigest(),
    )


def outcome_of(reason: Reason, **fields: Any) -> Outcome:
    """Return an outcome with this cause."""
    exit_code = {Reason.EXIT_ZERO: 0, Reason.EXIT_NONZERO: 1}.get(reason)
    return Outcome(
        **{"state": terminal_state_of(reason), "reason": reason, "detail": f"test: {reason}", "exit_code": exit_code}
        | fields
    )


@dataclass
class Bench:
    """A running storage service and short ways to say what tests do with it. `heard` is all that its bus has said."""

    storage: Storage
    client: StorageClient
    bus: InProcessBus
    url: str
    data_dir: Path
    health: Health
    heard: list[Event]

    async def submit(self, code: str = "print('hello')", **fields: Any) -> c.EvaluationRecord:
        """Store one evaluation."""
        (stored,) = (await self.client.create(c.NewEvaluations(items=[new_evaluation(code, **fields)]))).results
        assert stored.status is c.StoredStatus.CREATED, stored
        assert stored.evaluation is not None
        return stored.evaluation

    async def submit_many(self, items: Sequence[c.NewEvaluation]) -> list[c.Stored]:
        """Store many, a batch at a time."""
        results: list[c.Stored] = []
        for start in range(0, len(items), 1000):
            stored = await self.client.create(c.NewEvaluations(items=list(items[start : start + 1000])))
            results += stored.results
        return results

    async def claim(
        self, wanted: int = 1, *, size: SizeClass = SizeClass.SMALL, worker: str = WORKER, wait: float = 0
    ) -> list[c.Claim]:
        """Claim from one size class."""
        request = c.ClaimRequest(worker=worker, wanted={size: wanted}, wait_seconds=wait)
        return (await self.client.claim(request)).claims

    async def claim_one(self, **fields: Any) -> c.Claim:
        """Claim exactly one."""
        (claim,) = await self.claim(**fields)
        return claim

    async def start(self, evaluation_id: str, attempt: int = 1) -> c.EvaluationRecord:
        """Report that it runs."""
        return await self.client.running(evaluation_id, c.Running(attempt=attempt, actor="dispatcher", sandbox="box"))

    async def finish(
        self,
        evaluation_id: str,
        reason: Reason = Reason.EXIT_ZERO,
        *,
        attempt: int = 1,
        collected: bool = False,
        **fields: Any,
    ) -> c.EvaluationRecord:
        """Report the end of an attempt."""
        outcome = outcome_of(reason, **fields)
        report = c.Finish(attempt=attempt, actor="dispatcher", outcome=outcome, collected=collected)
        return await self.client.finish(evaluation_id, report)

    async def run_one(self, reason: Reason = Reason.EXIT_ZERO, **fields: Any) -> c.EvaluationRecord:
        """Submit, claim, run and finish one evaluation; the queue must be empty before."""
        record = await self.submit(**fields)
        claim = await self.claim_one(size=record.size_class)
        assert claim.evaluation_id == record.id
        await self.start(record.id, claim.attempt)
        return await self.finish(record.id, reason, attempt=claim.attempt)

    async def events(self, evaluation_id: str) -> list[Event]:
        """Read the evaluation's events."""
        return (await self.client.events(evaluation_id)).events

    async def states(self, evaluation_id: str) -> list[State]:
        """Read the states that it went through."""
        return [event.state for event in await self.events(evaluation_id)]

    async def sql(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """Run a statement beside the service."""
        async with self.connection() as connection:
            return await connection.fetch(statement, *args)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Open a connection of the test's own."""
        connection = await asyncpg.connect(self.url)
        try:
            yield connection
        finally:
            await connection.close()


@asynccontextmanager
async def storage_over(
    url: str,
    data_dir: Path,
    *,
    instance: str = "instance-1",
    limits: Limits | None = None,
    bus: InProcessBus | None = None,
    brokers: Brokers | None = None,
    event_log: EventLog | None = None,
    **settings: Any,
) -> AsyncIterator[Bench]:
    """Run a storage service over a given database; several may share one. A lost attempt is tried again at once unless told."""
    settings.setdefault("retry_seconds", 0.0)
    bus = bus or InProcessBus()
    storage = Storage(
        StorageSettings(**settings),
        limits or Limits(),
        bus,
        database_url=url,
        data_dir=data_dir,
        instance=instance,
        brokers=brokers,
        event_log=event_log,
    )
    health = Health("storage", "test")
    heard: list[Event] = []
    await storage.start()
    try:
        app = make_storage_app(storage, TOKEN, health)

        def hear(event: Event) -> bool:
            # The filter sees every event as it is published, however many; the subscriber's queue stays empty.
            heard.append(event)
            return False

        with bus.subscribe(hear):
            async with http_client(app, TOKEN) as http:
                yield Bench(storage, StorageClient(http), bus, url, data_dir, health, heard)
    finally:
        await storage.aclose()


@asynccontextmanager
async def running_storage(**settings: Any) -> AsyncIterator[Bench]:
    """Run a storage service over a fresh database and folder."""
    async with fresh_database() as url:
        for folder in scratch_dir():
            async with storage_over(url, folder, **settings) as bench:
                yield bench
