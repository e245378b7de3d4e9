"""The dispatcher on a real cluster: each sandbox made once and whole whatever dies in between, within what is there, and ended when told.

The dispatchers are in this process and are asked over their HTTP interface, as workers ask them. The test itself stands where the
monitor stands: it marks Jobs as collected, with the monitor's own means.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from crucible import __version__, names
from crucible import contracts as c
from crucible.clients import DispatcherClient, http_client
from crucible.dispatcher.app import make_dispatcher_app
from crucible.dispatcher.kubernetes.capacity import is_starting
from crucible.dispatcher.kubernetes.dispatcher import KubernetesDispatcher
from crucible.dispatcher.kubernetes.manifest import demand_of, sandbox_objects
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.evaluation import EvaluationRequest, Reason, Resources, make_evaluation_id, resolve
from crucible.frames import Frame, Kind, LineDecoder
from crucible.health import Health
from crucible.kubernetes.api import CONFIG_MAPS, JOBS, NODES, PODS, RESOURCE_QUOTAS, ApiError, KubernetesApi
from crucible.kubernetes.reflector import Reflector
from crucible.limits import Limits
from crucible.outcome import RunnerReport
from crucible.quantity import GIB, MIB
from crucible.resilience import CallFailedError
from crucible.settings import DispatcherSettings, KubernetesSettings
from crucible.watching.release import let_pods_go, mark_collected
from tests.support.images import built_image
from tests.support.waits import wait_until_async
from tests.support.watched import prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

Object = dict[str, Any]
TOKEN = "internal-token"
NAMESPACE = names.EVALUATION_NAMESPACE
IDLE = "import time\nprint('up', flush=True)\ntime.sleep(600)"


class KilledError(BaseException):
    """The process died here."""


class MortalApi(KubernetesApi):
    """Dies at its n-th change of the cluster, before or after it took effect. No Job that it makes is begun."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes_left = -1
        self.after = False

    async def _change(self, change: Any) -> Any:
        self.changes_left -= 1
        dies = self.changes_left == -1
        if dies and not self.after:
            change.close()
            raise KilledError
        result = await change
        if dies:
            raise KilledError
        return result

    async def create(self, resource: Any, body: Object, *args: Any, **kwargs: Any) -> Any:
        if resource is JOBS:
            body = {**body, "spec": {**body["spec"], "suspend": True}}
        return await self._change(super().create(resource, body, *args, **kwargs))

    async def patch(self, *args: Any, **kwargs: Any) -> Any:
        return await self._change(super().patch(*args, **kwargs))


