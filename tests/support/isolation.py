"""Attacks from inside real evaluations, and the same from Pods that lack one defence: how they are run and read.

`Evaluations` is how the suite gets code into a sandbox. `JobEvaluations` makes what the dispatcher makes and reads what the runner writes,
on a cluster with nothing of the platform but its policies; `PlatformEvaluations` submits through the API of a whole platform.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from crucible import names
from crucible.contracts import SandboxRequest
from crucible.dispatcher.kubernetes.manifest import sandbox_objects
from crucible.evaluation import EvaluationSpec, Resources, make_evaluation_id
from crucible.frames import Frame, Kind, LineDecoder
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, PODS, ApiError
from crucible.limits import Limits, SizeClass
from crucible.quantity import MIB
from crucible.settings import KubernetesSettings
from tests.support.waits import wait_for, wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crucible.kubernetes.api import KubernetesApi, Object, Resource
    from tests.support.platform import Client

START_SECONDS = 60.0
POLL_SECONDS = 0.25
FINISHED = {"Succeeded", "Failed"}


@dataclass(frozen=True)
class Ran:
    """How one evaluation went: what it wrote, what was said of its end, and where it ran."""

    evaluation_id: str
    stdout: bytes
    stderr: bytes
    # The runner's report, or through the platform the evaluation's view.
    end: dict[str, Any]

    def lines(self) -> list[dict[str, Any]]:
        """Read its output as JSON, a line each."""
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass(frozen=True)
class Place:
    """Where a sandbox is."""

    address: str
    node: str
    node_address: str


class Evaluations(Protocol):
    """How code gets into a sandbox and what it did comes out."""

    async def begin(self, code: str, *, stdin: str = "", seconds: int = 60, memory: int = 256 * MIB) -> str:
        """Submit, and return the evaluation's id."""
        raise NotImplementedError

    async def place(self, evaluation_id: str) -> Place:
        """Return where it runs, once it does."""
        raise NotImplementedError

    async def output(self, evaluation_id: str) -> bytes:
        """Return what it has written so far."""
        raise NotImplementedError

    async def end(self, evaluation_id: str) -> Ran:
        """Wait for its end."""
        raise NotImplementedError


async def run(evaluations: Evaluations, code: str, **options: Any) -> Ran:
    """Run code from beginning to end."""
    return await evaluations.end(await evaluations.begin(code, **options))


def place_of(pod: Object) -> Place | None:
    """Return where a Pod runs, or None before it does."""
    status = pod["status"]
    if not status.get("podIP") or not status.get("hostIP"):
        return None
    return Place(status["podIP"], pod["spec"]["nodeName"], status["hostIP"])


class JobEvaluations:
    """Evaluations made as the dispatcher makes them, without the rest of the platform."""

    def __init__(self, api: KubernetesApi, settings: KubernetesSettings, limits: Limits | None = None) -> None:
        self._api = api
        self._settings = settings
        self._limits = limits or Limits()
        self._made: list[str] = []

    async def begin(self, code: str, *, stdin: str = "", seconds: int = 60, memory: int = 256 * MIB) -> str:
        """Create ConfigMaps and Job."""
        evaluation_id = make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))
        spec = EvaluationSpec(
            code=code,
            stdin=stdin,
            priority=5,
            timeout_seconds=seconds,
            resources=Resources(cpu_millis=500, memory_bytes=memory),
            size_class=SizeClass.SMALL,
            image="python",
        )
        request = SandboxRequest(attempt=1, worker="test", owner="test", spec=spec)
        objects = sandbox_objects(evaluation_id, request, self._settings, self._limits, grace_seconds=10)
        self._made.append(evaluation_id)
        for config_map in objects.config_maps:
            await self._api.create(CONFIG_MAPS, config_map, self._settings.namespace)
        await self._api.create(JOBS, objects.job, self._settings.namespace)
        return evaluation_id

    async def _pod(self, evaluation_id: str) -> Object | None:
        found, _ = await self._api.list(
            PODS, self._settings.namespace, labels=f"{names.LABEL_EVALUATION}={evaluation_id}"
        )
        return found[0] if found else None

    async def place(self, evaluation_id: str) -> Place:
        """Wait for its Pod to have an address."""

        async def placed() -> Place | None:
            pod = await self._pod(evaluation_id)
            return place_of(pod) if pod else None

        place: Place | None = await wait_until_async(
            placed, timeout=START_SECONDS, poll=POLL_SECONDS, describe=f"{evaluation_id} to have an address"
        )
        assert place is not None
        return place

    async def output(self, evaluation_id: str) -> bytes:
        """Read the log so far."""
        return b"".join(frame.payload for frame in await self._frames(evaluation_id) if frame.kind is Kind.STDOUT)

    async def _frames(self, evaluation_id: str) -> list[Frame]:
        pod = await self._pod(evaluation_id)
        if pod is None:
            return []
        decoder = LineDecoder()
        try:
            async with self._api.log(
                pod["metadata"]["name"], self._settings.namespace, names.CONTAINER, follow=False
            ) as log:
                return [frame async for part in log for frame in decoder.feed(part)]
        except ApiError:
            # Its container has not started yet.
            return []

    async def end(self, evaluation_id: str) -> Ran:
        """Wait for the end of its Pod, and read its log."""

        async def ended() -> bool:
            pod = await self._pod(evaluation_id)
            return bool(pod) and pod is not None and pod["status"].get("phase") in FINISHED

        _: bool = await wait_until_async(
            ended, timeout=START_SECONDS + 60, poll=POLL_SECONDS, describe=f"{evaluation_id} to end"
        )
        frames = await self._frames(evaluation_id)
        streams = {kind: b"".join(frame.payload for frame in frames if frame.kind is kind) for kind in Kind}
        report = orjson.loads(streams[Kind.REPORT] or b"{}")
        return Ran(
            evaluation_id, streams[Kind.STDOUT], streams[Kind.STDERR], {**await self._killed(evaluation_id), **report}
        )

    async def _killed(self, evaluation_id: str) -> dict[str, Any]:
        """What Kubernetes says of an end that no report tells of: only what the suite asks for."""
        pod = await self._pod(evaluation_id)
        states = (
            [one["state"].get("terminated", {}) for one in pod["status"].get("containerStatuses", [])] if pod else []
        )
        return {"reason": "oom_killed"} if any(state.get("reason") == "OOMKilled" for state in states) else {}

    async def remove(self) -> None:
        """Delete what was made."""
        for evaluation_id in self._made:
            pod = await self._pod(evaluation_id)
            name = names.sandbox_name(evaluation_id, 1)
            await self._delete(JOBS, name)
            if pod is not None:
                unfinalized: Object = {"metadata": {"finalizers": None}}
                await self._api.patch(PODS, pod["metadata"]["name"], unfinalized, self._settings.namespace)
            for config_map in (name, f"{name}-stdin"):
                await self._delete(CONFIG_MAPS, config_map)

    async def _delete(self, resource: Resource, name: str) -> None:
        try:
            await self._api.delete(resource, name, self._settings.namespace, propagation="Background")
        except ApiError as error:
            if not error.not_found:
                raise


