"""Removes from the cluster what nobody needs any more, and says what it could not remove.

Told by the watch that a Job is collected, it deletes the Job, and looks until nothing of the attempt is left: Job, Pods, ConfigMaps.
Now and then it looks at everything for what was left behind: objects without a Job, Jobs that no watcher marked. Whatever it does is
harmless when done twice, so replicas need no agreement; and it touches only what carries the dispatcher's labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from crucible import logs, metrics, names
from crucible.cleanup import rules
from crucible.cleanup.queue import WorkQueue
from crucible.cleanup.rules import Attempt, Object, Step, Why
from crucible.health import Heartbeat
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, NODES, PODS, ApiError, Resource
from crucible.kubernetes.reflector import ChangeKind, Reflector
from crucible.resilience import CallFailedError
from crucible.watching.release import take_finalizer_off

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.clients import StorageClient
    from crucible.health import Health
    from crucible.kubernetes.api import KubernetesApi
    from crucible.kubernetes.reflector import Change
    from crucible.settings import CleanupSettings, KubernetesSettings

log = logs.get_logger("cleanup")

Things = dict[tuple[str, str], Object]

_WORKERS = 8
# Longer than Kubernetes takes for what needs nobody's help: a Pod's grace period, its node's answer, the garbage collector.
_STUCK_AFTER_S = 45.0
_SWEEP_MAX_S = 30.0
# A healthy watch hears the API server every 10 s.
_SILENT_S = 30.0
# How many names stand in a text for people; the rest is counted.
_NAMED = 10


@dataclass
class Report:
    """What a sweep did, by the names of the attempts."""

    removed: dict[str, Why] = field(default_factory=dict)
    would_remove: dict[str, Why] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    stuck: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Removal:
    """A removal that goes on: since when (monotonic), and why."""

    since: float
    why: Why


class Cleanup:
    """The controller. `start` it and `aclose` it; or have it `sweep_once`.

    Args:
        api: the cluster.
        storage: the judge.
        settings: how old an orphan is, and whether to remove at all.
        kubernetes: where the evaluations are.
    """

    def __init__(
        self, api: KubernetesApi, storage: StorageClient, settings: CleanupSettings, kubernetes: KubernetesSettings
    ) -> None:
        self._api = api
        self._storage = storage
        self._settings = settings
        self._namespace = kubernetes.namespace
        self._node_lost_seconds = kubernetes.node_lost_seconds
        own = {"namespace": kubernetes.namespace, "labels": names.OWN_SELECTOR}
        self._jobs = Reflector(api, JOBS, **own)
        self._pods = Reflector(api, PODS, **own)
        self._nodes = Reflector(api, NODES)
        self._reflectors = {"Jobs": self._jobs, "Pods": self._pods, "Nodes": self._nodes}
        # Jobs and Pods by attempt, as the watches tell of them.
        self._there: defaultdict[Attempt, Things] = defaultdict(dict)
        self._queue: WorkQueue[Attempt] = WorkQueue()
        self._removals: dict[Attempt, _Removal] = {}
        self._stuck: dict[Attempt, list[str]] = {}
        self._heartbeat = Heartbeat(4 * _SWEEP_MAX_S)
        self._tasks: list[asyncio.Task[None]] = []
        self._report: Report | None = None

    # -- life

    def watch(self, health: Health) -> None:
        """Add what tells whether it can do its work, and what it failed at."""
        health.add("cluster", self._silent)
        health.add("sweep", self._heartbeat.check)
        health.add("removal", self._unremoved)

    async def start(self) -> None:
        """Begin to follow the cluster and to remove."""
        self._follow()
        self._tasks = [asyncio.create_task(self._work(), name=f"cleanup-{number}") for number in range(_WORKERS)]
        self._tasks.append(asyncio.create_task(self._sweep_forever(), name="cleanup-sweep"))

    def _follow(self) -> None:
        self._jobs.subscribe(self._told(JOBS))
        self._pods.subscribe(self._told(PODS))
        for reflector in self._reflectors.values():
            reflector.start()

    async def aclose(self) -> None:
        """Stop; what is under way is found again at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reflector in self._reflectors.values():
            await reflector.aclose()

    async def sweep_once(self, limit_seconds: float) -> Report:
        """Look at everything once, remove what may go, and return once it is gone or the time is up.

        Raises:
            ApiError: the cluster cannot be read.
            CallFailedError: storage does not answer, so nothing can be judged.
        """
        # Asked once in the foreground, since what fails in a watch is only tried again.
        await self._storage.queue()
        await self._api.list(JOBS, self._namespace, labels=names.OWN_SELECTOR)
        report = self._report = Report()
        self._follow()
        await asyncio.gather(*(reflector.synced.wait() for reflector in self._reflectors.values()))
        await self._sweep()
        self._tasks = [asyncio.create_task(self._work(), name=f"cleanup-{number}") for number in range(_WORKERS)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._queue.empty.wait()
        for attempt in self._removals:
            self._stuck.setdefault(attempt, [f"{attempt} is still being removed after {limit_seconds:g} s"])
        report.stuck = {str(attempt): problems for attempt, problems in sorted(self._stuck.items())}
        return report

    # -- health

    def _silent(self) -> str | None:
        for kind, reflector in self._reflectors.items():
            if not reflector.synced.is_set():
                return f"{kind} have not been read yet"
            if reflector.behind_seconds > _SILENT_S:
                return f"the API server has said nothing of {kind} for {reflector.behind_seconds:.0f} s"
        return None

    def _unremoved(self) -> str | None:
        problems = [problem for found in self._stuck.values() for problem in found]
        if not problems:
            return None
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        return f"{len(problems)} objects cannot be removed: {'; '.join(problems[:_NAMED])}{more}"

    # -- what is told

    def _told(self, resource: Resource) -> Callable[[Change], None]:
        def tell(change: Change) -> None:
            attempt = rules.attempt_of(change.object)
            if attempt is None:
                return
            place = (resource.kind, change.object["metadata"]["name"])
            if change.kind is ChangeKind.DELETED:
                self._there[attempt].pop(place, None)
                if not self._there[attempt]:
                    del self._there[attempt]
            else:
                self._there[attempt][place] = change.object
            # Where a removal goes on, every change of its objects may be the one that was waited for.
            if attempt in self._removals or (resource is JOBS and rules.is_collected([change.object])):
                self._queue.add(attempt)

        return tell

    # -- looking at everything

    async def _sweep_forever(self) -> None:
        pause = min(_SWEEP_MAX_S, self._settings.orphan_seconds / 4)
        await asyncio.gather(self._jobs.synced.wait(), self._pods.synced.wait())
        while True:
            try:
                await self._sweep()
            except ApiError as error:
                log.warning("the cluster could not be looked through; trying again", error=str(error))
            else:
                self._heartbeat.beat()
            await asyncio.sleep(pause)

    async def _sweep(self) -> None:
        config_maps, _ = await self._api.list(
            CONFIG_MAPS, self._namespace, labels=names.OWN_SELECTOR, metadata_only=True
        )
        found: defaultdict[Attempt, list[Object]] = defaultdict(list)
        for thing in config_maps:
            if attempt := rules.attempt_of(thing):
                found[attempt].append(thing)
        for attempt, known in self._there.items():
            found[attempt] += known.values()
        counts = {JOBS.kind: len(self._jobs.objects), PODS.kind: len(self._pods.objects)}
        counts[CONFIG_MAPS.kind] = len(config_maps)
        for kind, count in counts.items():
            metrics.CLEANUP_OBJECTS.labels(kind).set(count)
        total, high_water = sum(counts.values()), self._settings.high_water
        if total > high_water:
            log.warning("more objects than the high-water mark", objects=total, high_water=high_water)
        age = rules.orphan_age(self._settings.orphan_seconds, total, high_water)
        now = datetime.now(UTC)
        for attempt, things in found.items():
            if rules.is_collected(things):
                self._queue.add(attempt)
            elif rules.youngest_seconds(things, now) >= age:
                self._queue.add(attempt, urgent=False)

    # -- removing

    async def _work(self) -> None:
        while True:
            attempt = await self._queue.get()
            try:
                finished = await self._look(attempt)
            except (ApiError, CallFailedError) as error:
                self._note(attempt, error)
                finished = False
            except Exception as error:
                # One attempt that we cannot make sense of must not keep the others in the cluster.
                log.exception("looking at an attempt failed", attempt=str(attempt))
                self._note(attempt, error)
                finished = False
            if finished:
                self._queue.done(attempt)
            else:
                self._queue.retry(attempt)

    def _note(self, attempt: Attempt, error: Exception) -> None:
        """Take an error as a reason to try again, and one that will not pass as what it is: something that cannot be removed."""
        transient = (
            error.transient or error.conflict if isinstance(error, ApiError) else isinstance(error, CallFailedError)
        )
        log.warning("removal failed; trying again", attempt=str(attempt), error=str(error))
        if not transient:
            self._set_stuck(attempt, [f"{attempt}: {error}"])

    async def _look(self, attempt: Attempt) -> bool:
        """Take one attempt a step further; True once there is nothing more to do about it."""
        things = dict(self._there.get(attempt, {})) or await self._config_maps(attempt)
        if not things:
            self._gone(attempt)
            return True
        why = await self._why(attempt, things)
        if why is None or self._settings.dry_run:
            self._left(attempt, why, things)
            return True
        waited = self._waited(attempt, why)
        for place, thing in things.items():
            await self._step(place, thing, things, waited)
        if waited > _STUCK_AFTER_S:
            problems = [f"{kind} {name} {rules.obstacle(thing)}" for (kind, name), thing in things.items()]
            self._set_stuck(attempt, problems)
        return False

    async def _config_maps(self, attempt: Attempt) -> Things:
        """Read the attempt's ConfigMaps, which nothing watches: each may hold a megabyte."""
        found, _ = await self._api.list(CONFIG_MAPS, self._namespace, labels=attempt.selector, metadata_only=True)
        return {(CONFIG_MAPS.kind, thing["metadata"]["name"]): thing for thing in found}

    async def _why(self, attempt: Attempt, things: Things) -> Why | None:
        """Return why the attempt's objects may go; None if they may not."""
        if rules.is_collected(things.values()):
            return Why.COLLECTED
        if removal := self._removals.get(attempt):
            return removal.why
        try:
            record = await self._storage.get(attempt.evaluation_id)
        except CallFailedError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            record = None
        return rules.why_over(record, attempt)

    def _waited(self, attempt: Attempt, why: Why) -> float:
        """Return for how long the removal has been going on, seconds."""
        now = time.monotonic()
        if attempt not in self._removals:
            self._removals[attempt] = _Removal(now, why)
            if why is not Why.COLLECTED:
                log.warning("removing what was left behind", attempt=str(attempt), why=why.words)
        return now - self._removals[attempt].since

    async def _step(self, place: tuple[str, str], thing: Object, things: Things, waited: float) -> None:
        """Do about one object what is to be done now; that it is gone meanwhile is as good."""
        kind, name = place
        metadata = thing["metadata"]
        try:
            if kind == PODS.kind:
                owned = any(other == JOBS.kind for other, _ in things)
                await self._step_pod(thing, owned=owned, waited=waited)
            elif not rules.terminating(thing):
                resource = JOBS if kind == JOBS.kind else CONFIG_MAPS
                await self._api.delete(resource, name, self._namespace, propagation="Background", uid=metadata["uid"])
        except ApiError as error:
            if not error.not_found:
                raise

    async def _step_pod(self, pod: Object, *, owned: bool, waited: float) -> None:
        metadata = pod["metadata"]
        nodes = {name: node for (_, name), node in self._nodes.objects.items()}
        step = rules.pod_step(pod, nodes, owned=owned, waited=waited, node_lost_seconds=self._node_lost_seconds)
        if step is Step.RELEASE:
            log.warning("releasing a Pod that its watcher left behind", pod=metadata["name"])
            await take_finalizer_off(self._api, self._namespace, pod)
        elif step is Step.FORCE:
            log.warning("removing a Pod without its node's word", pod=metadata["name"], node=pod["spec"]["nodeName"])
            await self._api.delete(PODS, metadata["name"], self._namespace, grace_seconds=0, uid=metadata["uid"])
        elif step is Step.DELETE:
            await self._api.delete(PODS, metadata["name"], self._namespace, uid=metadata["uid"])

    # -- what came of it

    def _gone(self, attempt: Attempt) -> None:
        removal = self._removals.pop(attempt, None)
        self._set_stuck(attempt, [])
        if removal is None:
            return
        metrics.CLEANUP_REMOVED.labels(removal.why).inc()
        metrics.CLEANUP_SECONDS.observe(time.monotonic() - removal.since)
        log.info("removed", attempt=str(attempt), why=removal.why.words)
        if self._report:
            self._report.removed[str(attempt)] = removal.why

    def _left(self, attempt: Attempt, why: Why | None, things: Things) -> None:
        """Take note of what stays: because storage holds it, or because nothing is to be removed."""
        if self._report and why is None:
            self._report.kept.append(str(attempt))
        elif self._report and why:
            self._report.would_remove[str(attempt)] = why
        elif why:
            objects = [f"{kind} {name}" for kind, name in things]
            log.info("would remove", attempt=str(attempt), why=why.words, objects=objects)

    def _set_stuck(self, attempt: Attempt, problems: list[str]) -> None:
        if problems and problems != self._stuck.get(attempt):
            log.error("cannot remove", attempt=str(attempt), problems=problems)
        if problems:
            self._stuck[attempt] = problems
        else:
            self._stuck.pop(attempt, None)
        metrics.CLEANUP_STUCK.set(sum(len(found) for found in self._stuck.values()))
