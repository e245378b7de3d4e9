"""`make bench-cluster`: what the platform adds to bare Jobs of the same Pod, and what gVisor adds to runc, on one cluster in one run.

It brings a test cluster up, deploys the platform, measures, and takes both down. The bare Jobs are those that the dispatcher would make,
in a namespace of their own where nobody watches them; the runc ones are the same without their RuntimeClass. Every figure is printed with
its ratio to a reference of the same run; nothing here is a test, and nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Figure, percentile, show
from crucible.contracts import SandboxRequest
from crucible.dispatcher.kubernetes.manifest import sandbox_objects
from crucible.evaluation import EvaluationRequest, make_evaluation_id, resolve
from crucible.frames import Frame, Kind, LineDecoder
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, NAMESPACES, PODS, KubernetesApi, from_kubeconfig
from crucible.kubernetes.reflector import Change, Reflector
from crucible.limits import Limits
from crucible.names import CONTAINER
from crucible.settings import KubernetesSettings
from tests.cluster import open_cluster
from tests.deployment import build, deploy, find_target
from tests.support.deployed import WORKER, DeployedPlatform
from tests.support.images import built_image
from tests.support.patience import FixedPatience
from tests.support.platform import Client, connect
from tests.support.waits import wait_for, wait_until_async

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crucible.kubernetes.api import Object

NAMESPACE = "bench"
PROGRAMS = Path(__file__).parent / "cluster_programs"
LIMITS = Limits()
# Both sides keep so many sandboxes under way.
AT_ONCE = 16
HELLO = "print('hello')"
_END_SECONDS = 300.0
_READS = 300
_RATES = 3
_BATCH = 100


@dataclass(frozen=True)
class Runtime:
    """How a bare Pod is isolated."""

    name: str
    runtime_class: str | None


GVISOR, RUNC = Runtime("gVisor", "gvisor"), Runtime("runc", None)


class BareJobs:
    """Jobs of the Pod that the dispatcher would make, made and awaited by as little as possible."""

    def __init__(self, api: KubernetesApi, image: str) -> None:
        self._api = api
        self._settings = KubernetesSettings(namespace=NAMESPACE, images={"python": image}, cpu_request_percent=5)
        self._jobs = Reflector(api, JOBS, NAMESPACE)
        self._ended: dict[str, asyncio.Future[bool]] = {}
        self._count = 0

    async def __aenter__(self) -> BareJobs:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._api.create(NAMESPACES, body)
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "evaluation"}}
        await self._api.review(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", account)
        self._jobs.subscribe(self._note)
        self._jobs.start()
        await self._jobs.synced.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._jobs.aclose()

    def _note(self, change: Change) -> None:
        conditions = change.object.get("status", {}).get("conditions") or []
        for condition in conditions:
            future = self._ended.get(change.object["metadata"]["name"])
            if condition["type"] in ("Complete", "Failed") and future and not future.done():
                future.set_result(condition["type"] == "Complete")

    async def run(
        self, code: str, runtime: Runtime = GVISOR, *, remove: bool = False, **fields: Any
    ) -> tuple[str, float]:
        """Run one to its end; returns its name, and when its Job was created (seconds since 1970).

        With `remove` the cluster deletes it then, and its output with it.
        """
        self._count += 1
        spec = resolve(EvaluationRequest(code=code, **fields), LIMITS)
        name = make_evaluation_id(int(time.time() * 1000), os.urandom(10))
        request = SandboxRequest(attempt=1, worker="bench", owner="bench", spec=spec)
        objects = sandbox_objects(name, request, self._settings, LIMITS, grace_seconds=5)
        for config_map in objects.config_maps:
            await self._api.create(CONFIG_MAPS, config_map, NAMESPACE)
        job = _bare(objects.job, runtime)
        if remove:
            job["spec"]["ttlSecondsAfterFinished"] = 0
        key = job["metadata"]["name"]
        self._ended[key] = asyncio.get_running_loop().create_future()
        created = time.time()
        await self._api.create(JOBS, job, NAMESPACE)
        if not await asyncio.wait_for(self._ended[key], _END_SECONDS):
            raise RuntimeError(f"the bare Job {key} failed: {await self._log(key)!r}")
        return key, created

    async def _log(self, job: str) -> bytes:
        ((pod,), _) = await self._api.list(PODS, NAMESPACE, labels=f"job-name={job}")
        async with self._api.log(pod["metadata"]["name"], NAMESPACE, CONTAINER, follow=False) as pieces:
            return b"".join([piece async for piece in pieces])

    async def output(self, job: str) -> str:
        """Return what the code of a Job that has ended wrote to its standard output."""
        frames: list[Frame] = []

        async def whole() -> bool:
            # A Job may be complete before its node has written the last of its log.
            frames[:] = LineDecoder().feed(await self._log(job))
            return bool(frames) and frames[-1].kind is Kind.REPORT

        await wait_until_async(whole, timeout=10, describe=f"the log of {job} to be whole")
        said, complained = (
            b"".join(frame.payload for frame in frames if frame.kind is kind).decode()
            for kind in (Kind.STDOUT, Kind.STDERR)
        )
        if not said:
            raise RuntimeError(f"the code of {job} wrote nothing: {complained or frames[-1].payload.decode()}")
        return said


def _bare(job: Object, runtime: Runtime) -> Object:
    pod = job["spec"]["template"]
    # Nobody would take it off again.
    del pod["metadata"]["finalizers"]
    # The platform's classes are for the evaluations' namespace alone.
    del pod["spec"]["priorityClassName"]
    if runtime.runtime_class is None:
        del pod["spec"]["runtimeClassName"]
        container = pod["spec"]["containers"][0]
        # What the runner does for itself under gVisor needs system calls that the runtime's filter refuses under runc, and its limit on
        # processes counts there all of the same user on the node, the platform's own too.
        container["args"] = [
            word for word in container["args"] if not word.startswith(("pid_namespace=", "processes="))
        ]
    return job


# --- the platform beside bare Jobs -------------------------------------------------------------------------------------------


async def bare_rate(jobs: BareJobs, count: int) -> float:
    """Return bare Jobs per second, `AT_ONCE` under way all the time.

    They are removed as the platform's are: what stays on a node makes all that comes after it slower, the platform's Jobs as well.
    """
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with room:
            await jobs.run(HELLO, remove=True)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - began)


async def platform_rate(client: Client, count: int) -> float:
    """Return evaluations per second, from the submission of the first to the end of the last."""
    began = time.perf_counter()
    body = {"evaluations": [{"code": HELLO} for _ in range(count)]}
    response = await client.http.post("/v1/evaluations/batch", json=body)
    response.raise_for_status()
    ids = [item["evaluation"]["id"] for item in response.json()["items"]]
    results = await wait_for(client, ids, patience=FixedPatience(_END_SECONDS))
    if any(result.status != "completed" for result in results):
        raise RuntimeError(f"evaluations failed: {[result.status for result in results]}")
    return count / (time.perf_counter() - began)


async def platform_start(client: Client) -> float:
    """Return the seconds from a submission to the first instruction of its code."""
    began = time.time()
    ended = await client.run(program("start"))
    return float(await client.output(ended["id"])) - began


async def bare_start(jobs: BareJobs, runtime: Runtime = GVISOR) -> float:
    """Return the seconds from the creation of a Job to the first instruction of its code."""
    name, created = await jobs.run(program("start"), runtime)
    return float(await jobs.output(name)) - created


def program(name: str) -> str:
    """Return what a sandbox is to run."""
    return (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")


async def compare_platform(jobs: BareJobs, client: Client, count: int, starts: int) -> list[Figure]:
    """Measure rate and time to start, taking turns so that both see the same machine."""
    await client.run(HELLO)
    await jobs.run(HELLO, remove=True)
    rates = [(await bare_rate(jobs, count), await platform_rate(client, count)) for _ in range(_RATES)]
    bare, platform = (statistics.median(values) for values in zip(*rates, strict=True))
    pairs = [(await bare_start(jobs), await platform_start(client)) for _ in range(starts)]
    bare_s, platform_s = (statistics.median(values) for values in zip(*pairs, strict=True))
    return [
        Figure(
            f"evaluations per second, {AT_ONCE} at once, {count} in all, median of {_RATES}", f"{platform:.2f}/s", f"bare Jobs {bare:.2f}/s",
            f"{platform / bare:.2f}x", ">= 0.9x",
        ),
        Figure(
            f"submission to first instruction, one at a time, median of {starts}", f"{platform_s:.2f} s", f"bare Job {bare_s:.2f} s",
            f"{platform_s / bare_s:.2f}x", "<= 1.2x",
        ),
    ]  # fmt: skip


# --- reading while very many wait --------------------------------------------------------------------------------------------


async def read_p95(client: Client, name: str) -> float:
    """Return the 95th percentile of the seconds that reading one evaluation takes."""
    seconds = []
    for _ in range(_READS):
        began = time.perf_counter()
        await client.get(name)
        seconds.append(time.perf_counter() - began)
    return percentile(seconds, 0.95)


async def compare_backlog(platform: DeployedPlatform, client: Client, waiting: int) -> list[Figure]:
    """Measure how long it takes to read an evaluation beside an empty queue, and beside a very long one."""
    name = (await client.run(HELLO))["id"]
    # What waits must go on waiting. This is the last figure that is taken.
    platform.kubectl("scale", WORKER, "--replicas=0")
    await read_p95(client, name)
    empty = await read_p95(client, name)
    for _ in range(0, waiting, _BATCH):
        response = await client.http.post("/v1/evaluations/batch", json={"evaluations": [{"code": HELLO}] * _BATCH})
        response.raise_for_status()

    async def settled() -> bool:
        return bool((await client.http.get("/v1/broker")).json()["untold"] == 0)

    # What is asked is what a queue costs, not what taking it in does.
    await wait_until_async(settled, timeout=300, poll=1, describe="the broker to know of all that wait")
    await read_p95(client, name)
    full = await read_p95(client, name)
    return [
        Figure(
            f"reading an evaluation while {waiting:,} wait, p95", f"{full * 1000:.1f} ms", f"none wait {empty * 1000:.1f} ms",
            f"{full / empty:.2f}x", "unmoved",
        )
    ]  # fmt: skip


# --- gVisor beside runc ------------------------------------------------------------------------------------------------------

_SCENARIOS = {
    "cpu": "3 million additions and multiplications",
    "syscalls": "50,000 system calls",
    "files": "200 files of 64 KiB written, read and removed in /tmp",
    "memory": "128 MiB touched for the first time",
    "processes": "50 processes forked and awaited",
}


async def compare_runtimes(jobs: BareJobs, repeats: int) -> list[Figure]:
    """Measure each scenario inside the sandbox, under both runtimes in turn."""
    starts = [(await bare_start(jobs, RUNC), await bare_start(jobs)) for _ in range(repeats)]
    figures = [_beside("start of a Pod, to the first instruction", *map(statistics.median, zip(*starts, strict=True)))]
    for name, what in _SCENARIOS.items():
        pairs = []
        for _ in range(repeats):
            runc, _ = await jobs.run(program(name), RUNC, cpu_limit="1")
            gvisor, _ = await jobs.run(program(name), GVISOR, cpu_limit="1")
            pairs.append((float(await jobs.output(runc)), float(await jobs.output(gvisor))))
        figures.append(_beside(what, *map(statistics.median, zip(*pairs, strict=True))))
    return figures


def _beside(what: str, runc: float, gvisor: float) -> Figure:
    return Figure(f"gVisor: {what}", f"{gvisor:.3f} s", f"runc {runc:.3f} s", f"{gvisor / runc:.2f}x")


# --- the run -----------------------------------------------------------------------------------------------------------------


@contextmanager
def deployed() -> Iterator[DeployedPlatform]:
    """Give a platform on a cluster of its own, for as long as the block lasts."""
    cluster = open_cluster(f"bench-{os.getpid()}")
    try:
        cluster.up(say)
        images = build()
        found = deploy(find_target(cluster=cluster), built=images, say=say)
        platform = DeployedPlatform(cluster, found.url, found.api_key, images)
        with platform.slots(AT_ONCE):
            yield platform
    finally:
        cluster.down()


def say(what: str) -> None:
    """Tell people how far it is."""
    print(f"bench: {what}", file=sys.stderr)


async def measure(platform: DeployedPlatform, arguments: argparse.Namespace) -> list[Figure]:
    """Take every figure."""
    async with (
        KubernetesApi(from_kubeconfig(platform.cluster.kubeconfig)) as api,
        BareJobs(api, built_image("runner").reference) as jobs,
        connect(platform.url, platform.api_key) as client,
    ):
        figures: list[Figure] = []
        for what, take in (
            (
                "the platform beside bare Jobs",
                partial(compare_platform, jobs, client, arguments.evaluations, arguments.repeats),
            ),
            ("gVisor beside runc", partial(compare_runtimes, jobs, arguments.repeats)),
            ("reading while very many wait", partial(compare_backlog, platform, client, arguments.waiting)),
        ):
            say(what)
            new = await take()
            figures += new
            # It takes a quarter of an hour: what is known is told, whatever becomes of the rest.
            for each in new:
                say(f"{each.name}: {each.value}, {each.reference}, {each.ratio}")
        return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=48, help="how many for the rate (at most 100)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each single figure is taken")
    parser.add_argument("--waiting", type=int, default=15_000, help="how many wait while one is read")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    with deployed() as platform:
        figures = asyncio.run(measure(platform, arguments))
    show(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
