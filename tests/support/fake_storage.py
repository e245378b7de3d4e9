"""A stand-in for storage and the dispatcher, in memory, for unit tests of the API.

It shows that the API calls the agreed routes and reads their answers rightly, and lets a test bring about what the real parts
rarely do: an outage at a chosen moment, a void attempt, a full quota. It does NOT show that anything is durable, atomic under
concurrency, ordered, filtered or paged: tests/integration/test_api_*.py show that on the real platform.
"""

from __future__ import annotations

import functools
import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response

from crucible import __version__
from crucible import contracts as c
from crucible.auth import make_key
from crucible.evaluation import Reason, Resources, State
from crucible.events import Event, EventType, InProcessBus
from crucible.frames import Frame, Kind, encode_all
from crucible.health import Health
from crucible.limits import SizeClass
from crucible.problems import ProblemError
from crucible.quantity import GIB
from crucible.service import make_app, require_internal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN = "internal-token"


class Entry:
    """One evaluation: its record, its events, and what it wrote."""

    def __init__(self, new: c.NewEvaluation, at: datetime) -> None:
        self.new = new
        spec = new.spec
        self.record = c.EvaluationRecord(
            id=new.id,
            owner=new.owner,
            state=State.QUEUED,
            priority=spec.priority,
            effective_priority=spec.priority,
            size_class=spec.size_class,
            resources=spec.resources,
            image=spec.image,
            labels=spec.labels,
            timeout_seconds=spec.timeout_seconds,
            queue_timeout_seconds=spec.queue_timeout_seconds,
            code_sha256=hashlib.sha256(spec.code.encode()).hexdigest(),
            seq=2,
            attempt=0,
            submitted_at=at,
            queued_at=at,
            provisioning_at=None,
            started_at=None,
            finished_at=None,
            replay_of=new.replay_of,
        )
        self.events: list[Event] = []
        self.frames: list[Frame] = []

    def written(self, stream: str) -> bytes:
        """All that it wrote to one stream."""
        kind = Kind[stream.upper()]
        return b"".join(frame.payload for frame in self.frames if frame.kind is kind)


