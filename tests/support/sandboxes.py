"""Real sandboxes for tests: a dispatcher with its real runtime, and what it told storage about each attempt."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response

from crucible import __version__
from crucible import contracts as c
from crucible.clients import DispatcherClient, StorageClient, http_client
from crucible.dispatcher.app import make_dispatcher_app
from crucible.dispatcher.dispatcher import Dispatcher
from crucible.evaluation import EvaluationSpec, Reason, Resources, make_evaluation_id
from crucible.frames import Frame, Kind, decode_all
from crucible.health import Health
from crucible.limits import Limits, SizeClass
from crucible.outcome import Outcome
from crucible.problems import ProblemError
from crucible.quantity import MIB
from crucible.service import make_app, require_internal
from crucible.settings import DispatcherSettings
from tests.support.waits import wait_until_async

TOKEN = "internal-token"
MEBI = MIB
_ATTEMPT_1 = 1


@dataclass
class Story:
    """What storage was told of one evaluation, in order."""

    calls: list[str] = field(default_factory=list)
    running: list[c.Running] = field(default_factory=list)
    batches: dict[int, list[Frame]] = field(default_factory=dict)  # by number of the first frame
    finishes: list[c.Finish] = field(default_factory=list)

    def frames(self) -> list[Frame]:
        """All output in the order in which it was told."""
        return [frame for batch in sorted(self.batches) for frame in self.batches[batch]]

    def stream(self, kind: Kind) -> bytes:
        """The bytes of one stream."""
        return b"".join(frame.payload for frame in self.frames() if frame.kind is kind)


class RecordingStorage:
    """A stand-in for the storage service: it takes the dispatcher's calls and remembers them, nothing else.

    It is no storage: there are no states, transactions or durability here; the end-to-end tests show the dispatcher with the real
    one. It lets a test see each call, and bring about what the real one rarely does: an outage, a void attempt.
    """

    def __init__(self) -> None:
        self.stories: dict[str, Story] = {}
        self.down = False
        self.void: set[str] = set()
        self.cancel_asked: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.app = self._make_app()

    def story(self, evaluation_id: str) -> Story:
        """What was told of one evaluation."""
        return self.stories.setdefault(evaluation_id, Story())

    async def _admit(self, evaluation_id: str, call: str) -> Story:
        await self.gate.wait()
        if self.down:
            raise ProblemError("unavailable", "a test has taken storage down")
        if evaluation_id in self.void or (call == "running" and evaluation_id in self.cancel_asked):
            raise ProblemError("stale-attempt", "a test has made the attempt void")
        story = self.story(evaluation_id)
        story.calls.append(call)
        return story

    def _make_app(self) -> FastAPI:
        app = make_app("storage", Health("storage", __version__), title="stand-in", description="stand-in")
        guarded = [Depends(require_internal(TOKEN))]

        @app.post("/internal/evaluations/{evaluation_id}/running", dependencies=guarded)
        async def running(evaluation_id: str, body: c.Running) -> Response:
            (await self._admit(evaluation_id, "running")).running.append(body)
            return self._record(evaluation_id)

        @app.post("/internal/evaluations/{evaluation_id}/output", dependencies=guarded)
        async def output(evaluation_id: str, attempt: int, frame: int, request: Request) -> c.OutputPosition:
            story = await self._admit(evaluation_id, "output")
            batch = story.batches.setdefault(frame, decode_all(await request.body()))
            return c.OutputPosition(frames=frame + len(batch))

        @app.post("/internal/evaluations/{evaluation_id}/finish", dependencies=guarded)
        async def finish(evaluation_id: str, body: c.Finish) -> Response:
            (await self._admit(evaluation_id, "finish")).finishes.append(body)
            return self._record(evaluation_id)

        return app

    @staticmethod
    def _record(evaluation_id: str) -> Response:
        # The dispatcher does not look at the record; it only has to be one.
        record = c.EvaluationRecord.model_validate(
            {
                "id": evaluation_id,
                "owner": "someone",
                "state": "running",
                "priority": 5,
                "effective_priority": 5,
                "size_class": "small",
                "resources": {"cpu_millis": 250, "memory_bytes": 256 * MEBI},
                "image": "python",
                "labels": {},
                "timeout_seconds": 60,
                "queue_timeout_seconds": None,
                "code_sha256": "",
                "seq": 4,
                "attempt": 1,
                "submitted_at": "2026-01-01T00:00:00Z",
                "queued_at": None,
                "provisioning_at": None,
                "started_at": None,
                "finished_at": None,
            }
        )
        return Response(record.model_dump_json(), media_type="application/json")


@dataclass(frozen=True)
class Ran:
    """How one evaluation went: the outcome as recorded, and its output."""

    evaluation_id: str
    outcome: Outcome
    stdout: bytes
    stderr: bytes
    story: Story

    @property
    def out(self) -> str:
        """Standard output as text, without the last line break."""
        return self.stdout.decode().strip()

    @property
    def err(self) -> str:
        """Standard error as text, without the last line break."""
        return self.stderr.decode().strip()


class Sandboxes:
    """A started dispatcher, and the storage that it reports to."""

    def __init__(self, dispatcher: Dispatcher, client: DispatcherClient, storage: RecordingStorage) -> None:
        self.dispatcher = dispatcher
        self.client = client
        self.storage = storage

    async def begin(
        self, code: str, *, attempt: int = _ATTEMPT_1, evaluation_id: str | None = None, **fields: Any
    ) -> str:
        """Have a sandbox made and return its evaluation's id."""
        evaluation_id = evaluation_id or new_id()
        await self.client.create(evaluation_id, request(code, attempt=attempt, **fields))
        return evaluation_id

    async def end(self, evaluation_id: str, *, attempt: int = _ATTEMPT_1, seconds: float = 60) -> Ran:
        """Wait for the recorded end of an evaluation."""
        status = await self.client.wait(evaluation_id, attempt=attempt, wait_seconds=seconds)
        assert status.phase is c.SandboxPhase.FINISHED, status
        story = self.storage.story(evaluation_id)
        assert len(story.finishes) == 1, story.finishes
        return Ran(
            evaluation_id,
            story.finishes[0].outcome,
            story.stream(Kind.STDOUT),
            story.stream(Kind.STDERR),
            story,
        )

    async def run(self, code: str, **fields: Any) -> Ran:
        """Run code in a sandbox, to its end."""
        return await self.end(await self.begin(code, **fields))

    async def until_output(self, evaluation_id: str, text: bytes) -> None:
        """Wait until the code has written something."""
        await wait_until_async(
            lambda: text in self.storage.story(evaluation_id).stream(Kind.STDOUT),
            timeout=20,
            describe=f"the code to write {text!r}",
        )


