"""One sandbox of a cluster, from wherever it is found to its recorded end: follow its log, ship what it wrote, decide, record, let it go.

It may begin at any moment of the sandbox's life, and another may have been there before: what storage has is skipped, and what is
recorded stays. It may be given up at any moment too, since everything that counts is in storage and in the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from crucible import logs, metrics
from crucible.evaluation import HELD_STATES, Reason
from crucible.frames import Kind, LineDecoder
from crucible.kubernetes.api import ApiError, ApiUnreachableError
from crucible.names import CONTAINER, parse_sandbox_name
from crucible.outcome import Outcome, RunnerReport, RunnerStatus, SandboxFacts, decide
from crucible.resilience import CallFailedError
from crucible.watching.facts import is_collected, read, wanted_of
from crucible.watching.release import let_pods_go, mark_collected
from crucible.watching.shipping import Shipper, StaleAttemptError, until_taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from crucible.clients import StorageClient
    from crucible.frames import Frame
    from crucible.kubernetes.api import KubernetesApi, Object
    from crucible.watching.facts import Patience, Reading, Wanted

log = logs.get_logger("follower")

# Hundreds are followed at once: what waits for storage is on the node's disk anyway, and little of it need be here.
_ROOM_BYTES = 1024 * 1024
# A log that broke off is read again after a moment, later and later.
_AGAIN_FIRST_S = 0.1
_AGAIN_MAX_S = 2.0
# The log of a container that has ended: how long a stream of it may be silent, and how long its node may refuse it.
_SILENCE_SECONDS = 3.0
_REFUSED_SECONDS = 10.0
# Its node has deleted it: so it does with what was evicted or deleted, at once.
_GONE_SECONDS = 2.0
_GONE_STATUSES = frozenset({400, 404})
# A runner that reported that a signal ended the code has nothing more to do; whether memory was the cause is the container's to say.
_LEAVE_SECONDS = 5.0
# Nodes tell times to the second, and tell that a container runs about a second after it does.
_LATE_SECONDS = 5.0
# With these the runner itself has seen why it ended, and nothing that is learned later can say otherwise.
_CONCLUSIVE = frozenset({RunnerStatus.EXITED, RunnerStatus.WALL_CLOCK, RunnerStatus.OUTPUT_LIMIT})


class Sighting:
    """What the cluster's objects are now; kept up to date by whoever watches them."""

    def __init__(self, nodes: Mapping[str, Object]) -> None:
        self.nodes = nodes
        self.job: Object | None = None
        self.pods: Sequence[Object] = ()
        # As they were last seen: what was asked for must not be forgotten when they are gone.
        self._last_job: Object | None = None

    @property
    def pod(self) -> Object | None:
        """The Pod; of several, which only a mishap can make, the first."""
        return min(self.pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)

    def put(self, job: Object | None, pods: Sequence[Object]) -> None:
        """Take a new state."""
        self._last_job = job or self._last_job
        self.job, self.pods = job, pods

    def wanted(self) -> Wanted:
        """What was asked for."""
        return wanted_of(self.job or self._last_job, self.pod)

    def read(self, patience: Patience) -> Reading:
        """Read it all."""
        pod = self.pod
        made = (self.job or pod or {}).get("metadata", {}).get("creationTimestamp")
        age = (datetime.now(UTC) - datetime.fromisoformat(made)).total_seconds() if made else 0.0
        return read(self.job, pod, self.nodes, patience, age_seconds=age, last_job=self._last_job)