class FakePlatform:
    """What both stand-ins know; a test changes it as it likes."""

    def __init__(self) -> None:
        self.bus = InProcessBus()
        self.entries: dict[str, Entry] = {}
        self.keys: dict[str, tuple[c.ApiKey, str]] = {}
        self.log: list[Event] = []
        self.letters: dict[int, c.DeadLetter] = {}
        self.calls: list[str] = []
        self.outage: set[str] = set()
        self.stopped: list[str] = []
        self.sandboxes: set[str] = set()
        self.node = c.NodeCapacity(
            name="node-1",
            runtime="fake",
            total=Resources(cpu_millis=4000, memory_bytes=4 * GIB),
            free_cpu_millis=4000,
            free_memory_bytes=4 * GIB,
            sandboxes=0,
        )
        self._clock = datetime(2026, 1, 31, 12, tzinfo=UTC)
        self.storage_app = _serving(self, "storage")
        self.dispatcher_app = _serving(self, "dispatcher")

    def key(self, owner: str, role: c.Role = c.Role.SUBMITTER, **fields: Any) -> str:
        """Make a key that is known."""
        key, key_id, digest = make_key()
        self.keys[key_id] = (c.ApiKey(key_id=key_id, owner=owner, role=role, created_at=self.now(), **fields), digest)
        return key

    def now(self) -> datetime:
        """A clock that moves a second each time it is read."""
        self._clock += timedelta(seconds=1)
        return self._clock

    def happen(self, entry: Entry, kind: EventType, *, reason: Reason | None = None, **changes: Any) -> None:
        """Move an evaluation on: its record, its events, the bus."""
        transition = kind is not EventType.OUTPUT
        state = State(kind) if transition else entry.record.state
        seq = entry.record.seq + transition
        entry.record = entry.record.model_copy(update={"state": state, "seq": seq, "reason": reason, **changes})
        event = Event(
            type=kind,
            evaluation_id=entry.record.id,
            seq=seq,
            at=self.now(),
            owner=entry.record.owner,
            actor="test",
            state=state,
            attempt=entry.record.attempt,
            reason=reason,
            cursor=str(len(self.log) + 1) if transition else None,
        )
        if transition:
            entry.events.append(event)
            self.log.append(event)
        self.bus.publish(event)

    def entry(self, evaluation_id: str) -> Entry:
        """Find an evaluation as storage does."""
        if evaluation_id not in self.entries:
            raise ProblemError("not-found", f"no evaluation {evaluation_id}")
        return self.entries[evaluation_id]

    def store(self, new: c.NewEvaluation) -> Entry:
        """Store an evaluation with its first two events."""
        entry = self.entries[new.id] = Entry(new, self.now())
        entry.record = entry.record.model_copy(update={"seq": 0})
        self.happen(entry, EventType.SUBMITTED)
        self.happen(entry, EventType.QUEUED)
        return entry

    def run(self, evaluation_id: str) -> Entry:
        """Have it claimed and started."""
        entry = self.entries[evaluation_id]
        attempt = entry.record.attempt + 1
        self.happen(entry, EventType.PROVISIONING, attempt=attempt, provisioning_at=self.now())
        self.happen(entry, EventType.RUNNING, started_at=self.now())
        self.sandboxes.add(evaluation_id)
        return entry

    def write(self, evaluation_id: str, data: bytes, kind: Kind = Kind.STDOUT) -> None:
        """Have it write output."""
        entry = self.entries[evaluation_id]
        entry.frames.append(Frame(kind, len(entry.frames), data))
        self._measure(entry)
        self.happen(entry, EventType.OUTPUT)

    def requeue(self, evaluation_id: str) -> None:
        """Void its attempt: what it wrote is gone."""
        entry = self.entries[evaluation_id]
        entry.frames.clear()
        self._measure(entry)
        self.sandboxes.discard(evaluation_id)
        self.happen(entry, EventType.QUEUED, reason=Reason.NODE_LOST)

    def end(self, evaluation_id: str, kind: EventType = EventType.COMPLETED, reason: Reason = Reason.EXIT_ZERO) -> None:
        """Have it end."""
        entry = self.entries[evaluation_id]
        self.sandboxes.discard(evaluation_id)
        self._measure(entry, ended=True)
        exit_code = 0 if reason is Reason.EXIT_ZERO else None
        self.happen(entry, kind, reason=reason, finished_at=self.now(), exit_code=exit_code)

    def _measure(self, entry: Entry, *, ended: bool = False) -> None:
        for name in ("stdout", "stderr"):
            data = entry.written(name)
            info = c.OutputInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest() if ended else None)
            entry.record = entry.record.model_copy(update={name: info})


def _answer(model: Any, **headers: str) -> Response:
    return Response(model.model_dump_json(), headers=headers, media_type="application/json")


async def _asked(request: Request) -> FakePlatform:
    fake: FakePlatform = request.state.fake
    fake.calls.append(f"{request.method} {request.url.path}")
    if request.app.title in fake.outage:
        raise ProblemError("unavailable", f"{request.app.title} is out, as the test wants it")
    return fake


Fake = Annotated[FakePlatform, Depends(_asked)]
_guard = [Depends(require_internal(TOKEN))]
_storage = APIRouter(dependencies=_guard)
_dispatcher = APIRouter(dependencies=_guard)


@functools.cache
def _app(part: str) -> FastAPI:
    # Made once: that takes longer than most tests.
    routes = {"storage": _storage, "dispatcher": _dispatcher}[part]
    app = make_app(part, Health(part, __version__), title=part, description=__doc__ or "")
    # Not `include_router`, which derives every route's dependencies anew.
    app.router.routes.extend(routes.routes)
    return app


def _serving(fake: FakePlatform, part: str) -> ASGIApp:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await _app(part)({**scope, "state": {"fake": fake}}, receive, send)

    return serve


