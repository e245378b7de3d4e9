"""The monitor on a real cluster: every way in which a sandbox ends, told once and truly, whatever happens to those who watch.

Storage and the monitors are real processes of this machine, and the test is the dispatcher; see tests/support/watched.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from crucible import names
from crucible.evaluation import Reason, State
from crucible.kubernetes.api import JOBS, NODES, PODS
from tests.cluster import Node
from tests.deployment.images import build
from tests.support.folders import scratch_dir
from tests.support.waits import pass_time, wait_until_async
from tests.support.watched import WatchedCluster, describe, prepare, watched_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from crucible import contracts as c
    from tests.cluster import Cluster

# The first test has the making of the images, where they are not there yet, and every end of the table in it.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

Object = dict[str, Any]
# From a fact to its record. Half of it is the kubelet's, which looks at its containers once a second.
SECONDS = 15
# Starting sandboxes takes processors, of which a small machine has two.
AT_ONCE = 8
MIB = 1024 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(cluster: Cluster) -> AsyncIterator[WatchedCluster]:
    (image,) = build(["runner"])
    prepare(cluster, image.reference, image.archive)
    for folder in scratch_dir():
        async with watched_cluster(cluster, folder, image.reference) as bench:
            bench.start_monitor()
            bench.start_monitor()
            yield bench


# -- every end


@dataclass
class Case:
    """A program, what is done to it, and what must be recorded."""

    code: str
    state: State
    reason: Reason
    exit_code: int | None = None
    signal: int | None = None
    exception: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    fields: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Object], None] = lambda _: None
    then: Callable[[WatchedCluster, str], Awaitable[None]] | None = None


@dataclass
class Ended:
    """What came of a case."""

    record: c.EvaluationRecord
    output: tuple[bytes, bytes]
    events: str
    terminal_events: int
    fact_at: datetime | None


def pod_of(job: Object) -> Object:
    spec: Object = job["spec"]["template"]["spec"]
    return spec


def with_deadline(seconds: int) -> Callable[[Object], None]:
    """Have a runner that does not end by itself: it knows no time limit, and its node does."""

    def change(job: Object) -> None:
        pod = pod_of(job)
        pod["activeDeadlineSeconds"] = seconds
        (container,) = pod["containers"]
        container["args"] = [
            "timeout_ms=3600000" if each.startswith("timeout_ms=") else each for each in container["args"]
        ]

    return change


def with_storage(size: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        resources = pod_of(job)["containers"][0]["resources"]
        for each in ("requests", "limits"):
            resources[each]["ephemeral-storage"] = size

    return change


def on_node(name: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        pod_of(job)["nodeSelector"]["kubernetes.io/hostname"] = name

    return change


def with_request(cpu: str) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        resources = pod_of(job)["containers"][0]["resources"]
        resources["requests"]["cpu"] = resources["limits"]["cpu"] = cpu

    return change


async def delete_by_hand(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    await bench.delete_pod(evaluation_id)


async def cancel(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    await bench.stop(evaluation_id, Reason.CANCELLED_BY_USER)


async def cancel_at_once(bench: WatchedCluster, evaluation_id: str) -> None:
    mark = {"metadata": {"annotations": {names.ANNOTATION_STOP: Reason.CANCELLED_BY_OPERATOR}}}
    await bench.call(bench.api.patch, JOBS, bench.name_of(evaluation_id), mark, names.EVALUATION_NAMESPACE)
    await bench.delete_pod(evaluation_id)


async def delete_everything(bench: WatchedCluster, evaluation_id: str) -> None:
    await bench.running(evaluation_id)
    await said(bench, evaluation_id, b"before")
    name = bench.name_of(evaluation_id)
    await bench.call(bench.api.delete, JOBS, name, names.EVALUATION_NAMESPACE, propagation="Background")


async def said(bench: WatchedCluster, evaluation_id: str, words: bytes) -> None:
    """Wait until storage has these words of it, while it runs."""

    async def heard() -> bool:
        return words in (await bench.client.output(evaluation_id, "stdout"))[0]

    await wait_until_async(heard, timeout=90, describe=f"{words!r} of {evaluation_id}", poll=0.1)


LINGER = "import time\nprint('before', flush=True)\ntime.sleep(600)\n"
HOG = "held = []\nprint('before', flush=True)\nwhile True: held.append(bytearray(b'x' * 1_000_000))\n"

CASES: dict[str, Case] = {
    "ends with 0": Case(
        "import sys\nprint('out')\nprint('err', file=sys.stderr)", State.COMPLETED, Reason.EXIT_ZERO, 0, stdout=b"out\n", stderr=b"err\n"
    ),
    "ends with 1": Case("import sys; sys.exit(1)", State.FAILED, Reason.EXIT_NONZERO, 1),
    "ends with 3": Case("print('x'); raise SystemExit(3)", State.FAILED, Reason.EXIT_NONZERO, 3, stdout=b"x\n"),
    "ends with 255": Case("import os; os._exit(255)", State.FAILED, Reason.EXIT_NONZERO, 255),
    "divides by zero": Case(
        "print('before')\n1/0", State.FAILED, Reason.EXCEPTION, 1, exception="ZeroDivisionError", stdout=b"before\n", stderr=b"ZeroDivisionError"
    ),
    "reads what is no memory": Case(
        "import ctypes\nprint('before', flush=True)\nctypes.string_at(0)", State.FAILED, Reason.SIGNAL, signal=signal.SIGSEGV, stdout=b"before\n"
    ),
    "aborts": Case("import os; os.abort()", State.FAILED, Reason.SIGNAL, signal=signal.SIGABRT),
    "uses too much memory": Case(HOG, State.FAILED, Reason.OOM_KILLED, stdout=b"before\n", fields={"memory_limit": "64Mi"}),
    "has a child that uses too much memory": Case(
        "import subprocess, sys\nprint('before', flush=True)\nsubprocess.run([sys.executable, '-c', 'x = bytearray(b\"x\" * 500_000_000)'])",
        State.FAILED,
        Reason.OOM_KILLED,
        stdout=b"before\n",
        fields={"memory_limit": "64Mi"},
    ),
    "runs for too long": Case(LINGER, State.TIMEOUT, Reason.WALL_CLOCK, stdout=b"before\n", fields={"timeout_seconds": 2}),
    "runs for too long and ignores every signal": Case(
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n" + LINGER,
        State.TIMEOUT,
        Reason.WALL_CLOCK,
        stdout=b"before\n",
        fields={"timeout_seconds": 2},
    ),
    "has a runner that does not end it": Case(
        LINGER, State.TIMEOUT, Reason.DEADLINE, stdout=b"before\n", change=with_deadline(12)
    ),
    "has an image that does not exist": Case("", State.FAILED, Reason.IMAGE_ERROR, fields={"image": "missing", "code": "1"}),
    "is cancelled, and ignores SIGTERM": Case(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LINGER,
        State.CANCELLED,
        Reason.CANCELLED_BY_USER,
        stdout=b"before\n",
        then=cancel,
    ),
    "is cancelled before it begins": Case(LINGER, State.CANCELLED, Reason.CANCELLED_BY_OPERATOR, then=cancel_at_once),
    "has its Pod deleted by hand": Case(
        LINGER, State.FAILED, Reason.SANDBOX_ERROR, stdout=b"before\n", then=delete_by_hand
    ),
    "has its Job deleted by hand": Case(
        LINGER, State.FAILED, Reason.SANDBOX_ERROR, stdout=b"before\n", then=delete_everything
    ),
    "fills its node's disk": Case(
        "import time\nprint('before', flush=True)\nfor n in range(30):\n  print('x' * 1_000_000, flush=True)\ntime.sleep(600)",
        State.FAILED,
        Reason.EVICTED,
        stdout=b"before\n",
        change=with_storage("8Mi"),
    ),
    "fits no node": Case("print(1)", State.TIMEOUT, Reason.SCHEDULING, change=with_request("4")),
}  # fmt: skip


async def go_through(bench: WatchedCluster, case: Case) -> Ended:
    code = case.code or "print(1)"
    fields = {"timeout_seconds": 120, "cpu_limit": "1", **case.fields}
    fields.pop("code", None)
    evaluation_id = await bench.run(code, case.change, **fields)
    if case.then:
        await case.then(bench, evaluation_id)
    record = await bench.ended(evaluation_id, 100)
    fact_at = await container_ended_at(bench, evaluation_id)
    await bench.collected(evaluation_id)
    events = await bench.events(evaluation_id)
    terminal = [event for event in events if event.state.terminal and event.type != "collected"]
    assert events[-1].type == "collected", describe(events)
    return Ended(record, await bench.output(evaluation_id), describe(events), len(terminal), fact_at)


async def container_ended_at(bench: WatchedCluster, evaluation_id: str) -> datetime | None:
    """When its node saw its container end; None if no container ever ran."""
    pod = await bench.pod(evaluation_id)
    for status in (pod or {}).get("status", {}).get("containerStatuses", []):
        if when := (status.get("state", {}).get("terminated") or {}).get("finishedAt"):
            return datetime.fromisoformat(when)
    return None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ends(bench: WatchedCluster) -> dict[str, Ended | BaseException]:
    """All of them, several at once; what goes wrong with one is for its own test to tell."""
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(case: Case) -> Ended:
        async with places:
            return await go_through(bench, case)

    found = await asyncio.gather(*(in_turn(case) for case in CASES.values()), return_exceptions=True)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
async def test_each_end_is_recorded_once_and_truly(
    name: str, ends: dict[str, Ended | BaseException], bench: WatchedCluster
) -> None:
    case, end = CASES[name], ends[name]
    assert isinstance(end, Ended), f"{end}\n{bench.logs()}"
    record = end.record
    assert (record.state, record.reason) == (case.state, case.reason), end.events
    assert (record.exit_code, record.exception_type) == (case.exit_code, case.exception)
    # At the memory limit the kernel ends the sandbox or one process of it. The runner lives to tell of the second.
    told = {case.signal, signal.SIGKILL} if case.reason is Reason.OOM_KILLED else {case.signal}
    assert record.signal in told, end.events
    assert case.stdout in end.output[0]
    assert case.stderr in end.output[1]
    assert not case.stderr or case.stderr not in end.output[0]
    assert end.terminal_events == 1
    assert record.stdout.sha256 == hashlib.sha256(end.output[0]).hexdigest()
    assert record.stderr.sha256 == hashlib.sha256(end.output[1]).hexdigest()
    if end.fact_at:
        assert record.finished_at is not None
        assert (record.finished_at - end.fact_at).total_seconds() < SECONDS


# -- while it runs


def counting(lines: int, seconds: float) -> str:
    """A program that writes numbered lines, to both streams in turn, spread over some time."""
    return (
        f"import sys, time\nfor n in range({lines}):\n  print(f'line {{n}}', file=(sys.stdout, sys.stderr)[n % 2], flush=True)\n"
        f"  time.sleep({seconds / lines})\n"
    )


def counted(lines: int) -> tuple[bytes, bytes]:
    """What it writes."""
    out, err = ("".join(f"line {n}\n" for n in range(first, lines, 2)).encode() for first in (0, 1))
    return out, err


async def whole(bench: WatchedCluster, evaluation_id: str, lines: int) -> c.EvaluationRecord:
    """Wait for the end of a counting program; all that it wrote must be there, once and in order, and its end once."""
    record = await bench.ended(evaluation_id)
    events = await bench.events(evaluation_id)
    assert (record.state, record.exit_code) == (State.COMPLETED, 0), describe(events)
    assert await bench.output(evaluation_id) == counted(lines)
    # How exactly the two streams interleave is the runner's to tell; that nothing is out of its order is ours.
    moments = [frame.at_ms for frame in await bench.frames(evaluation_id)]
    assert moments == sorted(moments)
    assert [event.type for event in events] == [
        *("submitted", "queued", "provisioning", "running", "completed", "collected")
    ], describe(events)
    await bench.collected(evaluation_id)
    return record


async def test_output_is_there_while_the_code_runs(bench: WatchedCluster) -> None:
    evaluation_id = await bench.run(counting(40, 8), timeout_seconds=60)
    await said(bench, evaluation_id, b"line 0\n")
    assert await bench.state(evaluation_id) is State.RUNNING
    assert b"line 38\n" not in (await bench.output(evaluation_id))[0]
    await whole(bench, evaluation_id, 40)


LARGE = 100 * MIB


async def test_100_megabytes_arrive_whole_and_in_order(bench: WatchedCluster) -> None:
    """And the same code's few words on the other stream, apart from them."""
    line = "'%0127d\\n' % n"
    code = (
        "import sys\n"
        f"for block in range({LARGE // (1024 * 128)}):\n"
        f"  sys.stdout.write(''.join({line} for n in range(block * 1024, block * 1024 + 1024)))\n"
        "  if block % 100 == 0: print(block, file=sys.stderr)\n"
    )
    evaluation_id = await bench.run(code, timeout_seconds=120, cpu_limit="2")
    record = await bench.ended(evaluation_id, 120)
    assert record.reason is Reason.EXIT_ZERO, describe(await bench.events(evaluation_id))
    expected = hashlib.sha256()
    for block in range(LARGE // (1024 * 128)):
        expected.update("".join(f"{n:0127d}\n" for n in range(block * 1024, block * 1024 + 1024)).encode())
    assert (record.stdout.size, record.stdout.sha256) == (LARGE, expected.hexdigest())
    said_apart, _ = await bench.client.output(evaluation_id, "stderr")
    assert said_apart == "".join(f"{block}\n" for block in range(0, LARGE // (1024 * 128), 100)).encode()
    await bench.collected(evaluation_id)


# -- those who watch


async def test_when_the_leader_is_killed_another_leads_and_nothing_is_lost_or_doubled(bench: WatchedCluster) -> None:
    ids = [await bench.run(counting(120, 12), timeout_seconds=60, cpu_limit="500m") for _ in range(4)]
    await asyncio.gather(*(said(bench, each, b"line 10\n") for each in ids))
    await wait_until_async(lambda: bench.leader is not None, timeout=60, describe="one to lead", poll=0.2)
    leader = bench.leader
    assert leader is not None
    began = asyncio.get_running_loop().time()
    leader.kill()
    await wait_until_async(lambda: bench.leader is not None, timeout=SECONDS, describe="another to lead", poll=0.2)
    assert asyncio.get_running_loop().time() - began < SECONDS
    assert bench.leader is not leader
    await asyncio.gather(*(whole(bench, each, 120) for each in ids))
    leader.start()


async def test_what_ends_while_nobody_watches_is_recorded_afterwards(bench: WatchedCluster) -> None:
    ended, running, failed = [
        await bench.run(code, timeout_seconds=90, cpu_limit="300m")
        for code in (counting(10, 1), counting(120, 12), "print('before')\n1/0")
    ]
    await said(bench, running, b"line 0\n")
    bench.kill_monitors()
    vanished = await bench.run(LINGER)

    async def all_over() -> bool:
        pods = [await bench.pod(each) for each in (ended, failed)]
        return all(pod is not None and pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods)

    await wait_until_async(all_over, timeout=60, describe="the Pods to end", poll=0.5)
    # What the reconciliation alone can find: it is said to run, and the cluster has nothing of it.
    await bench.tell_running(vanished)
    await forget(bench, vanished)
    for monitor in bench.monitors:
        monitor.launch()
    for monitor in bench.monitors:
        monitor.await_ready()
    record = await whole(bench, ended, 10)
    assert record.started_at is not None
    pod = await bench.pod(ended)
    assert pod is not None
    told = pod["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"]
    assert abs((record.started_at - datetime.fromisoformat(told)).total_seconds()) < 5
    assert (await bench.ended(failed)).reason is Reason.EXCEPTION
    await whole(bench, running, 120)
    lost = await bench.ended(vanished)
    assert (lost.state, lost.reason, lost.exit_code) == (State.FAILED, Reason.NODE_LOST, None)
    await bench.collected(failed)


async def forget(bench: WatchedCluster, evaluation_id: str) -> None:
    """Take a sandbox from the cluster as nobody should: finalizers and all."""
    name = bench.name_of(evaluation_id)
    await bench.call(bench.api.delete, JOBS, name, names.EVALUATION_NAMESPACE, propagation="Background")

    async def gone() -> bool:
        pod = await bench.pod(evaluation_id)
        if pod is None:
            return await bench.job(evaluation_id) is None
        free: Object = {"metadata": {"finalizers": None}}
        await bench.call(bench.api.patch, PODS, pod["metadata"]["name"], free, names.EVALUATION_NAMESPACE)
        await bench.delete_pod(evaluation_id, grace_seconds=0)
        return False

    await wait_until_async(gone, timeout=20, describe="nothing to be left of it", poll=0.3)


async def test_the_job_of_a_void_attempt_is_given_back(bench: WatchedCluster) -> None:
    evaluation_id = await bench.run(LINGER)
    await bench.running(evaluation_id)
    # As when its worker falls silent: storage settles the attempt, and nobody tells the cluster.
    await bench.lose(evaluation_id)
    await bench.collected(evaluation_id, 30)
    assert (await bench.client.get(evaluation_id)).reason is Reason.EVICTED


async def test_the_dispatchers_watch_where_the_monitor_is_not_used_and_back(bench: WatchedCluster) -> None:
    """Turned off and on with evaluations running: for a moment both kinds watch, then one, then both, then the other."""
    ids = [await bench.run(counting(200, 20), timeout_seconds=90, cpu_limit="500m") for _ in range(4)]
    await asyncio.gather(*(said(bench, each, b"line 0\n") for each in ids))
    fallback = bench.make_monitor(
        "dispatcher", CRUCIBLE_DISPATCHER__RUNTIME="kubernetes", CRUCIBLE_DISPATCHER__USE_MONITORING_SERVICE="false"
    )
    monitors = [each for each in bench.monitors if each is not fallback]
    await asyncio.to_thread(fallback.start)
    for monitor in monitors:
        assert await asyncio.to_thread(monitor.stop) == 0
    late = await bench.run(counting(10, 1), cpu_limit="300m")
    await whole(bench, late, 10)
    await wait_until_async(
        lambda: bench.leader is fallback, timeout=SECONDS, describe="the dispatcher to lead", poll=0.2
    )
    before = fallback.metric("monitor_shipped_bytes_total")
    assert before > 0
    for monitor in monitors:
        monitor.launch()
    for monitor in monitors:
        await asyncio.to_thread(monitor.await_ready)
    assert await asyncio.to_thread(fallback.stop) == 0
    bench.monitors.remove(fallback)
    await asyncio.gather(*(whole(bench, each, 200) for each in ids))


# -- the cluster itself


async def test_an_api_server_that_is_silent_delays_and_loses_nothing(bench: WatchedCluster) -> None:
    ids = [await bench.run(counting(60, 6), timeout_seconds=60, cpu_limit="500m") for _ in range(3)]
    await asyncio.gather(*(said(bench, each, b"line 0\n") for each in ids))
    bench.cluster.pause_api_server()
    try:
        await pass_time(7)
    finally:
        bench.cluster.resume_api_server()
    resumed = asyncio.get_running_loop().time()
    await asyncio.gather(*(whole(bench, each, 60) for each in ids))
    assert asyncio.get_running_loop().time() - resumed < SECONDS + 5


@pytest.mark.parametrize(
    ("lose", "find"), [(Node.power_cut, Node.revive), (Node.cut, Node.heal)], ids=["power", "link"]
)
async def test_a_node_that_is_lost_loses_its_sandboxes_and_keeps_what_they_wrote(
    bench: WatchedCluster, lose: Callable[[Node], None], find: Callable[[Node], None]
) -> None:
    evaluation_id = await bench.run(LINGER, on_node("w2"))
    elsewhere = await bench.run(counting(100, 20), on_node("w1"), timeout_seconds=90)
    await asyncio.gather(said(bench, evaluation_id, b"before\n"), said(bench, elsewhere, b"line 0\n"))
    node = bench.cluster.node("w2")
    lose(node)
    try:
        record = await bench.ended(evaluation_id, 60)
        seen = await unready_since(bench, "w2")
    finally:
        find(node)
    assert (record.state, record.reason, record.exit_code) == (State.FAILED, Reason.NODE_LOST, None)
    assert (await bench.output(evaluation_id))[0] == b"before\n"
    assert record.finished_at is not None
    assert (record.finished_at - seen).total_seconds() < SECONDS
    await bench.collected(evaluation_id)
    await whole(bench, elsewhere, 100)


async def unready_since(bench: WatchedCluster, name: str) -> datetime:
    """When Kubernetes saw that a node does not answer."""
    node = await bench.api.get(NODES, name)
    (condition,) = [each for each in node["status"]["conditions"] if each["type"] == "Ready"]
    assert condition["status"] != "True"
    return datetime.fromisoformat(condition["lastTransitionTime"])