@dataclass
class Bench:
    """A cluster, two replicas of the dispatcher, and what a test asks of them."""

    cluster: Cluster
    settings: KubernetesSettings
    api: KubernetesApi
    dispatchers: list[KubernetesDispatcher] = field(default_factory=list)
    clients: list[DispatcherClient] = field(default_factory=list)

    def request(
        self, code: str = IDLE, *, attempt: int = 1, limits: Limits | None = None, **fields: Any
    ) -> c.SandboxRequest:
        spec = resolve(
            EvaluationRequest.model_validate({"code": code, "profile": "small", **fields}), limits or Limits()
        )
        return c.SandboxRequest(attempt=attempt, worker="w", owner="ada", spec=spec)

    async def objects(self, evaluation_id: str) -> tuple[list[Object], list[Object], list[Object]]:
        """Return the Jobs, Pods and ConfigMaps of an evaluation as the cluster has them."""
        selector = f"{names.LABEL_EVALUATION}={evaluation_id}"
        jobs, pods, maps = [
            (await self.api.list(kind, NAMESPACE, labels=selector))[0] for kind in (JOBS, PODS, CONFIG_MAPS)
        ]
        return jobs, pods, maps

    async def pod(self, evaluation_id: str) -> Object:
        """Return the one Pod of an evaluation, once it is there."""

        async def there() -> Object | None:
            _, pods, _ = await self.objects(evaluation_id)
            return pods[0] if pods else None

        return await wait_until_async(there, timeout=20, describe="the Job controller to make the Pod")

    async def running(self, evaluation_id: str, attempt: int = 1) -> None:
        """Wait until its container runs."""

        async def runs() -> bool:
            status = await self.clients[0].wait(evaluation_id, attempt=attempt, wait_seconds=0)
            return status.phase is c.SandboxPhase.RUNNING

        await wait_until_async(runs, timeout=60, describe="the sandbox to run", poll=0.1)

    async def ended(self, evaluation_id: str, seconds: float = 60) -> Object:
        """Return the Pod of an evaluation once its container has ended."""

        async def over() -> Object | None:
            pod = await self.pod(evaluation_id)
            statuses = pod["status"].get("containerStatuses") or []
            return pod if statuses and "terminated" in statuses[0]["state"] else None

        return await wait_until_async(over, timeout=seconds, describe="the container to end", poll=0.1)

    async def collect(self, evaluation_id: str, *, delete: bool = True) -> None:
        """Do as the monitor does once all is recorded, and as the cleanup does then."""
        jobs, pods, _ = await self.objects(evaluation_id)
        for job in jobs:
            await mark_collected(self.api, NAMESPACE, job["metadata"]["name"])
        for job in jobs:
            await let_pods_go(self.api, NAMESPACE, job["metadata"]["name"], pods)
            if delete:
                await self.api.delete(JOBS, job["metadata"]["name"], NAMESPACE, propagation="Background")

    async def frames(self, pod: str) -> list[Frame]:
        """Read what the runner wrote to the container's log."""
        decoder, found = LineDecoder(), list[Frame]()
        async with self.api.log(pod, NAMESPACE, names.CONTAINER, follow=False) as log:
            async for piece in log:
                found += decoder.feed(piece)
        assert decoder.strays == ""
        return found

    async def run(self, code: str, **fields: Any) -> tuple[RunnerReport, list[Frame]]:
        """Have code run to its end; returns the runner's report and all frames."""
        evaluation_id = new_id()
        await self.clients[0].create(evaluation_id, self.request(code, **fields))
        pod = await self.ended(evaluation_id)
        found = await self.frames(pod["metadata"]["name"])
        await self.collect(evaluation_id)
        assert [frame.kind for frame in (found[0], found[-1])] == [Kind.STARTED, Kind.REPORT], pod["status"]
        return RunnerReport.model_validate_json(found[-1].payload), found