def new_id() -> str:
    """Return an evaluation id that was not used before."""
    return make_evaluation_id(0, os.urandom(10))


def request(
    code: str,
    *,
    attempt: int = _ATTEMPT_1,
    stdin: str = "",
    timeout: int = 20,
    memory: int = 256 * MEBI,
    cpu: int = 1000,
) -> c.SandboxRequest:
    """Return a request for a sandbox."""
    spec = EvaluationSpec(
        code=code,
        stdin=stdin,
        priority=5,
        timeout_seconds=timeout,
        resources=Resources(cpu_millis=cpu, memory_bytes=memory),
        size_class=SizeClass.SMALL,
        image="python",
    )
    return c.SandboxRequest(attempt=attempt, worker="a test", owner="someone", spec=spec)


@asynccontextmanager
async def running_sandboxes(
    *, limits: Limits | None = None, storage: RecordingStorage | None = None, **settings: Any
) -> AsyncIterator[Sandboxes]:
    """Start a dispatcher, and leave nothing of it behind."""
    storage = storage or RecordingStorage()
    async with http_client(storage.app, TOKEN) as to_storage:
        given = {"cpu_millis": 16_000, "memory_bytes": 16 * 1024 * MEBI, **settings}
        dispatcher = Dispatcher(
            DispatcherSettings(**given), limits or Limits(), StorageClient(to_storage), instance="test"
        )
        await dispatcher.start()
        app = make_dispatcher_app(dispatcher, TOKEN, Health("dispatcher", __version__))
        try:
            async with http_client(app, TOKEN) as client:
                yield Sandboxes(dispatcher, DispatcherClient(client), storage)
        finally:
            await dispatcher.aclose()


def dispatcher_http(sandboxes: Sandboxes, token: str) -> httpx.AsyncClient:
    """Return a bare HTTP client of the dispatcher."""
    return http_client(make_dispatcher_app(sandboxes.dispatcher, TOKEN, Health("dispatcher", __version__)), token)


# --- what is left on the machine -------------------------------------------------------------------------------------------


def _reads(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def processes_of(evaluation_id: str) -> list[int]:
    """Return every process of the machine that has the evaluation's id in its environment or its command line."""
    marker = evaluation_id.encode()
    found = []
    for folder in Path("/proc").iterdir():
        others = folder.name.isdigit() and int(folder.name) != os.getpid()
        if others and (marker in _reads(folder / "environ") or marker in _reads(folder / "cmdline")):
            found.append(int(folder.name))
    return found


async def until_no_process(evaluation_id: str) -> None:
    """Wait until nothing of an evaluation runs."""
    await wait_until_async(
        lambda: not processes_of(evaluation_id), timeout=10, describe=f"every process of {evaluation_id} to be gone"
    )


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process still, as a hung one would be."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def fail_to_start(sandboxes: Sandboxes) -> None:
    """Have one start fail at its last step, and see that nothing of what was taken for it stays taken."""
    runtime: Any = sandboxes.dispatcher._runtime
    free = runtime._ids.take()
    runtime._ids.give_back(free)
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        if runtime._groups is not None:
            create = runtime._groups.create

            def create_watched(*arguments: Any, **options: Any) -> Any:
                made.append(create(*arguments, **options))
                return made[-1]

            patched.setattr(runtime._groups, "create", create_watched)

        def refuse(_: object) -> None:
            raise OSError(errno.EMFILE, "no descriptor left")

        patched.setattr(runtime._launcher, "launch", refuse)
        ran = await sandboxes.run("print('never')")
    assert ran.outcome.reason is Reason.SANDBOX_ERROR
    assert "no descriptor left" in ran.outcome.detail
    assert runtime._ids.take() == free
    runtime._ids.give_back(free)
    folders = [Path(group.join_files[0]).parent for group in made]
    await wait_until_async(
        lambda: not [folder for folder in folders if folder.exists()],
        timeout=5,
        describe="the control groups to be gone",
    )
