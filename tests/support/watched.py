"""A cluster whose sandboxes are watched: a real storage service and real monitors as processes of this machine, and Jobs as the dispatcher makes them.

    async with watched_cluster(cluster, folder, image) as bench:
        monitor = bench.start_monitor()
        evaluation_id = await bench.run("print('hello')")
        record = await bench.ended(evaluation_id)

The test itself is worker and dispatcher, so that it decides what is made when, and nothing else meddles.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from crucible import contracts as c
from crucible import names
from crucible.clients import StorageClient, http_client
from crucible.dispatcher.kubernetes.manifest import sandbox_objects
from crucible.evaluation import EvaluationRequest, Reason, State, make_evaluation_id, resolve
from crucible.frames import Frame, Kind
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, PODS, ApiError, KubernetesApi
from crucible.limits import Limits
from crucible.outcome import Outcome
from crucible.settings import KubernetesSettings
from tests.support.policies import allow_image, apply_policies
from tests.support.postgres import fresh_database
from tests.support.service_processes import ServiceProcess
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from crucible.events import Event
    from tests.cluster import Cluster

Object = dict[str, Any]
T = TypeVar("T")
WORKER = "test-worker"
# Shorter than a person would set them, so that what they bound can be seen.
SCHEDULING_SECONDS = 12
NODE_LOST_SECONDS = 4
# Each look is a call to a service; there are few processors, and many look.
_POLL_SECONDS = 0.2
MOST_OUTPUT = 110 * 1024 * 1024
MISSING_IMAGE = f"crucible.local/missing@sha256:{'0' * 64}"


def prepare(cluster: Cluster, reference: str, archive: Path) -> None:
    """Make a cluster one that takes evaluations: policies, and the runner's image; done again, it changes nothing."""
    cluster.import_image(archive)
    apply_policies(cluster)
    allow_image(cluster, "python", reference)
    allow_image(cluster, "missing", MISSING_IMAGE)