def new_id() -> str:
    return make_evaluation_id(time.time_ns() // 1_000_000, os.urandom(10))


def stream(frames: list[Frame], kind: Kind) -> str:
    return b"".join(frame.payload for frame in frames if frame.kind is kind).decode()


@asynccontextmanager
async def serving(
    api: KubernetesApi, settings: KubernetesSettings, limits: Limits | None = None
) -> AsyncIterator[tuple[KubernetesDispatcher, DispatcherClient]]:
    """Start a replica, and return it with a client of its HTTP interface."""
    dispatcher = KubernetesDispatcher(DispatcherSettings(), settings, limits or Limits(), api)
    await dispatcher.start()
    try:
        app = make_dispatcher_app(dispatcher, TOKEN, Health("dispatcher", __version__))
        async with http_client(app, TOKEN) as http:
            yield dispatcher, DispatcherClient(http)
    finally:
        await dispatcher.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(cluster: Cluster) -> AsyncIterator[Bench]:
    image = built_image("runner")
    prepare(cluster, image.reference, image.archive)
    settings = KubernetesSettings(
        kubeconfig=cluster.kubeconfig, images={"python": image.reference}, cpu_request_percent=10
    )
    async with AsyncExitStack() as stack:
        bench = Bench(cluster, settings, await stack.enter_async_context(KubernetesApi.from_settings(settings)))
        for _ in range(2):
            api = await stack.enter_async_context(KubernetesApi.from_settings(settings))
            # A paused API server is to be noticed within the test's patience.
            api._http.timeout = httpx.Timeout(2.0)
            dispatcher, client = await stack.enter_async_context(serving(api, settings))
            bench.dispatchers.append(dispatcher)
            bench.clients.append(client)
        yield bench


# -- made once


async def test_two_replicas_asked_at_once_make_one_sandbox_and_both_know_when_it_is_recorded(bench: Bench) -> None:
    evaluation_id, request = new_id(), bench.request("print('hi')", stdin="given")
    first, second = bench.clients
    statuses = await asyncio.gather(*(client.create(evaluation_id, request) for client in (first, second, first)))
    assert {(status.attempt, status.runtime, status.durable) for status in statuses} == {(1, "kubernetes", True)}
    waiting = asyncio.create_task(second.wait(evaluation_id, attempt=1, wait_seconds=60))
    pod = await bench.ended(evaluation_id)
    assert stream(await bench.frames(pod["metadata"]["name"]), Kind.STDOUT) == "hi\n"

    jobs, pods, maps = await bench.objects(evaluation_id)
    assert (len(jobs), len(pods), len(maps)) == (1, 1, 2)
    assert not waiting.done(), "it is over only when it is recorded"
    await bench.collect(evaluation_id)
    assert (await waiting).phase is c.SandboxPhase.FINISHED
    # Also when the Job has gone: a create whose answer was lost does not begin anew.
    for client in (first, second):
        assert (await client.create(evaluation_id, request)).phase is c.SandboxPhase.FINISHED
        assert (await client.wait(evaluation_id, attempt=1, wait_seconds=0)).phase is c.SandboxPhase.FINISHED

    async def gone() -> bool:
        return await bench.objects(evaluation_id) == ([], [], [])

    await wait_until_async(gone, timeout=20, describe="the code to go with its Job")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_dispatcher_killed_between_any_two_calls_leaves_what_another_completes(
    bench: Bench, after: bool
) -> None:
    request = bench.request("pass", stdin="given")
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(MortalApi.from_settings(bench.settings))
        dispatcher, _ = await stack.enter_async_context(serving(api, bench.settings))
        for changes in range(5):  # two ConfigMaps, the Job, two owners
            evaluation_id = new_id()
            api.changes_left, api.after = changes, after
            with pytest.raises(KilledError):
                await dispatcher.create(evaluation_id, request)
            api.changes_left = -1
            await dispatcher.create(evaluation_id, request)
            await assert_whole(bench, evaluation_id, request)
            await bench.collect(evaluation_id)


async def assert_whole(bench: Bench, evaluation_id: str, request: c.SandboxRequest) -> None:
    (job,), _, maps = await bench.objects(evaluation_id)
    wanted = sandbox_objects(evaluation_id, request, bench.settings, Limits(), grace_seconds=5)
    found = {each["metadata"]["name"]: each for each in maps}
    for each in wanted.config_maps:
        made = found.pop(each["metadata"]["name"])
        assert made["binaryData"] == each["binaryData"]
        assert made["immutable"] is True
        (owner,) = made["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", job["metadata"]["name"], job["metadata"]["uid"])
    assert not found


async def test_a_config_map_of_that_name_with_another_content_is_not_run(bench: Bench) -> None:
    evaluation_id, request = new_id(), bench.request("print('mine')")
    (planted,) = sandbox_objects(evaluation_id, request, bench.settings, Limits(), grace_seconds=5).config_maps
    planted["binaryData"] = {"main.py": base64.b64encode(b"print('theirs')").decode()}
    await bench.api.create(CONFIG_MAPS, planted, NAMESPACE)
    with pytest.raises(CallFailedError, match="another content") as refused:
        await bench.clients[0].create(evaluation_id, request)
    assert refused.value.slug == "sandbox-refused"
    assert (await bench.objects(evaluation_id))[0] == []
    await bench.api.delete(CONFIG_MAPS, planted["metadata"]["name"], NAMESPACE)


async def test_a_later_attempt_ends_the_earlier_and_an_earlier_is_stale(bench: Bench) -> None:
    evaluation_id = new_id()
    first, second = bench.clients
    await first.create(evaluation_id, bench.request(attempt=1))
    await bench.running(evaluation_id)
    await second.create(evaluation_id, bench.request("pass", attempt=2))
    job = await bench.api.get(JOBS, names.sandbox_name(evaluation_id, 1), NAMESPACE)
    assert job["metadata"]["annotations"][names.ANNOTATION_STOP] == Reason.NODE_LOST
    with pytest.raises(CallFailedError) as stale:
        await second.create(evaluation_id, bench.request(attempt=1))
    assert stale.value.slug == "stale-attempt"
    # A worker that has lost its attempt ends that one and no later one.
    await first.stop(evaluation_id, Reason.NODE_LOST, attempt=1)
    job = await bench.api.get(JOBS, names.sandbox_name(evaluation_id, 2), NAMESPACE)
    assert names.ANNOTATION_STOP not in job["metadata"]["annotations"]
    await bench.collect(evaluation_id)


# -- as admitted


async def test_the_pod_as_the_api_server_admits_it_has_every_hardening(bench: Bench) -> None:
    evaluation_id, request = new_id(), bench.request()
    await bench.clients[0].create(evaluation_id, request)
    pod = await bench.pod(evaluation_id)
    job = sandbox_objects(evaluation_id, request, bench.settings, Limits(), grace_seconds=5).job
    wanted = job["spec"]["template"]["spec"]
    spec = pod["spec"]
    for name, value in wanted.items():
        # The API server drops what is false by default, and adds the RuntimeClass' own node and the defaults of a field.
        if value is not False and name not in ("nodeSelector", "tolerations", "containers", "volumes"):
            assert spec[name] == value, name
    for name in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "automountServiceAccountToken"):
        assert not spec.get(name), name
    assert spec["nodeSelector"] == {names.LABEL_SANDBOX_NODE: "true", names.LABEL_GVISOR: names.GVISOR_READY}
    assert spec["overhead"] == {"cpu": "50m", "memory": "96Mi"}
    assert spec["preemptionPolicy"] == "Never"
    assert spec["priority"] < 0
    assert pod["metadata"]["finalizers"].count(names.FINALIZER_OUTPUT) == 1
    (container,), (made,) = wanted["containers"], spec["containers"]
    assert {name: made[name] for name in container if name != "volumeMounts"} | {"volumeMounts": 0} == {
        **{name: value for name, value in container.items() if name != "securityContext"},
        "securityContext": made["securityContext"],
        "volumeMounts": 0,
    }
    assert made["securityContext"].items() >= {"readOnlyRootFilesystem": True, "runAsNonRoot": True}.items()
    assert made["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {each["name"] for each in spec["volumes"]} == {each["name"] for each in wanted["volumes"]}, "no token"
    demand = demand_of(request.spec.resources, bench.settings, Limits())
    assert demand.memory_bytes == (256 + 96) * MIB
    await bench.clients[0].stop(evaluation_id, Reason.CANCELLED_BY_USER)
    await bench.collect(evaluation_id)


# -- room


@asynccontextmanager
async def quota(bench: Bench, **hard: str) -> AsyncIterator[None]:
    """Set the namespace's quota, and wait until both replicas have heard of it."""
    before = (await bench.api.get(RESOURCE_QUOTAS, "evaluations", NAMESPACE))["spec"]["hard"]
    try:
        await set_quota(bench, before | {name.replace("_", "."): value for name, value in hard.items()})
        yield
    finally:
        await set_quota(bench, before)


async def set_quota(bench: Bench, hard: dict[str, str]) -> None:
    await bench.api.patch(RESOURCE_QUOTAS, "evaluations", {"spec": {"hard": hard}}, NAMESPACE)

    def heard() -> bool:
        found = [each._quotas.objects.get((NAMESPACE, "evaluations"), {}) for each in bench.dispatchers]
        return all(each.get("status", {}).get("hard") == hard for each in found)

    await wait_until_async(heard, timeout=20, describe="the quota to be counted and seen")


async def test_a_quota_without_room_means_waiting_and_one_too_small_never(bench: Bench) -> None:
    evaluation_id, holder, request = new_id(), new_id(), bench.request("pass")
    async with quota(bench, requests_memory="300Mi"):
        with pytest.raises(CallFailedError, match=r"allows 300Mi requests\.memory in all") as refused:
            await bench.clients[0].create(evaluation_id, request)
        assert refused.value.slug == "never-fits"
    await bench.clients[0].create(holder, bench.request())
    async with quota(bench, **{"count/jobs.batch": "1"}):
        with pytest.raises(CallFailedError, match="used up") as full:
            await bench.clients[1].create(evaluation_id, request)
        assert full.value.slug == "no-capacity"
        # The API server itself has the last word, where a replica did not know.
        objects = sandbox_objects(evaluation_id, request, bench.settings, Limits(), grace_seconds=5)
        with pytest.raises(ApiError, match="exceeded quota") as exceeded:
            await bench.api.create(JOBS, objects.job, NAMESPACE)
        assert exceeded.value.quota_exceeded
    await bench.clients[0].stop(holder, Reason.CANCELLED_BY_USER)
    assert (await bench.clients[1].create(evaluation_id, request)).phase is not c.SandboxPhase.FINISHED
    for each in (evaluation_id, holder):
        await bench.collect(each)


async def test_what_no_node_could_hold_never_fits(bench: Bench) -> None:
    limits = Limits(memory_max_bytes=1024 * GIB)
    answer = await bench.clients[0].check(c.CapacityCheck(resources=Resources(cpu_millis=100, memory_bytes=900 * GIB)))
    assert answer.fit is c.Fit.NEVER
    with pytest.raises(CallFailedError) as refused:
        await bench.clients[0].create(new_id(), bench.request("pass", limits=limits, memory_limit="900Gi"))
    assert refused.value.slug == "never-fits"


async def test_capacity_follows_the_nodes(bench: Bench) -> None:
    nodes, _ = await bench.api.list(NODES, labels=f"{names.LABEL_SANDBOX_NODE}=true")
    expected = {node["metadata"]["name"] for node in nodes}

    async def free() -> dict[str, bool]:
        report = await bench.clients[0].capacity()
        return {node.name: node.free_memory_bytes > 0 for node in report.nodes}

    async def all_free() -> bool:
        return await free() == dict.fromkeys(expected, True)

    await wait_until_async(all_free, timeout=20, describe="every sandbox node to be reported")
    try:
        for name in expected:
            await bench.api.patch(NODES, name, {"spec": {"unschedulable": True}})

        async def none_free() -> bool:
            return not any((await free()).values())

        await wait_until_async(none_free, timeout=20, describe="the cordons to be seen")
        with pytest.raises(CallFailedError, match="cordoned") as full:
            await bench.clients[0].create(new_id(), bench.request("pass"))
        assert full.value.slug == "no-capacity"
    finally:
        for name in expected:
            await bench.api.patch(NODES, name, {"spec": {"unschedulable": None}})
    await wait_until_async(all_free, timeout=20, describe="the nodes to be free again")


async def test_only_so_many_start_at_a_time_and_all_are_made(bench: Bench) -> None:
    settings = bench.settings.model_copy(update={"starting_per_node": 1})
    ids = [new_id() for _ in range(5)]
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(KubernetesApi.from_settings(settings))
        _, client = await stack.enter_async_context(serving(api, settings))
        open_nodes = len((await client.capacity()).nodes)
        most: list[int] = []
        watching = Reflector(api, PODS, NAMESPACE)
        watching.subscribe(lambda _: most.append(sum(is_starting(pod) for pod in watching.objects.values())))
        watching.start()
        stack.push_async_callback(watching.aclose)
        await watching.synced.wait()

        async def made(evaluation_id: str) -> None:
            """Ask as a worker does: again, for as long as there is no room."""
            while True:
                try:
                    await client.create(evaluation_id, bench.request())
                except CallFailedError as error:
                    if error.slug != "no-capacity" or "are starting, as many as" not in str(error):
                        raise
                else:
                    return

        async with asyncio.timeout(100):
            await asyncio.gather(*map(made, ids))
            for each in ids:
                await bench.running(each)
        assert max(most) == open_nodes

    async def end(evaluation_id: str) -> None:
        await bench.clients[0].stop(evaluation_id, Reason.CANCELLED_BY_USER)
        await bench.collect(evaluation_id)

    await asyncio.gather(*map(end, ids))


# -- a cluster that does not answer, or not as it should


async def test_while_the_api_server_is_paused_it_is_the_cluster_that_is_away(bench: Bench) -> None:
    evaluation_id, request = new_id(), bench.request("pass")
    bench.cluster.pause_api_server()
    try:
        with pytest.raises(CallFailedError) as away:
            await bench.clients[0].create(evaluation_id, request)
        assert away.value.slug == "cluster-unavailable"
        assert away.value.status == 424, "the dispatcher itself is there"
    finally:
        bench.cluster.resume_api_server()

    async def made() -> bool:
        try:
            await bench.clients[0].create(evaluation_id, request)
        except CallFailedError as error:
            if error.slug != "cluster-unavailable":
                raise
            return False
        return True

    await wait_until_async(made, timeout=30, describe="the create to succeed")
    await assert_whole(bench, evaluation_id, request)
    await bench.collect(evaluation_id)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"runtime_class": "nothing"}, "no RuntimeClass nothing"),
        ({"images": {"python": f"crucible.local/unlisted@sha256:{'b' * 64}"}}, "not on the list of images"),
        ({"namespace": "nowhere"}, "would not take a sandbox"),
    ],
)
async def test_a_cluster_that_would_refuse_its_sandboxes_is_told_at_the_start(
    bench: Bench, settings: Object, word: str
) -> None:
    async with KubernetesApi.from_settings(bench.settings) as api:
        with pytest.raises(RuntimeUnavailableError, match=word):
            async with serving(api, bench.settings.model_copy(update=settings)):
                pytest.fail("it started")