class Follower:
    """Follows one sandbox. `run` does the work; `changed` tells it that what it sees has changed.

    Args:
        sandbox: its name.
        sighting: what the cluster says of it.
        api: the cluster.
        namespace: where it is.
        storage: where its story goes.
        actor: how events name us.
        patience: how long doubts may last.
    """

    def __init__(
        self,
        sandbox: str,
        sighting: Sighting,
        *,
        api: KubernetesApi,
        namespace: str,
        storage: StorageClient,
        actor: str,
        patience: Patience,
    ) -> None:
        parsed = parse_sandbox_name(sandbox)
        if parsed is None:
            raise ValueError(f"{sandbox} is not the name of a sandbox")
        self._id, self._attempt = parsed
        self._sandbox = sandbox
        self._sighting = sighting
        self._api = api
        self._namespace = namespace
        self._storage = storage
        self._actor = actor
        self._patience = patience
        self._wake = asyncio.Event()
        self._stale = False
        self._report: RunnerReport | None = None
        self._problem: str | None = None
        self._reported_at: float | None = None
        self._reading: asyncio.Task[bool] | None = None
        self._era = ""
        self._doubt: str | None = None
        self._doubted_at = 0.0
        # Bytes of output that have gone by in the log, and the number of the next frame that storage does not have.
        self._output_bytes = 0
        self._next = 0

    def changed(self) -> None:
        """Look again."""
        self._wake.set()

    async def run(self) -> None:
        """See it through to the mark that it is collected. Storage or a cluster that does not answer can make this last."""
        if not is_collected(self._sighting.job):
            await self._see_through()
        await let_pods_go(self._api, self._namespace, self._sandbox, list(self._sighting.pods))
        if not is_collected(self._sighting.job):
            await mark_collected(self._api, self._namespace, self._sandbox)

    async def _see_through(self) -> None:
        try:
            self._next = await until_taken(
                self._id, lambda: self._storage.append_output(self._id, [], attempt=self._attempt, frame=0)
            )
        except StaleAttemptError:
            log.info("the attempt is void or recorded already", sandbox=self._sandbox)
            return
        shipper = Shipper(
            self._storage,
            self._id,
            self._attempt,
            actor=self._actor,
            sandbox=self._sandbox,
            on_stale=self._become_stale,
            first_frame=self._next,
            room_bytes=_ROOM_BYTES,
            collected=True,
        )
        shipping = asyncio.create_task(shipper.run(), name=f"ship-{self._sandbox}")
        try:
            facts = await self._follow(shipper)
            if facts is None:
                log.info("the attempt is void", sandbox=self._sandbox)
                return
            learned = asyncio.get_running_loop().time()
            outcome = self._decide(facts)
            shipper.finished(outcome)
            await shipping
            metrics.MONITOR_FINISH_SECONDS.observe(asyncio.get_running_loop().time() - learned)
            log.info("sandbox ended", sandbox=self._sandbox, reason=outcome.reason, detail=outcome.detail)
        finally:
            shipping.cancel()

    def _become_stale(self) -> None:
        self._stale = True
        self._wake.set()

    # -- watching it

    async def _follow(self, shipper: Shipper) -> SandboxFacts | None:
        """Return what was done to it from outside once it is over; None if the attempt is void."""
        try:
            while True:
                self._wake.clear()
                seen = self._sighting.read(self._patience)
                if is_collected(self._sighting.job) or (self._stale and await self._is_void()):
                    return None
                await self._attend_to_log(seen, shipper)
                if (facts := self._verdict(seen)) is not None:
                    return facts
                await self._wait(min(self._report_seconds_left(seen), self._doubt_seconds_left(seen)))
        finally:
            await self._stop_reading()

    def _verdict(self, seen: Reading) -> SandboxFacts | None:
        """Return what was done to it, if it is over and all its output has been read that can be."""
        if self._report_seconds_left(seen) <= 0 or (seen.over and not seen.readable):
            return seen.facts
        if seen.over and self._reading and self._reading.done():
            return seen.facts if self._reading.result() else _unread(seen.facts)
        if seen.doubt and self._doubt_seconds_left(seen) <= 0:
            return seen.doubt.facts
        return None

    def _report_seconds_left(self, seen: Reading) -> float:
        """Return for how long more may be learned though the report is there; endless while it is not."""
        if self._report is None or self._reported_at is None:
            return math.inf
        if self._report.status in _CONCLUSIVE or seen.over:
            return 0.0
        return self._reported_at + _LEAVE_SECONDS - asyncio.get_running_loop().time()

    def _doubt_seconds_left(self, seen: Reading) -> float:
        """Return for how long the present doubt may still last; endless without one."""
        kind = seen.doubt.kind if seen.doubt else None
        now = asyncio.get_running_loop().time()
        if kind != self._doubt:
            self._doubt, self._doubted_at = kind, now
        return seen.doubt.seconds_left(now - self._doubted_at) if seen.doubt else math.inf

    async def _attend_to_log(self, seen: Reading, shipper: Shipper) -> None:
        """Read the log while there is one to be had, and from its start where the stream of it may have gone deaf."""
        if self._reading and (not seen.readable or seen.log_era != self._era):
            await self._stop_reading()
        if seen.readable and self._reading is None:
            self._era = seen.log_era
            self._reading = asyncio.create_task(self._read_log(shipper), name=f"log-{self._sandbox}")
            self._reading.add_done_callback(lambda _: self._wake.set())

    async def _stop_reading(self) -> None:
        task, self._reading = self._reading, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            log.error("reading a log failed", sandbox=self._sandbox, exc_info=error)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(seconds) else max(0.0, seconds)):
                await self._wake.wait()

    async def _is_void(self) -> bool:
        """Storage has refused a report: is that since the attempt is void, or only since a cancel is on its way?"""
        self._stale = False
        try:
            record = await self._storage.get(self._id)
        except CallFailedError as error:
            if error.status != 404:
                self._stale = True
                await asyncio.sleep(_AGAIN_MAX_S)
            return error.status == 404
        return record.attempt != self._attempt or record.state not in HELD_STATES

    # -- its log

    async def _read_log(self, shipper: Shipper) -> bool:
        """Read the log to its end, over and over if it breaks off. False if its end cannot be had."""
        pause = _AGAIN_FIRST_S
        refused_since: float | None = None
        clock = asyncio.get_running_loop().time
        while True:
            seen = self._sighting.read(self._patience)
            try:
                await self._read_once(shipper, follow=not seen.exited)
            except ApiError as error:
                if isinstance(error, ApiUnreachableError):
                    refused_since = None
                else:
                    refused_since = clock() if refused_since is None else refused_since
                    most = _GONE_SECONDS if error.status in _GONE_STATUSES else _REFUSED_SECONDS
                    if self._sighting.read(self._patience).over and clock() - refused_since > most:
                        log.warning("the log cannot be read", sandbox=self._sandbox, error=str(error))
                        return False
                log.info("the log broke off; reading it again", sandbox=self._sandbox, error=str(error))
            else:
                refused_since = None
                # What was read after the container had ended is all that there will be.
                if seen.exited or self._report:
                    return True
            metrics.MONITOR_LOG_RESTARTS.inc()
            # A container's end is told a moment after its log has ended.
            await asyncio.sleep(pause)
            pause = min(pause * 2, _AGAIN_MAX_S)

    async def _read_once(self, shipper: Shipper, *, follow: bool) -> None:
        """Read the log from its start, and take what was not taken before."""
        pod = self._sighting.pod
        if pod is None:
            return
        decoder = LineDecoder()
        number = gone_by = 0
        async with self._api.log(pod["metadata"]["name"], self._namespace, CONTAINER, follow=follow) as pieces:
            async for piece in self._unless_silent(pieces):
                for frame in decoder.feed(piece):
                    if frame.kind not in (Kind.STDOUT, Kind.STDERR):
                        self._take_message(frame, shipper)
                        continue
                    gone_by += len(frame.payload)
                    if number >= self._next:
                        shipper.add(frame)
                        self._next = number + 1
                        metrics.MONITOR_SHIPPED.inc(len(frame.payload))
                    number += 1
                self._output_bytes = max(self._output_bytes, gone_by)
                if self._report:
                    return
                await shipper.room()
        if decoder.strays:
            self._problem = f"the sandbox said: {decoder.strays}"

    async def _unless_silent(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Give up a stream that has nothing more to say though its container has ended."""
        iterator = aiter(pieces)
        while True:
            coming = asyncio.ensure_future(anext(iterator))
            try:
                while not (await asyncio.wait({coming}, timeout=_SILENCE_SECONDS))[0]:
                    if self._sighting.read(self._patience).exited:
                        return
                piece = coming.result()
            except StopAsyncIteration:
                return
            finally:
                if not coming.done():
                    coming.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await coming
            yield piece

    def _take_message(self, frame: Frame, shipper: Shipper) -> None:
        if frame.kind is Kind.STARTED:
            seen = self._sighting.read(self._patience)
            now = datetime.now(UTC)
            # Read as it happened, our own clock is finer; read later, only the node can say.
            late = seen.started_at is not None and (now - seen.started_at).total_seconds() > _LATE_SECONDS
            shipper.started(seen.started_at if late and seen.started_at else now)
        elif self._report is None:
            try:
                self._report = RunnerReport.model_validate_json(frame.payload)
                self._reported_at = asyncio.get_running_loop().time()
            except ValidationError as error:
                self._problem = f"the runner's report was not understood: {error}"
        self._wake.set()

    # -- its end

    def _decide(self, facts: SandboxFacts) -> Outcome:
        wanted = self._sighting.wanted()
        report = self._report
        if report is None:
            report, facts = self._from_message(facts)
        if self._problem and report is None:
            description = f"{facts.exit_description or ''}; {self._problem}"
            facts = SandboxFacts.model_validate({**facts.model_dump(), "exit_description": description})
        return decide(report, facts, memory_limit=wanted.memory_bytes, timeout_seconds=wanted.timeout_seconds)

    def _from_message(self, facts: SandboxFacts) -> tuple[RunnerReport | None, SandboxFacts]:
        """Take the termination message for the report, if there is one that can be trusted and all output has been seen."""
        message = self._sighting.read(self._patience).message
        if not message:
            return None, facts
        try:
            report = RunnerReport.model_validate_json(message)
        except ValidationError:
            return None, facts
        if report.stdout_bytes + report.stderr_bytes == self._output_bytes:
            return report, facts
        # It ended well, but what it wrote is not whole: nobody may take it for a result.
        return None, _unread(facts)


def _unread(facts: SandboxFacts) -> SandboxFacts:
    if facts.lost or facts.cancelled or facts.oom_kills or facts.deadline_exceeded:
        return facts
    why = f"its output could not be read whole ({facts.exit_description or 'no more is known'})"
    return SandboxFacts.model_validate({**facts.model_dump(), "lost": Reason.SANDBOX_ERROR, "exit_description": why})