class WatchedCluster:
    """What a test holds of it all. Every wait is bounded."""

    def __init__(self, cluster: Cluster, folder: Path, database_url: str, image: str) -> None:
        self.cluster = cluster
        self.token = secrets.token_hex(16)
        self.limits = Limits(output_bytes=MOST_OUTPUT, images=("python", "missing"))
        self.settings = KubernetesSettings(
            kubeconfig=cluster.kubeconfig,
            images={"python": image, "missing": MISSING_IMAGE},
            # Many at once on few processors, most of them idle.
            cpu_request_percent=10,
            node_lost_seconds=NODE_LOST_SECONDS,
        )
        self._folder = folder
        (folder / "data").mkdir(mode=0o711, exist_ok=True)
        self._common = {
            "CRUCIBLE_INTERNAL_TOKEN": self.token,
            "CRUCIBLE_DATA_DIR": str(folder / "data"),
            "CRUCIBLE_KUBERNETES__KUBECONFIG": str(cluster.kubeconfig),
            "CRUCIBLE_KUBERNETES__SCHEDULING_SECONDS": str(SCHEDULING_SECONDS),
            "CRUCIBLE_KUBERNETES__NODE_LOST_SECONDS": str(NODE_LOST_SECONDS),
            "CRUCIBLE_KUBERNETES__IMAGES": json.dumps({"python": image}),
            "CRUCIBLE_MONITOR__RECONCILE_SECONDS": "5",
            "CRUCIBLE_LOG__LEVEL": "info",
        }
        # The test renews no lease, and each loss is to be seen as an end.
        storage = {
            "CRUCIBLE_STORAGE__DATABASE_URL": database_url,
            "CRUCIBLE_STORAGE__LEASE_SECONDS": "900",
            "CRUCIBLE_STORAGE__MAX_ATTEMPTS": "1",
        }
        self.storage = ServiceProcess("storage", "storage", folder, self._common | storage)
        self.monitors: list[ServiceProcess] = []
        self.api: KubernetesApi
        self.client: StorageClient
        self._claimed: dict[str, c.Claim] = {}

    # -- services

    def make_monitor(self, kind: str = "monitor", **environment: str) -> ServiceProcess:
        """Describe another replica; `start` it."""
        name = f"{kind}-{len(self.monitors)}"
        own = {"CRUCIBLE_STORAGE_URL": self.storage.url, **environment}
        service = ServiceProcess(kind, name, self._folder, self._common | own)
        self.monitors.append(service)
        return service

    def start_monitor(self) -> ServiceProcess:
        """Start another replica, and wait until it does its part."""
        monitor = self.make_monitor()
        monitor.start()
        return monitor

    def kill_monitors(self) -> None:
        """End all replicas as a power cut does."""
        for monitor in self.monitors:
            monitor.kill()

    @property
    def leader(self) -> ServiceProcess | None:
        """The replica that leads."""
        alive = [monitor for monitor in self.monitors if monitor.alive() and monitor.ready()]
        return next((monitor for monitor in alive if monitor.metric("monitor_is_leader") == 1), None)

    # -- evaluations

    async def submit(self, code: str, *, stdin: str = "", **fields: Any) -> str:
        """Store an evaluation and claim it, as the API and a worker do."""
        evaluation_id = make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))
        request = EvaluationRequest.model_validate({"code": code, "stdin": stdin, "profile": "small", **fields})
        spec = resolve(request, self.limits)
        new = c.NewEvaluation(
            id=evaluation_id,
            owner="ada",
            spec=spec,
            request_sha256=hashlib.sha256(spec.model_dump_json().encode()).hexdigest(),
        )
        await self.client.create(c.NewEvaluations(items=[new]))
        await self.claim(evaluation_id)
        return evaluation_id

    async def claim(self, evaluation_id: str) -> c.Claim:
        """Claim it, for the first or another time."""
        answer = await self.client.claim_one(evaluation_id, c.ClaimOne(worker=WORKER, key=secrets.token_hex(8)))
        assert answer.claim is not None, f"{evaluation_id} is {answer.state}"
        self._claimed[evaluation_id] = answer.claim
        return answer.claim

    async def create(self, evaluation_id: str, change: Callable[[Object], None] = lambda _: None) -> str:
        """Make the Job of the present claim, as the dispatcher does, changed by `change`; returns its name."""
        claim = self._claimed[evaluation_id]
        request = c.SandboxRequest(attempt=claim.attempt, worker=WORKER, owner=claim.owner, spec=claim.spec)
        objects = sandbox_objects(evaluation_id, request, self.settings, self.limits, grace_seconds=2)
        change(objects.job)
        for config_map in objects.config_maps:
            await self.call(self.api.create, CONFIG_MAPS, config_map, names.EVALUATION_NAMESPACE)
        await self.call(self.api.create, JOBS, objects.job, names.EVALUATION_NAMESPACE)
        return str(objects.job["metadata"]["name"])

    async def call(self, method: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T | None:
        """Call the API server until it has answered; None where it was done already, or there is nothing to do it to."""
        found: T | None = None

        async def done() -> bool:
            nonlocal found
            try:
                found = await method(*args, **kwargs)
            except ApiError as error:
                if error.transient:
                    return False
                if not (error.not_found or error.already_exists):
                    raise
            return True

        await _until(done, 30, "the API server to answer")
        return found

    async def run(self, code: str, change: Callable[[Object], None] = lambda _: None, **fields: Any) -> str:
        """Submit, claim and make the Job; returns the evaluation's id."""
        evaluation_id = await self.submit(code, **fields)
        await self.create(evaluation_id, change)
        return evaluation_id

    def name_of(self, evaluation_id: str) -> str:
        """The name of the present attempt's Job."""
        return names.sandbox_name(evaluation_id, self._claimed[evaluation_id].attempt)

    async def stop(self, evaluation_id: str, reason: Reason) -> None:
        """Ask for the end of a sandbox, as the dispatcher does."""
        mark = {"metadata": {"annotations": {names.ANNOTATION_STOP: reason}}}
        await self.call(self.api.patch, JOBS, self.name_of(evaluation_id), mark, names.EVALUATION_NAMESPACE)
        await self.delete_pod(evaluation_id)

    async def tell_running(self, evaluation_id: str) -> None:
        """Tell storage that its code has begun."""
        attempt, name = self._claimed[evaluation_id].attempt, self.name_of(evaluation_id)
        await self.client.running(evaluation_id, c.Running(attempt=attempt, actor="test", sandbox=name))

    async def lose(self, evaluation_id: str) -> None:
        """Settle its attempt behind the cluster's back, as storage does when a worker falls silent."""
        outcome = Outcome(state=State.FAILED, reason=Reason.EVICTED, detail="settled by the test")
        finish = c.Finish(attempt=self._claimed[evaluation_id].attempt, actor="test", outcome=outcome)
        await self.client.finish(evaluation_id, finish)

    async def delete_pod(self, evaluation_id: str, *, grace_seconds: int = 1) -> None:
        """Delete its Pod."""
        pod = await self.pod(evaluation_id)
        if pod is not None:
            name = pod["metadata"]["name"]
            await self.call(self.api.delete, PODS, name, names.EVALUATION_NAMESPACE, grace_seconds=grace_seconds)

    async def pod(self, evaluation_id: str) -> Object | None:
        """Return the Pod of the present attempt, if there is one."""
        selector = (
            f"{names.LABEL_EVALUATION}={evaluation_id},{names.LABEL_ATTEMPT}={self._claimed[evaluation_id].attempt}"
        )
        found = await self.call(self.api.list, PODS, names.EVALUATION_NAMESPACE, labels=selector)
        return found[0][0] if found and found[0] else None

    async def job(self, evaluation_id: str) -> Object | None:
        """Return the Job of the present attempt, if there is one."""
        return await self.call(self.api.get, JOBS, self.name_of(evaluation_id), names.EVALUATION_NAMESPACE)

    # -- what came of it

    async def state(self, evaluation_id: str) -> State:
        """Return the state that storage has."""
        return (await self.client.get(evaluation_id)).state

    async def running(self, evaluation_id: str, seconds: float = 60) -> None:
        """Wait until its code runs."""
        await _until(lambda: self._is(evaluation_id, State.RUNNING), seconds, f"{evaluation_id} to run")

    async def _is(self, evaluation_id: str, state: State) -> bool:
        return await self.state(evaluation_id) is state

    async def ended(self, evaluation_id: str, seconds: float = 90) -> c.EvaluationRecord:
        """Wait until it has ended for good."""
        found: c.EvaluationRecord | None = None

        async def over() -> bool:
            nonlocal found
            found = await self.client.get(evaluation_id)
            return found.state.terminal

        await _until(over, seconds, f"{evaluation_id} to end")
        assert found is not None
        return found

    async def queued_again(self, evaluation_id: str, seconds: float = 60) -> Event:
        """Wait until its attempt has turned out void; returns the event that says why."""
        await _until(lambda: self._is(evaluation_id, State.QUEUED), seconds, f"{evaluation_id} to be queued again")
        return (await self.events(evaluation_id))[-1]

    async def collected(self, evaluation_id: str, seconds: float = 20) -> None:
        """Wait until the cluster may delete what it has of it, and then delete it, as the cleanup does."""

        async def given_back() -> bool:
            job, pod = await asyncio.gather(self.job(evaluation_id), self.pod(evaluation_id))
            marked = job is None or (job["metadata"].get("labels") or {}).get(names.LABEL_COLLECTED) == "true"
            kept = pod is not None and names.FINALIZER_OUTPUT in (pod["metadata"].get("finalizers") or [])
            return marked and not kept

        await _until(given_back, seconds, f"{evaluation_id} to be given back")

    async def events(self, evaluation_id: str) -> list[Event]:
        """Return its events."""
        return (await self.client.events(evaluation_id)).events

    async def frames(self, evaluation_id: str) -> list[Frame]:
        """Return all its output, in order."""
        frames: list[Frame] = []
        after = 0
        while True:
            more, after = await self.client.frames(evaluation_id, after=after)
            if not more:
                return frames
            frames += more

    async def output(self, evaluation_id: str) -> tuple[bytes, bytes]:
        """Return what it wrote: standard output and standard error."""
        streams: dict[Kind, list[bytes]] = defaultdict(list)
        for frame in await self.frames(evaluation_id):
            streams[frame.kind].append(frame.payload)
        return b"".join(streams[Kind.STDOUT]), b"".join(streams[Kind.STDERR])

    async def clear(self) -> None:
        """Delete everything that tests have made, whatever state it is in."""
        for resource, change in ((JOBS, None), (PODS, {"metadata": {"finalizers": None}})):
            found, _ = await self.api.list(resource, names.EVALUATION_NAMESPACE, labels=names.OWN_SELECTOR)
            for each in found:
                name = each["metadata"]["name"]
                if change:
                    await self.call(self.api.patch, resource, name, change, names.EVALUATION_NAMESPACE)
                await self.call(
                    self.api.delete,
                    resource,
                    name,
                    names.EVALUATION_NAMESPACE,
                    propagation="Background",
                    grace_seconds=0,
                )

    def logs(self) -> str:
        """What the services have said, for the failure of a test."""
        return "\n".join(f"--- {each.name}\n{each.log[-6000:]}" for each in [self.storage, *self.monitors])


@asynccontextmanager
async def watched_cluster(cluster: Cluster, folder: Path, image: str) -> AsyncIterator[WatchedCluster]:
    """Run storage beside a cluster that is prepared; monitors are the test's to start."""
    async with fresh_database() as url:
        bench = WatchedCluster(cluster, folder, url, image)
        try:
            bench.storage.start()
            async with (
                http_client(bench.storage.url, bench.token) as http,
                KubernetesApi.from_settings(bench.settings, "crucible-tests") as bench.api,
            ):
                bench.client = StorageClient(http)
                yield bench
                await bench.clear()
        finally:
            for service in [*bench.monitors, bench.storage]:
                service.kill()


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    met: bool = await wait_until_async(condition, timeout=seconds, describe=what, poll=_POLL_SECONDS)
    assert met


def describe(events: list[Event]) -> str:
    """Return events in short, for the failure of a test."""
    return json.dumps([[event.type, event.attempt, event.reason, event.detail] for event in events], indent=1)