@_storage.post("/internal/evaluations")
async def create(fake: Fake, items: c.NewEvaluations) -> Response:
    return _answer(c.StoredList(results=[_store_one(fake, new, items.max_active) for new in items.items]))


@_storage.get("/internal/evaluations")
async def page(
    fake: Fake, owner: str | None = None, state: Annotated[list[State] | None, Query()] = None, limit: int = 50
) -> Response:
    found = [
        entry.record
        for entry in reversed(fake.entries.values())
        if owner in (None, entry.record.owner) and (not state or entry.record.state in state)
    ]
    return _answer(c.EvaluationPage(items=found[:limit], next_cursor="more" if len(found) > limit else None))


@_storage.get("/internal/evaluations/{evaluation_id}")
async def get(fake: Fake, evaluation_id: str) -> Response:
    return _answer(fake.entry(evaluation_id).record)


@_storage.get("/internal/evaluations/{evaluation_id}/payload")
async def payload(fake: Fake, evaluation_id: str) -> Response:
    spec = fake.entry(evaluation_id).new.spec
    return _answer(c.Payload(code=spec.code, stdin=spec.stdin))


@_storage.post("/internal/evaluations/{evaluation_id}/cancel")
async def cancel(fake: Fake, evaluation_id: str, request: c.CancelRequest) -> Response:
    entry = fake.entry(evaluation_id)
    if entry.record.state.terminal:
        return _answer(c.CancelResult(evaluation=entry.record, sandbox=False))
    if entry.record.cancel_requested or entry.record.state is State.QUEUED:
        fake.end(evaluation_id, EventType.CANCELLED, request.reason)
        return _answer(c.CancelResult(evaluation=entry.record, sandbox=False))
    entry.record = entry.record.model_copy(update={"cancel_requested": True})
    return _answer(c.CancelResult(evaluation=entry.record, sandbox=True))


@_storage.get("/internal/evaluations/{evaluation_id}/position")
async def position(fake: Fake, evaluation_id: str) -> Response:
    entry = fake.entry(evaluation_id)
    queued = [found for found in fake.entries.values() if found.record.state is State.QUEUED]
    place = queued.index(entry) + 1 if entry in queued else 0
    return _answer(c.QueuePosition(position=place, size_class=entry.record.size_class, mean_hold_seconds=2.0))


@_storage.get("/internal/queue")
async def queue(fake: Fake) -> Response:
    running = sum(entry.record.state is State.RUNNING for entry in fake.entries.values())
    return _answer(
        c.QueueReport(bands=[], running={SizeClass.SMALL: running}, mean_hold_seconds={SizeClass.SMALL: 2.0})
    )


@_storage.get("/internal/evaluations/{evaluation_id}/events")
async def events(fake: Fake, evaluation_id: str, after: int = 0) -> Response:
    return _answer(c.EventList(events=[event for event in fake.entry(evaluation_id).events if event.seq > after]))


@_storage.get("/internal/events")
async def stream(fake: Fake, owner: str | None = None, cursor: str | None = None, limit: int = 500) -> Response:
    if cursor is None:
        return _answer(c.EventList(events=[], cursor=str(len(fake.log))))
    rest = fake.log[int(cursor) : int(cursor) + limit]
    mine = [event for event in rest if owner in (None, event.owner)]
    return _answer(c.EventList(events=mine, cursor=str(int(cursor) + len(rest))))


@_storage.get("/internal/evaluations/{evaluation_id}/output/{stream}")
async def output(fake: Fake, evaluation_id: str, stream: str, start: int = 0, length: int | None = None) -> Response:
    data = fake.entry(evaluation_id).written(stream)
    part = data[start:] if length is None else data[start : start + length]
    return Response(part, headers={"X-Output-Size": str(len(data))})


@_storage.get("/internal/evaluations/{evaluation_id}/frames")
async def frames(fake: Fake, evaluation_id: str, after: int = 0, limit: int = 1000) -> Response:
    found = fake.entry(evaluation_id).frames[after : after + limit]
    return Response(encode_all(found), headers={"X-Next-Frame": str(after + len(found))})