# -- ended when told


async def test_a_stop_ends_the_pod_and_says_why_on_the_job(bench: Bench) -> None:
    evaluation_id = new_id()
    first, second = bench.clients
    await first.create(evaluation_id, bench.request())
    await bench.running(evaluation_id)
    stopping = asyncio.create_task(second.stop(evaluation_id, Reason.CANCELLED_BY_USER))
    began = time.monotonic()
    await bench.ended(evaluation_id, seconds=15)
    assert time.monotonic() - began < 15
    (job,), _, _ = await bench.objects(evaluation_id)
    assert job["metadata"]["annotations"][names.ANNOTATION_STOP] == Reason.CANCELLED_BY_USER
    await bench.collect(evaluation_id)
    status = await stopping
    assert status is None or status.phase in (c.SandboxPhase.FINISHED, c.SandboxPhase.RUNNING)
    assert await first.stop(new_id(), Reason.CANCELLED_BY_USER) is None


async def test_a_stop_before_there_is_a_pod_means_that_there_will_be_none(bench: Bench) -> None:
    evaluation_id = new_id()
    await bench.clients[0].create(evaluation_id, bench.request())
    await bench.dispatchers[0]._end(evaluation_id, 1, Reason.CANCELLED_BY_USER)

    async def none_runs() -> bool:
        (job,), pods, _ = await bench.objects(evaluation_id)
        suspended = any(each["type"] == "Suspended" for each in job["status"].get("conditions") or [])
        return (suspended or bool(pods)) and all("deletionTimestamp" in pod["metadata"] for pod in pods)

    await wait_until_async(none_runs, timeout=20, describe="the Job to be without a Pod")
    await bench.collect(evaluation_id)


