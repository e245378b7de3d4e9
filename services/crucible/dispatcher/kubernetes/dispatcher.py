"""The dispatcher where sandboxes are Jobs of a cluster. Replicas of it share nothing but the cluster, which is also all the memory they have.

It creates and ends sandboxes; what happens in them is seen, shipped and recorded by whoever watches (`crucible.watching`), who then marks
the Job as collected. That mark, and nothing sooner, is what those who wait here wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

from crucible import contracts as c
from crucible import logs, metrics, names
from crucible.dispatcher.kubernetes.capacity import ENDED_PHASES, RUNTIME, ClusterCapacity
from crucible.dispatcher.kubernetes.errors import problem_of, refused, unavailable
from crucible.dispatcher.kubernetes.manifest import CONFIG_MAP_BYTES, SandboxObjects, sandbox_objects
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.dispatcher.supervisor import STOP_REASONS
from crucible.evaluation import EvaluationRequest, Reason, resolve
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, NODES, PODS, RESOURCE_QUOTAS, RUNTIME_CLASSES, ApiError
from crucible.kubernetes.reflector import Change, ChangeKind, Reflector, key_of
from crucible.problems import ProblemError
from crucible.settings import SettingsError, env_name
from crucible.watching.facts import is_collected, sandbox_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crucible.evaluation import Resources
    from crucible.kubernetes.api import KubernetesApi, Object, Resource
    from crucible.limits import Limits
    from crucible.settings import DispatcherSettings, KubernetesSettings
    from crucible.tracing import Tracing

log = logs.get_logger("dispatcher")

_BY_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
# A healthy watch hears the API server at least every ten seconds.
_BEHIND_SECONDS = 30.0
_SYNC_SECONDS = 30.0
# Collected sandboxes that are still known once their Jobs are gone, so that `wait` and a repeated `create` find them.
_KEPT_COLLECTED = 10_000
_KEPT_SECONDS = 900.0
# After a stop, how long its caller waits for the end to be recorded, before it is told "not yet".
_RECORD_SECONDS = 5.0
_STOP_GRACE_SECONDS = 1
# How long a creation waits here for its turn to start. Its caller asks again; a cancellation waits for the answer.
_TURN_SECONDS = 5.0
# The API server counts each creation in the quota's own object, and says "conflict" where too many do so at once.
_CONFLICT_TRIES = 6
_CONFLICT_PAUSE_S = 0.05
# No evaluation's, since ids begin with their time.
_NOBODY = "ev-00000000000000000000000000"


def check_images(images: Mapping[str, str], wanted: tuple[str, ...]) -> None:
    """Refuse images that a request may name and that stand for nothing, or for something that can be moved.

    Raises:
        SettingsError: which ones.
    """
    variable = env_name("kubernetes", "images")
    missing = [name for name in wanted if name not in images]
    if missing:
        raise SettingsError(f"{variable}: lacks {', '.join(missing)}, which {env_name('limits', 'images')} allows")
    for name, reference in images.items():
        if not _BY_DIGEST.fullmatch(reference):
            raise SettingsError(f"{variable}: {name} must name its image by digest (registry/name@sha256:...)")


def check_limits(limits: Limits) -> None:
    """Refuse limits above what a ConfigMap holds.

    Raises:
        SettingsError: which ones.
    """
    for field in ("code_bytes", "stdin_bytes"):
        if getattr(limits, field) > CONFIG_MAP_BYTES:
            raise SettingsError(
                f"{env_name('limits', field)}: at most {CONFIG_MAP_BYTES}, which is what a ConfigMap holds"
            )


class KubernetesDispatcher:
    """Makes Jobs, each at most once, and says when they are over.

    Args:
        settings: the grace beyond an evaluation's time limit.
        kubernetes: where and how.
        limits: what a sandbox may use.
        api: the cluster; closing it is the caller's.
        tracing: continues each submission's trace.

    Raises:
        SettingsError: an image is missing or not named by digest, or a limit is more than the cluster can hold.
    """

    def __init__(
        self,
        settings: DispatcherSettings,
        kubernetes: KubernetesSettings,
        limits: Limits,
        api: KubernetesApi,
        *,
        tracing: Tracing | None = None,
    ) -> None:
        check_images(kubernetes.images, limits.images)
        check_limits(limits)
        self._grace = settings.deadline_grace_seconds
        self._kubernetes = kubernetes
        self._namespace = kubernetes.namespace
        self._limits = limits
        self._api = api
        self._tracing = tracing
        self._capacity = ClusterCapacity(kubernetes, limits)
        self._jobs = Reflector(api, JOBS, self._namespace, labels=names.OWN_SELECTOR)
        self._pods = Reflector(api, PODS, self._namespace)
        self._nodes = Reflector(api, NODES, labels=f"{names.LABEL_SANDBOX_NODE}=true")
        self._quotas = Reflector(api, RESOURCE_QUOTAS, self._namespace)
        self._attempts: defaultdict[str, set[int]] = defaultdict(set)
        self._pods_of: defaultdict[str, dict[str, Object]] = defaultdict(dict)
        self._collected: OrderedDict[str, float] = OrderedDict()
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        # First come, first served, among those that only wait for others to have started.
        self._turn = asyncio.Lock()
        self._moved = asyncio.Event()
        self._closing = False

    # -- its own life

    @property
    def _reflectors(self) -> tuple[Reflector, ...]:
        return self._jobs, self._pods, self._nodes, self._quotas

    def problem(self) -> str | None:
        """Return why sandboxes cannot be made now, or None."""
        if self._closing:
            return "shutting down"
        behind = max(reflector.behind_seconds for reflector in self._reflectors)
        return f"the API server was last heard {behind:.0f} s ago" if behind > _BEHIND_SECONDS else None

    async def start(self) -> None:
        """Prove that the API server answers and knows the RuntimeClass, and begin to follow the cluster.

        Raises:
            RuntimeUnavailableError: something is missing; it says what and what to do.
        """
        await self._prove()
        self._jobs.subscribe(self._on_job)
        self._pods.subscribe(self._on_pod)
        self._nodes.subscribe(self._on_node)
        self._quotas.subscribe(self._capacity.on_quota)
        for reflector in self._reflectors:
            reflector.start()
        try:
            async with asyncio.timeout(_SYNC_SECONDS):
                for reflector in self._reflectors:
                    await reflector.synced.wait()
        except TimeoutError as error:
            await self._stop_following()
            raise RuntimeUnavailableError(
                "the cluster's Jobs, Pods, Nodes and ResourceQuotas cannot all be listed",
                "see the log above; policies/rbac/dispatcher.yaml has the rights that it takes",
            ) from error
        log.info("sandboxes are ready", runtime=RUNTIME, namespace=self._namespace, nodes=len(self._nodes.objects))

    async def _prove(self) -> None:
        runtime_class = self._kubernetes.runtime_class
        try:
            version = await self._api.ask("/version")
            await self._api.get(RUNTIME_CLASSES, runtime_class)
        except ApiError as error:
            if error.not_found:
                raise RuntimeUnavailableError(
                    f"the cluster has no RuntimeClass {runtime_class}", "apply policies/admission/runtime-class.yaml"
                ) from error
            raise RuntimeUnavailableError(
                f"the API server {self._api.server} does not answer as it should: {error}",
                "check CRUCIBLE_KUBERNETES__KUBECONFIG, or the service account of this Pod",
            ) from error
        log.info("the API server answers", server=self._api.server, version=version.get("gitVersion"))
        await self._rehearse()

    async def _rehearse(self) -> None:
        """Ask the API server whether it would take a sandbox: its rights, its validation and its admission policies, and create nothing."""
        spec = resolve(EvaluationRequest(code="pass"), self._limits)
        request = c.SandboxRequest(attempt=0, worker="", owner="", spec=spec)
        objects = self._objects(_NOBODY, request)
        try:
            for config_map in objects.config_maps:
                await self._api.create(CONFIG_MAPS, config_map, self._namespace, dry_run=True)
            await self._api.create(JOBS, objects.job, self._namespace, dry_run=True)
        except ApiError as error:
            if not error.quota_exceeded:
                raise RuntimeUnavailableError(
                    f"the cluster would not take a sandbox: {error}",
                    "policies/ must be applied to it as they stand beside this version, the list of images included",
                ) from error

    async def aclose(self) -> None:
        """Follow the cluster no more. Sandboxes go on: they are the cluster's, and another replica answers for them."""
        self._closing = True
        for sandbox in list(self._waiters):
            self._wake(sandbox)
        await self._stop_following()

    async def _stop_following(self) -> None:
        for reflector in self._reflectors:
            await reflector.aclose()

    # -- what happens in the cluster

    def _on_job(self, change: Change) -> None:
        _, sandbox = key_of(change.object)
        if (named := names.parse_sandbox_name(sandbox)) is None:
            return
        evaluation_id, attempt = named
        if change.kind is not ChangeKind.DELETED:
            self._attempts[evaluation_id].add(attempt)
        else:
            self._attempts[evaluation_id].discard(attempt)
            if not self._attempts[evaluation_id]:
                del self._attempts[evaluation_id]
        if change.kind is ChangeKind.DELETED or is_collected(change.object):
            self._capacity.release(sandbox)
        if is_collected(change.object):
            self._remember(sandbox)
        self._wake(sandbox)

    def _on_node(self, change: Change) -> None:
        self._capacity.on_node(change)
        self._moved.set()

    def _on_pod(self, change: Change) -> None:
        self._capacity.on_pod(change)
        self._moved.set()
        metrics.SANDBOXES_LIVE.set(self._capacity.sandboxes)
        metrics.SANDBOXES_STARTING.set(self._capacity.starting)
        if (sandbox := sandbox_of(change.object)) is None:
            return
        _, pod = key_of(change.object)
        if change.kind is not ChangeKind.DELETED:
            self._pods_of[sandbox][pod] = change.object
        else:
            self._pods_of[sandbox].pop(pod, None)
            if not self._pods_of[sandbox]:
                del self._pods_of[sandbox]
        self._wake(sandbox)

    def _remember(self, sandbox: str) -> None:
        self._collected.pop(sandbox, None)
        self._collected[sandbox] = time.monotonic()
        oldest = time.monotonic() - _KEPT_SECONDS
        while self._collected:
            first, since = next(iter(self._collected.items()))
            if since > oldest and len(self._collected) <= _KEPT_COLLECTED:
                return
            del self._collected[first]

    def _wake(self, sandbox: str) -> None:
        for waiter in self._waiters.get(sandbox, ()):
            waiter.set()

    def _job(self, sandbox: str) -> Object | None:
        return self._jobs.objects.get((self._namespace, sandbox))

    def _recorded(self, sandbox: str) -> bool:
        return sandbox in self._collected or is_collected(self._job(sandbox))

    # -- creating

    async def create(self, evaluation_id: str, request: c.SandboxRequest) -> c.SandboxStatus:
        """Make the sandbox of an attempt, or find and complete the one that was made.

        Raises:
            ProblemError: `no-capacity`, `never-fits`, `stale-attempt` (a later attempt is here), `cluster-unavailable`,
                `sandbox-refused`, `unavailable` (shutting down).
        """
        sandbox = names.sandbox_name(evaluation_id, request.attempt)
        if self._recorded(sandbox):
            return self._status(evaluation_id, request.attempt)
        if self._closing:
            raise ProblemError("unavailable", "this dispatcher is shutting down", retry_after=1)
        attempts = self._attempts.get(evaluation_id, set())
        if latest := max((attempt for attempt in attempts if attempt > request.attempt), default=None):
            raise ProblemError("stale-attempt", f"attempt {latest} is here already")
        if request.spec.image not in self._kubernetes.images:
            raise refused(Reason.IMAGE_ERROR, f"there is no image {request.spec.image!r} here")
        with self._span(evaluation_id, request), _as_problems():
            for earlier in sorted(attempts - {request.attempt}):
                # Storage has given the evaluation to another attempt, so this one is void.
                await self._end(evaluation_id, earlier, Reason.NODE_LOST)
            await self._make(sandbox, self._objects(evaluation_id, request), request)
        return self._status(evaluation_id, request.attempt)

    def _objects(self, evaluation_id: str, request: c.SandboxRequest) -> SandboxObjects:
        return sandbox_objects(evaluation_id, request, self._kubernetes, self._limits, grace_seconds=self._grace)

    @contextlib.contextmanager
    def _span(self, evaluation_id: str, request: c.SandboxRequest) -> Iterator[None]:
        if self._tracing is None:
            yield
            return
        with self._tracing.span("sandbox.create", traceparent=request.traceparent, evaluation_id=evaluation_id):
            yield

    async def _make(self, sandbox: str, objects: SandboxObjects, request: c.SandboxRequest) -> None:
        """Create what is not there yet. The code comes first, so that no Pod ever lacks it, and is owned by the Job last."""
        job = self._job(sandbox)
        if job is None:
            await self._take_room(sandbox, request.spec.resources, len(objects.config_maps))
            try:
                for config_map in objects.config_maps:
                    await self._create_config_map(config_map)
                job = await self._create_job(sandbox, objects.job)
            except BaseException:
                self._capacity.release(sandbox)
                metrics.SANDBOXES.labels("failed").inc()
                raise
        await self._own(objects, job)

    async def _take_room(self, sandbox: str, wanted: Resources, config_maps: int) -> None:
        """Reserve what a sandbox takes, when it is its turn to start; waits a while for that, and for nothing else."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TURN_SECONDS), self._turn:
                while not self._capacity.another_may_start:
                    self._moved.clear()
                    await self._moved.wait()
                self._reserve(sandbox, wanted, config_maps)
                return
        self._reserve(sandbox, wanted, config_maps)

    def _reserve(self, sandbox: str, wanted: Resources, config_maps: int) -> None:
        answer = self._capacity.reserve(sandbox, wanted, config_maps=config_maps)
        match answer.fit:
            case c.Fit.NEVER:
                raise ProblemError("never-fits", answer.reason or "", largest=answer.largest.model_dump())
            case c.Fit.LATER:
                raise ProblemError("no-capacity", answer.reason or "")

    async def _create(self, resource: Resource, wanted: Object) -> Object:
        for tries_left in reversed(range(_CONFLICT_TRIES)):
            try:
                return await self._api.create(resource, wanted, self._namespace)
            except ApiError as error:
                if not error.conflict or not tries_left:
                    raise
            await asyncio.sleep(_CONFLICT_PAUSE_S * (0.5 + random.random()))  # noqa: S311 - spreads load, no secret
        raise AssertionError("unreachable: the last try returns or raises")

    async def _create_config_map(self, wanted: Object) -> None:
        try:
            await self._create(CONFIG_MAPS, wanted)
        except ApiError as error:
            if not error.already_exists:
                raise
            name = wanted["metadata"]["name"]
            found = await self._api.get(CONFIG_MAPS, name, self._namespace)
            if found.get("binaryData") != wanted["binaryData"] or not found.get("immutable"):
                # Not ours to mend: one attempt has one code, so somebody else made this.
                raise refused(Reason.SANDBOX_ERROR, f"the ConfigMap {name} is there with another content") from error

    async def _create_job(self, sandbox: str, wanted: Object) -> Object:
        try:
            job = await self._create(JOBS, wanted)
        except ApiError as error:
            if not error.already_exists:
                raise
            metrics.SANDBOXES.labels("existing").inc()
            return await self._api.get(JOBS, sandbox, self._namespace)
        metrics.SANDBOXES.labels("created").inc()
        return job

    async def _own(self, objects: SandboxObjects, job: Object) -> None:
        """Have the ConfigMaps go when the Job goes."""
        metadata = job["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        for config_map in objects.config_maps:
            name = config_map["metadata"]["name"]
            owned: Object = {"metadata": {"ownerReferences": [owner]}}
            try:
                await self._api.patch(CONFIG_MAPS, name, owned, self._namespace)
            except ApiError as error:
                if not error.not_found:
                    raise
                # Its Pod waits for it, so it can still be given.
                metadata = {**config_map["metadata"], **owned["metadata"]}
                await self._create_config_map({**config_map, "metadata": metadata})

    # -- waiting

    async def wait(self, evaluation_id: str, *, attempt: int, wait_seconds: float) -> c.SandboxStatus:
        """Return the sandbox once its end is recorded, or as it is after `wait_seconds`.

        Raises:
            ProblemError: `not-found`, `cluster-unavailable`, `unavailable` (shutting down).
        """
        sandbox = names.sandbox_name(evaluation_id, attempt)
        if self._job(sandbox) is None and not self._recorded(sandbox):
            # Perhaps it is too new for our copy of the cluster, or this replica is.
            await self._look(sandbox)
        await self._until_collected(sandbox, wait_seconds)
        if self._closing and not self._recorded(sandbox):
            raise ProblemError("unavailable", "this dispatcher is shutting down; ask another", retry_after=0)
        return self._status(evaluation_id, attempt)

    async def _look(self, sandbox: str) -> None:
        try:
            job = await self._api.get(JOBS, sandbox, self._namespace)
        except ApiError as error:
            if error.not_found:
                raise ProblemError("not-found", "there is no sandbox of this attempt here") from error
            raise unavailable(error) from error
        if is_collected(job):
            self._remember(sandbox)

    async def _until_collected(self, sandbox: str, seconds: float) -> None:
        """Return once the end is recorded, the Job has gone, or the time is up."""
        changed = asyncio.Event()
        self._waiters[sandbox].add(changed)
        seen = self._job(sandbox) is not None
        try:
            async with asyncio.timeout(seconds):
                while not self._recorded(sandbox) and not self._closing:
                    await changed.wait()
                    changed.clear()
                    here = self._job(sandbox) is not None
                    if seen and not here and not self._recorded(sandbox):
                        raise ProblemError("not-found", "the sandbox of this attempt has been removed")
                    seen = seen or here
        except TimeoutError:
            return
        finally:
            self._waiters[sandbox].discard(changed)
            if not self._waiters[sandbox]:
                del self._waiters[sandbox]

    def _status(self, evaluation_id: str, attempt: int) -> c.SandboxStatus:
        sandbox = names.sandbox_name(evaluation_id, attempt)
        return c.SandboxStatus(
            evaluation_id=evaluation_id, attempt=attempt, runtime=RUNTIME, phase=self._phase(sandbox), durable=True
        )

    def _phase(self, sandbox: str) -> c.SandboxPhase:
        if self._recorded(sandbox):
            return c.SandboxPhase.FINISHED
        for pod in self._pods_of.get(sandbox, {}).values():
            for container in pod.get("status", {}).get("containerStatuses") or []:
                if "waiting" not in (container.get("state") or {"waiting": {}}):
                    return c.SandboxPhase.RUNNING
        return c.SandboxPhase.STARTING

    # -- ending

    async def stop(self, evaluation_id: str, reason: Reason, *, attempt: int | None = None) -> c.SandboxStatus:
        """End the sandbox of an evaluation; returns once its end is recorded, or a little later without that.

        With an `attempt` no later one is touched.

        Raises:
            ProblemError: `not-found`, `cluster-unavailable`, or `invalid-request` for a reason that no one can ask for.
        """
        if reason not in STOP_REASONS:
            raise ProblemError(
                "invalid-request", f"a sandbox is not stopped for {reason}; {', '.join(sorted(STOP_REASONS))}"
            )
        known = self._attempts.get(evaluation_id) or await self._find_attempts(evaluation_id)
        attempts = sorted(each for each in known if attempt is None or each <= attempt)
        if not attempts:
            raise ProblemError("not-found", "there is no sandbox of this evaluation here")
        latest = attempts[-1]
        for each in attempts:
            try:
                await self._end(evaluation_id, each, reason)
            except ApiError as error:
                raise unavailable(error) from error
        await self._until_collected(names.sandbox_name(evaluation_id, latest), _RECORD_SECONDS)
        return self._status(evaluation_id, latest)

    async def _find_attempts(self, evaluation_id: str) -> set[int]:
        selector = f"{names.OWN_SELECTOR}={evaluation_id}"
        try:
            jobs, _ = await self._api.list(JOBS, self._namespace, labels=selector)
        except ApiError as error:
            raise unavailable(error) from error
        found = (names.parse_sandbox_name(job["metadata"]["name"]) for job in jobs)
        return {named[1] for named in found if named}

    async def _end(self, evaluation_id: str, attempt: int, reason: Reason) -> None:
        """Say why on the Job, for whoever records the end, and take its Pod away. Harmless for one that has ended.

        Raises:
            ApiError: the cluster does not do it now.
        """
        sandbox = names.sandbox_name(evaluation_id, attempt)
        pods = self._pods_of.get(sandbox, {})
        running = [name for name, pod in pods.items() if pod.get("status", {}).get("phase") not in ENDED_PHASES]
        if self._recorded(sandbox) or (pods and not running):
            return
        patch: Object = {"metadata": {"annotations": {names.ANNOTATION_STOP: reason.value}}}
        if not pods:
            # One may be on its way. A suspended Job gets none, and loses the one that it has just got.
            patch["spec"] = {"suspend": True}
        try:
            await self._api.patch(JOBS, sandbox, patch, self._namespace)
            for pod in running:
                await self._api.delete(PODS, pod, self._namespace, grace_seconds=_STOP_GRACE_SECONDS)
        except ApiError as error:
            if not error.not_found:
                raise

    # -- capacity

    def capacity(self) -> c.CapacityReport:
        """Return what is free."""
        return self._capacity.report()

    def check(self, wanted: Resources) -> c.CapacityAnswer:
        """Say whether something would fit."""
        return self._capacity.check(wanted)


@contextlib.contextmanager
def _as_problems() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise problem_of(error) from error
