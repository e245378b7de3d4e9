"""What storage believes against what the cluster has, for whatever happened while nobody watched. Only the leader does it.

Everything is looked at twice, in the copy and then at the source, since the two are never of one moment: a sandbox that has just ended
must not be called lost.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from crucible import contracts as c
from crucible import logs, metrics
from crucible.evaluation import HELD_STATES, Reason, State, terminal_state_of
from crucible.kubernetes.api import JOBS, ApiError
from crucible.names import parse_sandbox_name, sandbox_name
from crucible.outcome import Outcome
from crucible.resilience import CallFailedError
from crucible.watching.facts import is_collected, sandbox_of
from crucible.watching.release import mark_collected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crucible.clients import StorageClient
    from crucible.kubernetes.api import KubernetesApi
    from crucible.kubernetes.reflector import Reflector

log = logs.get_logger("reconcile")

# A copy that has not been heard of for so long is no ground to call anything lost.
_FRESH_SECONDS = 15.0
_PAGE = 1000


class Reconciler:
    """Compares, and mends. `run` does it for ever, whenever this replica leads.

    Args:
        storage: what is believed.
        api: the cluster, for a second look.
        namespace: where sandboxes are.
        jobs: copy of the Jobs.
        pods: copy of the Pods.
        leads: whether this replica leads now.
        forget_the_dead: deletes leases of replicas long gone.
        actor: how events name us.
        seconds: between two comparisons.
    """

    def __init__(
        self,
        storage: StorageClient,
        api: KubernetesApi,
        namespace: str,
        *,
        jobs: Reflector,
        pods: Reflector,
        leads: Callable[[], bool],
        forget_the_dead: Callable[[], Awaitable[None]],
        actor: str,
        seconds: float,
    ) -> None:
        self._storage = storage
        self._api = api
        self._namespace = namespace
        self._jobs = jobs
        self._pods = pods
        self._leads = leads
        self._forget_the_dead = forget_the_dead
        self._actor = actor
        self._seconds = seconds

    async def run(self) -> None:
        """Compare again and again."""
        # Sooner at first: a new leader may have a long absence of everyone to make up for.
        await asyncio.sleep(min(2.0, self._seconds))
        while True:
            if self._leads():
                try:
                    await self.compare()
                except (ApiError, CallFailedError) as error:
                    log.warning("storage and the cluster could not be compared", error=str(error))
            await asyncio.sleep(self._seconds)

    async def compare(self) -> None:
        """Compare once."""
        # Held first: what is claimed after it, and then gets a Job, cannot be taken for void.
        held = await self._held()
        if max(self._jobs.behind_seconds, self._pods.behind_seconds) > _FRESH_SECONDS:
            return
        present = {
            name for copy in (self._jobs, self._pods) for each in copy.objects.values() if (name := sandbox_of(each))
        }
        for name, attempt in held.items():
            if attempt.state is State.RUNNING and name not in present:
                await self._settle_vanished(name, attempt)
        for (_, name), job in list(self._jobs.objects.items()):
            if not is_collected(job) and name not in held:
                await self._settle_void(name)
        await self._forget_the_dead()

    async def _held(self) -> dict[str, c.HeldAttempt]:
        held: dict[str, c.HeldAttempt] = {}
        after: str | None = ""
        while after is not None:
            page = await self._storage.held(after=after, limit=_PAGE)
            held |= {sandbox_name(item.evaluation_id, item.attempt): item for item in page.items}
            after = page.after
        return held

    async def _settle_vanished(self, name: str, attempt: c.HeldAttempt) -> None:
        """End an attempt that is said to run, and of which the cluster has nothing."""
        try:
            await self._api.get(JOBS, name, self._namespace)
        except ApiError as error:
            if not error.not_found:
                raise
        else:
            return
        reason = Reason.NODE_LOST
        detail = "the cluster has neither its Job nor its Pod any more"
        outcome = Outcome(state=terminal_state_of(reason), reason=reason, detail=detail)
        finish = c.Finish(attempt=attempt.attempt, actor=self._actor, outcome=outcome, collected=True)
        try:
            await self._storage.finish(attempt.evaluation_id, finish)
        except CallFailedError as error:
            if error.status not in (404, 409):
                raise
            return
        metrics.MONITOR_RECONCILED.labels("vanished").inc()
        log.warning("a sandbox has vanished", sandbox=name)

    async def _settle_void(self, name: str) -> None:
        """Give back a Job whose attempt is over: someone else has settled it, and nobody awaits what it does."""
        parsed = parse_sandbox_name(name)
        if parsed is None:
            return
        evaluation_id, number = parsed
        try:
            record = await self._storage.get(evaluation_id)
        except CallFailedError as error:
            if error.status != 404:
                raise
            return  # not of this installation; the cleanup judges by age
        if record.attempt == number and record.state in HELD_STATES:
            return
        await mark_collected(self._api, self._namespace, name)
        metrics.MONITOR_RECONCILED.labels("void").inc()
        log.info("the Job of a void attempt is given back", sandbox=name)