@_storage.get("/internal/dead-letters")
async def dead_letters(fake: Fake, limit: int = 50) -> Response:
    items = list(fake.letters.values())[:limit]
    return _answer(c.DeadLetterPage(items=items, total=len(fake.letters)))


@_storage.post("/internal/dead-letters/{letter_id}/replay")
async def replay(fake: Fake, letter_id: int, new_id: str) -> Response:
    letter = fake.letters.get(letter_id)
    if letter is None:
        raise ProblemError("not-found", f"no dead letter {letter_id}")
    if letter.replayed_as:
        raise ProblemError("conflict", f"it was replayed as {letter.replayed_as}")
    fake.letters[letter_id] = letter.model_copy(update={"replayed_as": new_id})
    old = fake.entries[letter.evaluation_id].new
    return _answer(fake.store(old.model_copy(update={"id": new_id, "replay_of": old.id})).record)


@_storage.get("/internal/keys")
async def keys(fake: Fake) -> list[c.ApiKey]:
    return [key for key, _ in fake.keys.values()]


@_storage.post("/internal/keys")
async def add_key(fake: Fake, key: c.NewApiKey) -> c.ApiKey:
    made = c.ApiKey(created_at=fake.now(), **key.model_dump(exclude={"secret_sha256"}))
    fake.keys[key.key_id] = (made, key.secret_sha256)
    return made


@_storage.get("/internal/keys/{key_id}")
async def find_key(fake: Fake, key_id: str, secret_sha256: str) -> c.ApiKey:
    key, digest = fake.keys.get(key_id, (None, ""))
    if key is None or digest != secret_sha256 or key.revoked_at:
        raise ProblemError("not-found", "no such key")
    return key


@_storage.delete("/internal/keys/{key_id}", status_code=204)
async def revoke(fake: Fake, key_id: str) -> None:
    if key_id not in fake.keys:
        raise ProblemError("not-found", f"no key {key_id}")
    key, digest = fake.keys[key_id]
    fake.keys[key_id] = (key.model_copy(update={"revoked_at": fake.now()}), digest)


def _store_one(fake: FakePlatform, new: c.NewEvaluation, max_active: int | None) -> c.Stored:
    for entry in fake.entries.values():
        if new.idempotency_key and (entry.new.owner, entry.new.idempotency_key) == (new.owner, new.idempotency_key):
            same = entry.new.request_sha256 == new.request_sha256
            status = c.StoredStatus.EXISTING if same else c.StoredStatus.KEY_CONFLICT
            return c.Stored(status=status, evaluation=entry.record)
    active = sum(entry.new.owner == new.owner and not entry.record.state.terminal for entry in fake.entries.values())
    if max_active is not None and active >= max_active:
        return c.Stored(status=c.StoredStatus.OVER_QUOTA, evaluation=None, active=active)
    return c.Stored(status=c.StoredStatus.CREATED, evaluation=fake.store(new).record)


@_dispatcher.get("/internal/capacity")
async def capacity(fake: Fake) -> Response:
    return _answer(c.CapacityReport(nodes=[fake.node]))


@_dispatcher.post("/internal/capacity/check")
async def check(fake: Fake, check: c.CapacityCheck) -> Response:
    fits = check.resources.memory_bytes <= fake.node.total.memory_bytes
    reason = None if fits else "no node is that large"
    return _answer(c.CapacityAnswer(fit=c.Fit.NOW if fits else c.Fit.NEVER, reason=reason, largest=fake.node.total))


@_dispatcher.delete("/internal/sandboxes/{evaluation_id}")
async def stop(fake: Fake, evaluation_id: str, reason: Reason) -> Response:
    if evaluation_id not in fake.sandboxes:
        raise ProblemError("not-found", f"no sandbox {evaluation_id}")
    fake.stopped.append(evaluation_id)
    fake.end(evaluation_id, EventType.CANCELLED, reason)
    status = c.SandboxStatus(evaluation_id=evaluation_id, attempt=1, runtime="fake", phase=c.SandboxPhase.FINISHED)
    return _answer(status)