class PlatformEvaluations:
    """Evaluations submitted to a whole platform through its API. Where they run, the cluster says."""

    def __init__(self, client: Client, api: KubernetesApi, namespace: str = names.EVALUATION_NAMESPACE) -> None:
        self._client = client
        self._inside = JobEvaluations(api, KubernetesSettings(namespace=namespace))
        # With the seconds that each may run.
        self._running: dict[str, int] = {}

    async def begin(self, code: str, *, stdin: str = "", seconds: int = 60, memory: int = 256 * MIB) -> str:
        """Submit."""
        submitted = await self._client.submit(
            code, stdin=stdin, timeout_seconds=seconds, memory_limit=f"{memory // MIB}Mi", cpu_limit="500m"
        )
        self._running[submitted["id"]] = seconds
        return str(submitted["id"])

    async def place(self, evaluation_id: str) -> Place:
        """Ask the cluster."""
        return await self._inside.place(evaluation_id)

    async def output(self, evaluation_id: str) -> bytes:
        """Read what the platform has of it."""
        return await self._client.output(evaluation_id)

    async def end(self, evaluation_id: str) -> Ran:
        """Wait as long as it may take to start and to run; others start at the same time, of which no patience can know."""
        limit = START_SECONDS + self._running[evaluation_id]
        view = (await wait_for(self._client, evaluation_id, simple=True, seconds=limit)).result
        del self._running[evaluation_id]
        return Ran(
            evaluation_id,
            await self._client.output(evaluation_id),
            await self._client.output(evaluation_id, "stderr"),
            view,
        )

    async def remove(self) -> None:
        """Cancel what still runs; the platform removes everything itself."""
        for evaluation_id in self._running:
            await self._client.http.post(f"/v1/evaluations/{evaluation_id}/cancel")


@asynccontextmanager
async def platform_evaluations(client: Client, api: KubernetesApi) -> AsyncIterator[PlatformEvaluations]:
    """Submit evaluations for as long as the context is open."""
    async with AsyncExitStack() as stack:
        evaluations = PlatformEvaluations(client, api)
        stack.push_async_callback(evaluations.remove)
        yield evaluations


@asynccontextmanager
async def job_evaluations(api: KubernetesApi, settings: KubernetesSettings) -> AsyncIterator[JobEvaluations]:
    """Make evaluations for as long as the context is open."""
    async with AsyncExitStack() as stack:
        evaluations = JobEvaluations(api, settings)
        stack.push_async_callback(evaluations.remove)
        yield evaluations


async def log_of(api: KubernetesApi, namespace: str, pod: str, container: str) -> str:
    """Read a Pod's log so far."""
    async with api.log(pod, namespace, container, follow=False) as log:
        return b"".join([part async for part in log]).decode(errors="replace")


async def until_log(api: KubernetesApi, namespace: str, pod: str, container: str, word: str) -> str:
    """Wait until a Pod's log says a word, and return the log."""

    async def said() -> str:
        text = await log_of(api, namespace, pod, container)
        return text if word in text else ""

    return await wait_until_async(
        said, timeout=START_SECONDS, poll=POLL_SECONDS, describe=f"{pod} to say {word!r}", tolerate=(ApiError,)
    )


async def gather_named(**awaitables: Any) -> dict[str, Any]:
    """Run several things at once and return what each gave, by its name."""
    results = await asyncio.gather(*awaitables.values())
    return dict(zip(awaitables, results, strict=True))
