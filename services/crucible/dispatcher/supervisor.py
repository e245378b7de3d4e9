"""One sandbox, from its start to the recorded end of the attempt: listen to the runner, hold the deadline, decide, and tell storage.

It believes the runner about what the code did and the runtime about what was done to the sandbox; `outcome.decide` weighs the two.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from crucible import contracts as c
from crucible import logs, metrics
from crucible.dispatcher.runtimes import SandboxSpec, SandboxStartError
from crucible.evaluation import RETRYABLE_REASONS, Reason
from crucible.frames import Decoder, Frame, FrameError, Kind
from crucible.outcome import Outcome, RunnerReport, SandboxFacts, decide
from crucible.watching.shipping import Shipper

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.clients import StorageClient
    from crucible.dispatcher.runtimes import Runtime, Sandbox

log = logs.get_logger("supervisor")

# From asking for a sandbox to its code's first instruction; thousands of times what it takes on an idle machine.
_START_SECONDS = 60.0
# After the runner was asked to stop: for killing, reaping and sending what the pipes hold.
_STOP_SECONDS = 2.0
# A runner that has reported has nothing more to do.
_LEAVE_SECONDS = 5.0
CANCEL_REASONS = frozenset({Reason.CANCELLED_BY_USER, Reason.CANCELLED_BY_OPERATOR})
STOP_REASONS = CANCEL_REASONS | RETRYABLE_REASONS


class Supervisor:
    """Sees one attempt through.

    Args:
        evaluation_id: whose attempt.
        request: what to run.
        runtime: what makes the sandbox.
        storage: where its story goes.
        actor: this dispatcher.
        grace_seconds: time beyond the evaluation's limit after which the sandbox is ended from outside.
        on_gone: called once when no process of the sandbox is left.
    """

    def __init__(
        self,
        evaluation_id: str,
        request: c.SandboxRequest,
        runtime: Runtime,
        storage: StorageClient,
        *,
        actor: str,
        grace_seconds: float,
        on_gone: Callable[[], None],
    ) -> None:
        self.evaluation_id = evaluation_id
        self.attempt = request.attempt
        self._name = f"{evaluation_id}-{request.attempt}"
        # Let go of once the sandbox has it: ended sandboxes are remembered for a while, and code and input may be large.
        self._wanted: SandboxSpec | None = SandboxSpec(
            name=self._name,
            evaluation_id=evaluation_id,
            code=request.spec.code.encode(),
            stdin=request.spec.stdin.encode(),
            timeout_seconds=request.spec.timeout_seconds,
            resources=request.spec.resources,
        )
        self._timeout_seconds = request.spec.timeout_seconds
        self._memory_limit = request.spec.resources.memory_bytes
        self._runtime = runtime
        self._grace = grace_seconds
        self._on_gone = on_gone
        self._sandbox: Sandbox | None = None
        self._phase = c.SandboxPhase.STARTING
        self._outcome: Outcome | None = None
        self._report: RunnerReport | None = None
        self._cancelled: Reason | None = None
        self._lost: Reason | None = None
        self._void = False
        self._deadline_exceeded = False
        self._problem: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._recorded = asyncio.Event()
        self._shipper = Shipper(
            storage, evaluation_id, request.attempt, actor=actor, sandbox=self._name, on_stale=self._become_void
        )

    # -- what others ask

    @property
    def finished(self) -> bool:
        """Whether the end of the attempt is recorded, or known to be void."""
        return self._phase is c.SandboxPhase.FINISHED

    def status(self) -> c.SandboxStatus:
        """Return the sandbox as it is now."""
        return c.SandboxStatus(
            evaluation_id=self.evaluation_id,
            attempt=self.attempt,
            runtime=self._runtime.name,
            phase=self._phase,
            outcome=self._outcome,
        )

    async def wait_finished(self, seconds: float) -> None:
        """Return once the end is recorded, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._recorded.wait()

    async def stop(self, reason: Reason) -> None:
        """End the sandbox for a reason; returns once no process of it is left."""
        if reason in CANCEL_REASONS:
            self._cancelled = self._cancelled or reason
        else:
            self._lost = self._lost or reason
        self._end_now()
        await self._gone.wait()

    def abandon(self) -> None:
        """End the sandbox without recording an end: this dispatcher is going away, and the attempt is someone else's to settle."""
        if not self._gone.is_set():
            self._void = True
            if self._sandbox:
                self._sandbox.kill()

    async def wait_gone(self) -> None:
        """Return once no process of the sandbox is left."""
        await self._gone.wait()

    # -- the sandbox's life

    async def run(self) -> None:
        """See the attempt through. Storage that does not answer can make this last; nothing else can."""
        shipping = asyncio.create_task(self._shipper.run(), name=f"ship-{self._name}")
        try:
            facts = await self._live_or_explain()
            if self._void:
                return
            ended = asyncio.get_running_loop().time()
            self._outcome = self._decide(facts)
            self._shipper.finished(self._outcome)
            await shipping
            metrics.RESULT_VISIBLE.observe(asyncio.get_running_loop().time() - ended)
            log.debug(
                "sandbox ended", evaluation_id=self.evaluation_id, attempt=self.attempt, reason=self._outcome.reason
            )
        finally:
            shipping.cancel()
            self._set_timer(None)
            self._leave()
            self._phase = c.SandboxPhase.FINISHED
            self._recorded.set()

    async def _live_or_explain(self) -> SandboxFacts:
        try:
            return await self._live()
        except Exception as error:
            log.exception("the supervision of a sandbox failed", evaluation_id=self.evaluation_id)
            self._report = None
            description = f"the dispatcher made a mistake: {type(error).__name__}"
            return SandboxFacts(cancelled=self._cancelled, lost=self._lost, exit_description=description)

    async def _live(self) -> SandboxFacts:
        """Start the sandbox, follow it, and return what is known from outside once nothing of it is left."""
        wanted, self._wanted = self._wanted, None
        if wanted is None or self._void or self._cancelled or self._lost:
            self._leave()
            return SandboxFacts(
                cancelled=self._cancelled, lost=self._lost, exit_description="ended before it had begun"
            )
        try:
            sandbox = self._sandbox = self._runtime.create(wanted)
        except SandboxStartError as error:
            metrics.SANDBOXES.labels("failed").inc()
            self._leave()
            return SandboxFacts(cancelled=self._cancelled, lost=self._lost, exit_description=str(error))
        metrics.SANDBOXES.labels("created").inc()
        metrics.SANDBOXES_LIVE.inc()
        try:
            self._set_timer(_START_SECONDS, "the code did not start in time")
            await self._follow(sandbox)
        except BaseException:
            sandbox.kill()
            raise
        finally:
            end = await sandbox.ended()
            self._sandbox = None
            metrics.SANDBOXES_LIVE.dec()
            self._leave()
        return SandboxFacts(
            oom_kills=end.oom_kills,
            peak_memory_bytes=end.peak_memory_bytes,
            cpu_seconds=end.cpu_seconds,
            deadline_exceeded=self._deadline_exceeded,
            cancelled=self._cancelled,
            lost=self._lost,
            exit_description=self._problem or end.description,
        )

    async def _follow(self, sandbox: Sandbox) -> None:
        decoder = Decoder()
        try:
            while data := await sandbox.receive():
                for frame in decoder.feed(data):
                    self._take(sandbox, frame)
                await self._shipper.room()
        except (FrameError, ValidationError) as error:
            self._problem = f"what came from the runner was not understood: {error}"[:500]
            self._report = None
            sandbox.kill()
            while await sandbox.receive():
                pass

    def _take(self, sandbox: Sandbox, frame: Frame) -> None:
        match frame.kind:
            case Kind.STARTED:
                sandbox.code_started()
                self._phase = c.SandboxPhase.RUNNING
                self._shipper.started(datetime.now(UTC))
                self._set_timer(self._timeout_seconds + self._grace, None)
            case Kind.REPORT:
                self._report = RunnerReport.model_validate_json(frame.payload)
                self._set_timer(_LEAVE_SECONDS, "the runner did not leave after its report")
            case _:
                self._shipper.add(frame)

    def _set_timer(self, seconds: float | None, problem: str | None = None) -> None:
        """(Re)set the time after which the sandbox is ended from outside. Without a `problem` that is the evaluation's deadline."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer, problem)

    def _on_timer(self, problem: str | None) -> None:
        self._deadline_exceeded = problem is None
        self._problem = problem
        log.warning("ending a sandbox from outside", evaluation_id=self.evaluation_id, why=problem or "deadline")
        if self._sandbox:
            self._sandbox.kill()

    def _end_now(self) -> None:
        """Ask the runner to end; insist a little later."""
        if self._sandbox and not self._gone.is_set():
            self._sandbox.stop()
            asyncio.get_running_loop().call_later(_STOP_SECONDS, self._sandbox.kill)

    def _become_void(self) -> None:
        """Storage says that the attempt is void, or that a cancel was recorded before we heard of it."""
        self._cancelled = self._cancelled or Reason.CANCELLED_BY_USER
        self._end_now()

    def _leave(self) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._on_gone()

    def _decide(self, facts: SandboxFacts) -> Outcome:
        return decide(
            self._report,
            facts,
            memory_limit=self._memory_limit,
            timeout_seconds=self._timeout_seconds,
        )