# -- the runner under gVisor


async def test_the_runner_cannot_be_reached_by_what_it_runs(bench: Bench) -> None:
    report, frames = await bench.run(ATTACKS)
    told = dict(line.split(": ", 1) for line in stream(frames, Kind.STDOUT).splitlines())
    assert told.pop("pid") == "1"
    assert told.pop("visible") == "['1']"
    assert {name: said for name, said in told.items() if said != "refused"} == {}, stream(frames, Kind.STDERR)
    assert (report.status, report.exit_code) == ("exited", 5)


# Under gVisor a PID 1 is killed by any signal, and prlimit(2) asks only for the same user; so it must not be there at all.
ATTACKS = """
import ctypes, os, resource, signal, sys, time

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def attempt(name, do):
    try:
        do()
    except (OSError, ValueError):
        print(f"{name}: refused")
    else:
        print(f"{name}: WORKED")


print("pid:", os.getpid())
print("visible:", [name for name in os.listdir("/proc") if name.isdigit()])
for pid in range(2, 8):
    attempt(f"kill {pid}", lambda: os.kill(pid, signal.SIGKILL))
    attempt(f"limit {pid}", lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)))
attempt("kill all", lambda: os.kill(-1, signal.SIGKILL))
attempt("limit parent", lambda: resource.prlimit(os.getppid() or 2, resource.RLIMIT_CPU, (0, 0)))
attempt("new user namespace", lambda: call(272, 0x10000000))
attempt("mount", lambda: call(165, b"proc", b"/proc", b"proc", 0, None))
attempt("unmount", lambda: call(166, b"/proc", 2))
attempt("trace", lambda: call(101, 16, 1, 0, 0))
attempt("join a namespace", lambda: call(308, os.open("/proc/1/ns/pid", os.O_RDONLY), 0))
attempt("become root", lambda: os.setuid(0))
# Output that looks like a frame, and a report of one's own: neither is believed.
os.write(2, b"BAAAAAAAAAAAAAAAJ3sic3RhdHVzIjoiZXhpdGVkIn0=\\n")
with open("/dev/termination-log", "w") as forged:
    forged.write('{"status":"exited","exit_code":0}')
sys.stdout.flush()
os._exit(5)
"""


async def test_what_the_code_may_write_is_bounded(bench: Bench) -> None:
    report, frames = await bench.run(
        "import os\n"
        "def fill(path, mode='wb'):\n"
        "    written = 0\n"
        "    try:\n"
        "        with open(path, mode, buffering=0) as file:\n"
        "            while written < 500 << 20: written += file.write(bytes(1 << 20))\n"
        "    except OSError as error: print(path, written >> 20, error.errno)\n"
        "    finally:\n"
        "        if path in ('/tmp/x', '/dev/shm/x'): os.unlink(path)\n"
        "for path in ('/tmp/x', '/dev/shm/x', '/x', '/dev/termination-log', '/code/main.py'): fill(path)\n",
        memory_limit="512Mi",
    )
    told = {
        line.split()[0]: [int(each) for each in line.split()[1:]] for line in stream(frames, Kind.STDOUT).splitlines()
    }
    assert report.exit_code == 0
    for path in ("/tmp/x", "/dev/shm/x", "/dev/termination-log"):
        assert told[path][0] <= 64, path
    assert (told["/x"][0], told["/code/main.py"][0]) == (0, 0)
